"""All ways to decode one model: BLEU against CPU seconds a sentence, in batches of 32 and one by one.

    python launch/experiments/ways_to_decode.py --run demo --source test.de --reference test.en --minutes 60

Everything runs in one process, in rounds: each takes the next 32 sentences, all ways in turn, and then the
first few of them one by one. So other work on the machine slows all ways alike. Rounds end when the text does
or the time is up; the page says how many sentences were decoded. Any checkpoint can be given; each call of
another run's name adds its section. The held-out text of the demonstration model is written by
`demo_de_en.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from driver import ROOT
from results import table, write_results

from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run, with_decode
from janus_ds.errors import exit_on_error
from janus_ds.io import write_atomic
from janus_ds.metrics.scores import TextLines, check_same_length, read_lines
from janus_ds.metrics.translation import compare_translations
from janus_ds.model.decoding.inference import prepare_for_inference
from janus_ds.report.figures import COLOURS, new_figure, png_of, styled

BATCH = 32
BASELINE = "NAR 10, 3 lengths"
WAYS: dict[str, dict[str, Any]] = {
    "AR, beam 5": {"mode": "ar", "beam": 5},
    "AR, greedy": {"mode": "ar", "beam": 1},
    "draft": {"mode": "draft"},
    **{
        f"NAR {n}, {c} length{'s' * (c > 1)}": {"mode": "nar", "iterations": n, "length_beam": c}
        for n in (0, 1, 4, 10)
        for c in (1, 3, 5)
    },
    **{
        f"NAR, threshold {p}, 3 lengths": {"mode": "nar", "threshold": p, "length_beam": 3}
        for p in (0.5, 0.9, 0.99)
    },
    **{f"AUX, {c} length{'s' * (c > 1)}": {"mode": "aux", "length_beam": c} for c in (1, 3, 5)},
    "NAR 4, 5 lengths, rescored": {"mode": "nar", "iterations": 4, "length_beam": 5, "rescore": "ar"},
}


def main() -> int:
    """Measure, and write the page, its JSON and its picture."""
    options = _parser().parse_args()
    sources, references = read_lines(options.source), read_lines(options.reference)
    check_same_length(sources, references)
    torch.set_num_threads(1)
    run = load_run(options.run)
    prepare_for_inference(run.model)
    makers = {
        name: [
            Generator(run.model, run.text, run.special, with_decode(run.config, way), batch)
            for batch in (BATCH, 1)
        ]
        for name, way in WAYS.items()
    }
    stem = options.results / "ways_to_decode"
    content = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").is_file() else {}
    measured = measure(makers, sources.lines, options)
    content[options.name or options.run] = score(measured, references, options)
    draw(content, options.results / "figures" / "ways_to_decode.png")
    print(write_results(stem, content, page(content)))
    return 0


def measure(makers: Mapping[str, list[Generator]], lines: list[str], options: Any) -> dict[str, Any]:
    """Outputs, passes and CPU seconds by way: sums over sentences, in batches and one by one."""
    found: dict[str, Any] = {
        name: {"text": [], "passes": [], "batch_seconds": 0.0, "single_seconds": 0.0, "singles": 0}
        for name in makers
    }
    for pair in makers.values():
        for generator in pair:
            generator.generate(lines[:2])
    until = time.monotonic() + 60 * options.minutes
    for start in range(0, len(lines), BATCH):
        part = lines[start : start + BATCH]
        for name, (batched, single) in makers.items():
            item, began = found[name], time.process_time()
            outputs = batched.generate(part)
            item["batch_seconds"] += time.process_time() - began
            item["text"] += [output.text for output in outputs]
            item["passes"] += [output.passes for output in outputs]
            began = time.process_time()
            for line in part[: options.singles]:
                single.generate(line)
            item["single_seconds"] += time.process_time() - began
            item["singles"] += len(part[: options.singles])
        print(f"{start + len(part)} of {len(lines)} sentences", flush=True)
        if time.monotonic() > until:
            break
    return found


def score(measured: Mapping[str, Any], references: TextLines, options: Any) -> dict[str, Any]:
    """BLEU of each way, its significance against NAR 10, and milliseconds a sentence."""
    count = len(measured[BASELINE]["text"])
    given = TextLines(references.name, references.lines[:count])
    baseline, ways = TextLines(BASELINE, measured[BASELINE]["text"]), {}
    for name, item in measured.items():
        compared = compare_translations(TextLines(name, item["text"]), given, baseline)["sacrebleu"]
        ways[name] = {
            "bleu": round(compared["score"], 2),
            "p": round(compared["p_sacrebleu"], 4),
            "passes": round(sum(item["passes"]) / count, 2),
            "ms_batch": round(1e3 * item["batch_seconds"] / count, 2),
            "ms_single": round(1e3 * item["single_seconds"] / max(1, item["singles"]), 2),
        }
    singles = measured[BASELINE]["singles"]
    return {"sentences": count, "singles": singles, "of": len(references.lines), "ways": ways}


def page(content: Mapping[str, Any]) -> Iterator[str]:
    """The Markdown."""
    yield from ("# Ways to decode", "", "![BLEU against CPU time](figures/ways_to_decode.png)", "")
    yield (
        "Made by `python launch/experiments/ways_to_decode.py --run RUN --source FILE --reference FILE`: all "
        "ways in one process, in interleaved rounds; CPU time of one thread of a shared machine, fp32. p: "
        f"paired bootstrap (sacreBLEU) against {BASELINE}. Passes are decoder passes of a sentence."
    )
    for name, part in content.items():
        yield from ("", f"## {name}", "")
        yield (
            f"The first {part['sentences']:,} of {part['of']:,} held-out sentences in batches of {BATCH}; "
            f"{part['singles']:,} of them one by one."
        )
        yield ""
        rows = [
            [way, *(f"{x[key]:.{digits}f}" for key, digits in _COLUMNS.items())]
            for way, x in part["ways"].items()
        ]
        yield from table(["way", "BLEU", "p", "passes", "ms, batch 32", "ms, batch 1"], rows)


_COLUMNS = {"bleu": 2, "p": 4, "passes": 1, "ms_batch": 1, "ms_single": 1}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """BLEU against time; a row for each run, a column for each batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = ("AR", "draft", "NAR", "AUX")
    with styled():
        figure = new_figure(9.0, 4.2 * len(content))
        axes = figure.subplots(len(content), 2, squeeze=False)
        for (name, part), row in zip(content.items(), axes, strict=True):
            for panel, (key, size) in zip(row, (("ms_single", 1), ("ms_batch", BATCH)), strict=True):
                for kind, colour in zip(kinds, COLOURS, strict=False):
                    chosen = {way: x for way, x in part["ways"].items() if way.startswith(kind)}
                    bleu = [x["bleu"] for x in chosen.values()]
                    panel.scatter([x[key] for x in chosen.values()], bleu, label=kind, color=colour)
                    for way, x in chosen.items():
                        panel.annotate(way.removeprefix(kind).strip(", "), (x[key], x["bleu"]), fontsize=5)
                panel.set_xlabel("CPU ms a sentence")
                panel.set_title(f"{name}, batch {size}: BLEU")
        axes[0][0].legend(fontsize=7)
        write_atomic(path, png_of(figure, 80))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--run", required=True, help="a run folder, one of its checkpoints, or demo")
    add("--name", help="its title on the page [as --run]")
    add("--source", type=Path, required=True, help="held-out sources, one a line")
    add("--reference", type=Path, required=True, help="their references")
    add("--minutes", type=float, default=60.0, help="no further round after so many [%(default)s]")
    add("--singles", type=int, default=4, help="sentences of a round that go one by one [%(default)s]")
    add("--results", type=Path, default=ROOT / "docs" / "results", help="where the page goes")
    return parser


if __name__ == "__main__":
    exit_on_error(main)
