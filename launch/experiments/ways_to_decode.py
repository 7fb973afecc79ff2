"""All ways to decode one model: BLEU against CPU seconds a sentence, in batches of 32 and one by one.

    python launch/experiments/ways_to_decode.py --checkpoint demo --text test.de test.en --minutes 60
    python launch/experiments/ways_to_decode.py --checkpoint demo --infill "Er wohnt hier. ||| He ___ here."

Everything runs in one process, in rounds: each takes the next 32 sentences, all ways in turn, and then the
first few of them one by one. So other work on the machine slows all ways alike. What was measured is kept in
`--state` after each round; the same call again goes on from there. Rounds end when the text does or the time
is up; the page says how many sentences were decoded. Any checkpoint that was trained for AR, NAR and AUX can
be given; each call renews the section of its name and keeps the others. The held-out text of the
demonstration model is written by `demo_de_en.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from driver import ROOT
from results import table, write_results

from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run, with_decode
from janus_ds.errors import UsageError, exit_on_error
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page, its JSON and its picture."""
    options = _parser().parse_args(arguments)
    if not options.text and not options.infill:
        raise UsageError("nothing is to be decoded", "--text, --infill", "give a text, or blanks to fill")
    torch.set_num_threads(1)
    run = load_run(options.checkpoint)
    prepare_for_inference(run.model)
    stem = options.results / "ways_to_decode"
    content = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").is_file() else {}
    part = content.setdefault(options.name or options.checkpoint, {})
    if run.weights.parent.name.startswith("step-"):
        part["updates"] = int(run.weights.parent.name.removeprefix("step-"))
    if options.text:
        sources, references = (read_lines(path) for path in options.text)
        check_same_length(sources, references)
        part |= score(measure(run, sources.lines, options), references)
    if options.infill:
        part["infilling"] = [filled(run, *_blanks(text)) for text in options.infill]
    draw(content, options.results / "figures" / "ways_to_decode.png")
    print(write_results(stem, content, page(content)))
    return 0


def generators(run: LoadedRun, batch: int) -> dict[str, Generator]:
    """One for each way."""
    return {
        name: Generator(run.model, run.text, run.special, with_decode(run.config, way), batch)
        for name, way in WAYS.items()
    }


def measure(run: LoadedRun, lines: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Outputs, passes and CPU seconds by way: sums over sentences, in batches and one by one."""
    found: dict[str, Any] = {
        name: {"text": [], "passes": [], "batch_seconds": 0.0, "single_seconds": 0.0, "singles": 0}
        for name in WAYS
    }
    if options.state.is_file():
        found |= json.loads(options.state.read_text(encoding="utf-8"))
    done = len(found[BASELINE]["text"])
    if set(found) != set(WAYS) or any(len(item["text"]) != done for item in found.values()):
        raise UsageError("it was measured in other ways", str(options.state), "remove it, or name another")
    batched, single = generators(run, BATCH), generators(run, 1)
    for generator in (*batched.values(), *single.values()) if done < len(lines) else ():
        generator.generate(lines[:2])
    until = time.monotonic() + 60 * options.minutes
    for start in range(done, len(lines), BATCH):
        part = lines[start : start + BATCH]
        for name, item in found.items():
            began = time.process_time()
            outputs = batched[name].generate(part)
            item["batch_seconds"] += time.process_time() - began
            item["text"] += [output.text for output in outputs]
            item["passes"] += [output.passes for output in outputs]
            began = time.process_time()
            for line in part[: options.singles]:
                single[name].generate(line)
            item["single_seconds"] += time.process_time() - began
            item["singles"] += len(part[: options.singles])
        write_atomic(options.state, json.dumps(found, ensure_ascii=False).encode())
        print(f"{start + len(part)} of {len(lines)} sentences", flush=True)
        if time.monotonic() > until:
            break
    return found


def filled(run: LoadedRun, source: str, target: str) -> dict[str, Any]:
    """What both modes write into the blanks of a target, of one token or of one to three."""
    found: dict[str, Any] = {"source": source, "target": target}
    for mode in ("nar", "aux"):
        decode = with_decode(run.config, {"mode": mode, "iterations": 4})
        generator = Generator(run.model, run.text, run.special, decode)
        for lengths in ((1,), (1, 2, 3)):
            (item,) = generator.infill(source, target, lengths)
            found[f"{mode}, {'1 token' if lengths == (1,) else '1 to 3 tokens'}"] = item.text
    return found


def _blanks(text: str) -> list[str]:
    parts = [part.strip() for part in text.split("|||")]
    if len(parts) != 2:
        raise UsageError(f"{text!r} is no pair", "--infill", 'write "SOURCE ||| TARGET WITH ___"')
    return parts


def score(measured: Mapping[str, Any], references: TextLines) -> dict[str, Any]:
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
        "Made by `python launch/experiments/ways_to_decode.py --checkpoint RUN --text SOURCES REFERENCES`: "
        "all ways in one process, in interleaved rounds; CPU time of one thread of a shared machine, fp32. "
        f"p: paired bootstrap (sacreBLEU) against {BASELINE}. Passes are decoder passes of a sentence, in "
        "batches; draft goes on as plain AR where that is faster, in large batches always."
    )
    for name, part in content.items():
        yield from ("", f"## {name}", "")
        if "updates" in part:
            yield f"A checkpoint after {part['updates']:,} updates; training may have gone on behind it."
            yield ""
        if "ways" in part:
            yield (
                f"The first {part['sentences']:,} of {part['of']:,} held-out sentences in batches of "
                f"{BATCH}; {part['singles']:,} of them one by one."
            )
            yield ""
            rows = [
                [way, *(f"{x[key]:.{digits}f}" for key, digits in _COLUMNS.items())]
                for way, x in part["ways"].items()
            ]
            yield from table(["way", "BLEU", "p", "passes", "ms, batch 32", "ms, batch 1"], rows)
        if "infilling" in part:
            yield from [""] * ("ways" in part)
            yield from (
                'Blanks that are filled (`--checkpoint RUN --infill "SOURCE ||| TARGET"`):',
                "",
                "```",
            )
            width = max(len(key) for item in part["infilling"] for key in item)
            for number, item in enumerate(part["infilling"]):
                yield from [""] * bool(number)
                yield from (f"{key:<{width}}  {text}" for key, text in item.items())
            yield "```"


_COLUMNS = {"bleu": 2, "p": 4, "passes": 1, "ms_batch": 1, "ms_single": 1}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """BLEU against time; a row for each run, a column for each batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = ("AR", "draft", "NAR", "AUX")
    content = {name: part for name, part in content.items() if "ways" in part}
    if not content:
        return
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
    add("--checkpoint", required=True, help="a run folder, one of its checkpoints, or demo")
    add("--name", help="its title on the page [as --checkpoint]")
    add(
        "--text",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="held-out sources, one a line, and their references",
    )
    add(
        "--infill",
        nargs="+",
        metavar="PAIR",
        help='"source ||| target with ___": shown with its blanks filled',
    )
    add("--minutes", type=float, default=60.0, help="no further round after so many [%(default)s]")
    add("--singles", type=int, default=4, help="sentences of a round that go one by one [%(default)s]")
    state = ROOT / "runs" / "ways_to_decode.state.json"
    add(
        "--state",
        type=Path,
        default=state,
        help="what was measured, of one checkpoint and text [%(default)s]",
    )
    add("--results", type=Path, default=ROOT / "docs" / "results", help="where the page goes")
    return parser


if __name__ == "__main__":
    exit_on_error(main)
