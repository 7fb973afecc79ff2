"""All ways to decode one model: its score against CPU seconds a sentence, in batches of 32 and one by one.

    python launch/experiments/ways_to_decode.py --checkpoint demo --text test.de test.en --minutes 60
    python launch/experiments/ways_to_decode.py --checkpoint RUN --task squadqg --text test.src test.tgt
    python launch/experiments/ways_to_decode.py --checkpoint demo --infill "Er wohnt hier. ||| He ___ here."

Everything runs in one process, in rounds: each takes the next 32 sentences, all ways in turn, and then the
first few of them one by one. So other work on the machine slows all ways alike. What was measured is kept in
`--state` after each round; the same call again goes on from there. Rounds end when the text does or the time
is up; the page says how many sentences were decoded. Ways that a checkpoint was not trained for are left out;
each call renews the section of its name, from which what other weights gave goes, and keeps the others. The
held-out text of the demonstration model is written by `demo_de_en.py`, that of Multi30k by `convergence.py`,
that of SQuAD-QG by `glge_squadqg.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from driver import ROOT
from results import portable, render, write_page

from janus_ds.cli.arguments import at_least
from janus_ds.config.locations import user_path
from janus_ds.config.modes import check_mode, with_decode
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run, prepare_for_inference
from janus_ds.decode.text import fit_sources, long_warning
from janus_ds.errors import ConfigError, UsageError, exit_on_error
from janus_ds.io import check_writable, sha256_of_file, write_atomic
from janus_ds.metrics.glge import VALIDATION_METRICS, TaskTexts, choose_meteor, score_task, task_named
from janus_ds.metrics.scores import METRIC_TITLES, TextLines, check_same_length, read_lines
from janus_ds.metrics.translation import compare_translations
from janus_ds.observe import processor_title, read_metrics, read_run_record
from janus_ds.report.figures import COLOURS, new_figure, png_of, require_matplotlib, styled

BATCH = 32
BASELINE = "NAR 10, 3 lengths"
MARKERS = "o*^v<sDPX"
LENGTHS = {count: f"{count} length{'s' * (count > 1)}" for count in (1, 3, 5)}
WAYS: dict[str, dict[str, Any]] = {
    "AR, beam 5": {"mode": "ar", "beam": 5},
    "AR, greedy": {"mode": "ar", "beam": 1},
    "draft": {"mode": "draft"},
    **{
        f"NAR {n}, {title}": {"mode": "nar", "iterations": n, "length_beam": count}
        for n in (0, 1, 4, 10)
        for count, title in LENGTHS.items()
    },
    **{
        f"NAR, threshold {p}, 3 lengths": {"mode": "nar", "threshold": p, "length_beam": 3}
        for p in (0.5, 0.9, 0.99)
    },
    **{f"AUX, {title}": {"mode": "aux", "length_beam": count} for count, title in LENGTHS.items()},
    **{
        f"AUX, surest first, {title}": {"mode": "aux", "length_beam": count, "aux_order": "certain"}
        for count, title in LENGTHS.items()
    },
    "NAR 4, 5 lengths, rescored": {"mode": "nar", "iterations": 4, "length_beam": 5, "rescore": "ar"},
}
LINES: dict[str, dict[str, str]] = {
    "AR by beam": {"1": "AR, greedy", "5": "AR, beam 5"},
    "draft": {"": "draft"},
    **{
        f"NAR by iterations, {title}": {str(n): f"NAR {n}, {title}" for n in (0, 1, 4, 10)}
        for title in LENGTHS.values()
    },
    "NAR by threshold, 3 lengths": {str(p): f"NAR, threshold {p}, 3 lengths" for p in (0.5, 0.9, 0.99)},
    "AUX by lengths": {str(count): f"AUX, {title}" for count, title in LENGTHS.items()},
    "AUX, surest first, by lengths": {
        str(count): f"AUX, surest first, {title}" for count, title in LENGTHS.items()
    },
    "NAR 4, 5 lengths, rescored": {"": "NAR 4, 5 lengths, rescored"},
}
"""The lines of the picture: what stands at each of their points, and its way."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page, its JSON and its picture."""
    options = _parser().parse_args(arguments)
    if not options.text and not options.infill:
        raise UsageError("nothing is to be decoded", "--text, --infill", "give a text, or blanks to fill")
    require_matplotlib()
    if options.task is not None:
        task_named(options.task)
    check_writable(options.results)
    torch.set_num_threads(1)
    run = load_run(options.checkpoint)
    prepare_for_inference(run.model)
    results = options.results / "ways_to_decode.json"
    content = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    name = options.name or options.checkpoint
    told = {"weights": sha256_of_file(run.weights)[:16], **training(run)}
    part = content[name] = kept_of(content.get(name, {}), told) | told
    if options.text:
        texts = [read_lines(path) for path in options.text]
        if options.lowercase:
            texts = [replace(text, lines=[line.lower() for line in text.lines]) for text in texts]
        check_same_length(*texts)
        state = options.state or ROOT / "runs" / f"ways_to_decode.{Path(name).name}.json"
        part |= score(measure(run, texts[0].lines, state, options), *texts, options.task)
        part["left_out"] = available(run)[1]
    if options.infill:
        part["infilling"] = [filled(run, *_blanks(text)) for text in options.infill]
    draw(content, options.results / "figures" / "ways_to_decode.png")
    write_page(results.with_suffix(".md"), page(content), content)
    return 0


def training(run: LoadedRun) -> dict[str, Any]:
    """Of a run that was trained: its command, its checkpoint's update, all, and what its validation said."""
    folder = run.weights.parent
    best = folder / "best.json"
    found: dict[str, Any] = json.loads(best.read_text(encoding="utf-8")) if best.is_file() else {}
    step = found.get("step") or folder.name.removeprefix("step-")
    if not str(step).isdigit():
        return {}
    lines = read_metrics(run.folder / "metrics.jsonl")
    made = lines[-1]["step"] if lines else None
    kinds = {name.removeprefix("valid_"): value for name, value in found.items() if isinstance(value, dict)}
    record = read_run_record(run.folder) or {"command": []}
    command = shlex.join(portable(word, run.folder.parent, "runs") for word in record["command"])
    planned = run.config.train.max_steps
    return {"updates": int(step), "made": made, "planned": planned, "validation": kinds, "command": command}


def kept_of(section: dict[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a section: nothing where it was made of other weights."""
    same = section.get("weights", told["weights"]) == told["weights"]
    return section if same and section.get("updates") == told.get("updates") else {}


def available(run: LoadedRun) -> tuple[list[str], dict[str, str]]:
    """The ways that the checkpoint was trained for, and why the others are left out."""
    left = {}
    for name, way in WAYS.items():
        try:
            check_mode(with_decode(run.config, way))
        except ConfigError as error:
            left[name] = error.what
    return [name for name in WAYS if name not in left], left


def generators(run: LoadedRun, batch: int) -> dict[str, Generator]:
    """One for each way."""
    return {
        name: Generator(run.model, run.text, with_decode(run.config, WAYS[name]), batch)
        for name in available(run)[0]
    }


def measure(run: LoadedRun, lines: list[str], state: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Outputs, passes and CPU seconds by way: sums over sentences, in batches and one by one."""
    batched, single = generators(run, BATCH), generators(run, 1)
    if BASELINE not in batched:
        what = f"all ways are compared with {BASELINE}, and {available(run)[1][BASELINE]}"
        raise UsageError(what, f"--checkpoint {options.checkpoint}", "give a run that has learnt NAR")
    check_writable(state.parent)
    of = hashlib.sha256(run.weights.read_bytes() + "\n".join(lines).encode()).hexdigest()[:16]
    found: dict[str, Any] = {
        name: {"text": [], "passes": [], "batch_seconds": 0.0, "single_seconds": 0.0, "singles": 0}
        for name in batched
    }
    if state.is_file():
        kept = json.loads(state.read_text(encoding="utf-8"))
        if kept.get("of") != of or set(kept["ways"]) != set(found):
            what = "it holds another checkpoint, text or ways"
            raise UsageError(what, str(state), "remove it, or name another (--state)")
        found |= kept["ways"]
    done = len(found[BASELINE]["text"])
    table_size = run.config.model.max_source_positions
    sources, cut = fit_sources(list(map(single[BASELINE].text.encode, lines)), table_size)
    if cut:
        print(long_warning(cut, len(lines), table_size))
    for generator in (*batched.values(), *single.values()) if done < len(lines) else ():
        generator.generate_ids(sources[:2])
    until = time.monotonic() + 60 * options.minutes
    for start in range(done, len(lines), BATCH):
        for name, item in found.items():
            _add_round(item, batched[name], single[name], sources[start : start + BATCH], options.singles)
        write_atomic(state, json.dumps({"of": of, "ways": found}, ensure_ascii=False).encode())
        print(f"{min(start + BATCH, len(lines))} of {len(lines)} sentences", flush=True)
        if time.monotonic() > until:
            break
    return found


def _add_round(
    item: dict[str, Any], batched: Generator, single: Generator, sources: list[list[int]], singles: int
) -> None:
    """One way's outputs of a round, its passes and times."""
    began = time.process_time()
    best = [candidates[0] for candidates in batched.generate_ids(sources)]
    item["batch_seconds"] += time.process_time() - began
    item["text"] += [batched.text.decode(found.tokens) for found in best]
    item["passes"] += [found.passes for found in best]
    began = time.process_time()
    for source in sources[:singles]:
        single.generate_ids([source])
    item["single_seconds"] += time.process_time() - began
    item["singles"] += len(sources[:singles])


def filled(run: LoadedRun, source: str, target: str) -> dict[str, Any]:
    """What both modes write into the blanks of a target, of one token or of one to three."""
    found: dict[str, Any] = {"source": source, "target": target}
    for mode in ("nar", "aux"):
        decode = with_decode(run.config, {"mode": mode, "iterations": 4})
        generator = Generator(run.model, run.text, decode)
        for lengths in ((1,), (1, 2, 3)):
            (item,) = generator.infill(source, target, lengths)
            found[f"{mode}, {'1 token' if lengths == (1,) else '1 to 3 tokens'}"] = item.text
    return found


def _blanks(text: str) -> list[str]:
    parts = [part.strip() for part in text.split("|||")]
    if len(parts) != 2:
        raise UsageError(f"{text!r} is no pair", "--infill", 'write "SOURCE ||| TARGET WITH ___"')
    return parts


def score(
    measured: Mapping[str, Any], sources: TextLines, references: TextLines, task: str | None
) -> dict[str, Any]:
    """Scores of each way, the significance of its BLEU against NAR 10, and milliseconds a sentence."""
    count = len(measured[BASELINE]["text"])
    asked, given = (TextLines(text.name, text.lines[:count]) for text in (sources, references))
    baseline, ways = TextLines(BASELINE, measured[BASELINE]["text"]), {}
    meteor = choose_meteor("auto") if task else ""
    for name, item in measured.items():
        output = TextLines(name, item["text"])
        compared = compare_translations(output, given, baseline)["sacrebleu"]
        ways[name] = {
            "bleu": round(compared["score"], 2),
            "p": round(compared["p_sacrebleu"], 4),
            "passes": round(sum(item["passes"]) / count, 2),
            "ms_batch": round(1e3 * item["batch_seconds"] / count, 2),
            "ms_single": round(1e3 * item["single_seconds"] / max(1, item["singles"]), 2),
        }
        if task is not None:
            texts = TaskTexts(output, given, asked)
            found = score_task(task_named(task), texts, "test", meteor).metrics
            ways[name] = {key: round(value, 2) for key, value in found.items()} | ways[name]
    singles = measured[BASELINE]["singles"]
    counts = {"sentences": count, "singles": singles, "of": len(references.lines)}
    return {"task": task, **counts, "cpu": processor_title(), "ways": ways}


def page(content: Mapping[str, Any]) -> str:
    """The page, of what stands in the JSON: a section for each name."""
    validation = {metric.name: metric.title for metric in VALIDATION_METRICS.values()}
    facts = {"baseline": BASELINE, "batch": BATCH, "columns": _COLUMNS, "validation": validation}
    return render("ways_to_decode", {"parts": content}, **facts)


_COLUMNS = (
    *((key, METRIC_TITLES[key][0], 2) for key in ("rougeL", "bleu4", "meteor", "overall")),
    *(("bleu", "BLEU", 2), ("p", "p", 4), ("passes", "passes", 1)),
    *(("ms_batch", f"ms, batch {BATCH}", 1), ("ms_single", "ms, batch 1", 1)),
)
"""Keys of the JSON, titles and digits; the first that is there is the score of a task."""


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Score against time; a row for each run, a column for each batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: part for name, part in content.items() if "ways" in part}
    if not content:
        return
    with styled():
        figure = new_figure(9.0, 3.8 * len(content) + 1.0)
        axes = figure.subplots(len(content), 2, squeeze=False)
        for (name, part), row in zip(content.items(), axes, strict=True):
            score_key, title, _ = next(column for column in _COLUMNS if column[0] in part["ways"][BASELINE])
            for panel, (key, size) in zip(row, (("ms_single", 1), ("ms_batch", BATCH)), strict=True):
                for number, (line, points) in enumerate(LINES.items()):
                    found = {label: part["ways"][way] for label, way in points.items() if way in part["ways"]}
                    places = [(way[key], way[score_key]) for way in found.values()]
                    looks = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number]}
                    panel.plot(*zip(*places or [(), ()], strict=True), label=line, markersize=4, **looks)
                    for label, place in zip(found, places, strict=True):
                        panel.annotate(label, place, (3, 3), textcoords="offset points", fontsize=6)
                panel.set_xlabel("CPU ms a sentence")
                panel.set_title(f"{name}, batch {size}: {title}")
        named = (panel.get_legend_handles_labels() for panel in figure.axes)
        known = {label: mark for marks, labels in named for label, mark in zip(labels, marks, strict=True)}
        figure.legend(known.values(), known, loc="outside lower center", ncols=3, fontsize=7)
        write_atomic(path, png_of(figure, 80))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run folder, one of its checkpoints, or demo")
    add("--name", help="its title on the page [as --checkpoint]")
    text, filled = "held-out sources, one a line, and their references", "shown with its blanks filled"
    add("--text", type=user_path, nargs=2, metavar="FILE", help=text)
    add("--infill", nargs="+", metavar="PAIR", help=f'"source ||| target with ___": {filled}')
    add("--minutes", type=float, default=60.0, help="no further round after so many [%(default)s]")
    add(
        "--singles", type=at_least(1), default=4, help="sentences of a round that go one by one [%(default)s]"
    )
    add("--lowercase", action="store_true", help="the text, as `prepare --lowercase` makes the data")
    add("--task", help="a task of GLGE, whose metrics are shown, such as squadqg [translation: BLEU]")
    add("--state", type=user_path, help="what was measured [runs/ways_to_decode.NAME.json]")
    add("--results", type=user_path, default=ROOT / "docs" / "results", help="where the page goes")
    return parser


if __name__ == "__main__":
    exit_on_error(main)
