"""What an experiment's runs left behind, in one JSON form, and its page: a template of `pages/`.

`collect` reads run folders, finished or under way; the JSON holds every figure that the page shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from driver import MARKS, ROOT
from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from janus_ds.io import disk_faults, write_atomic
from janus_ds.metrics.scores import TextLines, read_lines
from janus_ds.metrics.translation import compare_translations
from janus_ds.observe import read_metrics, read_run_record

_CURVE_KEYS = ("samples_total", "tokens_total", "cpu_seconds_total", "seconds_total")


def collect(
    folder: Path, names: Sequence[str], placeholder: str, published: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The experiment's JSON: its runs, and who is not there or not finished.

    Args:
        folder: where runs lie.
        names: runs in their order.
        placeholder: stands for `folder` in commands and warnings: no machine's path is published.
        published: runs of an earlier JSON. What was finished there and is not in the folder (another machine
            made it) stays as it was.
    """
    kept = {name: run for name, run in (published or {}).items() if run["finished"]}
    order = list(dict.fromkeys([*names, *kept]))
    found = {name: _collect_run(folder, name, placeholder) or kept.get(name) for name in order}
    runs = {name: run for name, run in found.items() if run is not None}
    return {
        "order": list(runs),
        "runs": runs,
        "not_begun": [name for name in names if name not in runs],
        "not_finished": [name for name, run in runs.items() if not run["finished"]],
    }


def _collect_run(folder: Path, name: str, placeholder: str) -> dict[str, Any] | None:
    """One run; None where training has not written a figure yet."""
    run, record = folder / name, read_run_record(folder / name)
    lines = list(_of_all_ranks(read_metrics(run / "metrics.jsonl")))
    if record is None or not lines:
        return None
    scores = run / "eval" / "test" / "scores.json"
    systems = json.loads(scores.read_text(encoding="utf-8"))["systems"] if scores.is_file() else {}
    for system in systems.values():
        system["warnings"] = [portable(text, folder, placeholder) for text in system.get("warnings", ())]
    recipe, last = record["recipe"], lines[-1]
    # Pretraining is not evaluated. A run that goes on behind its mark is under way again.
    mark = run / MARKS["train" if recipe["data"]["task"] == "denoise" else "evaluate"]
    done = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
    return {
        "finished": done.get("steps", 0) >= last["step"],
        "updates": last["step"],
        "samples": last.get("samples_total"),
        "tokens": last.get("tokens_total"),
        "cpu_seconds": last.get("cpu_seconds_total"),
        # CPU time where it was logged.
        "seconds": round(last.get("cpu_seconds_total", wall_seconds(lines))),
        "systems": systems,
        "held_out": [_point(line) for line in lines if "valid/loss" in line],
        "training": [_losses(line) for line in _thinned(lines)],
        "recipe": {part: recipe[part] for part in ("objective", "masking", "model", "optim", "train")},
        "init": recipe.get("init") and portable(str(recipe["init"]), folder, placeholder),
        "command": [portable(argument, folder, placeholder) for argument in record["command"]],
        "precision": record.get("execution", {}).get("precision"),
        "git_commit": record["git_commit"],
        "hardware": {k: v for k, v in record["hardware"].items() if k != "host"},
        "versions": record["versions"],
    }


def _of_all_ranks(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines with the CPU seconds of all ranks: a run logs those of rank 0, which stand for each."""
    total = before = 0.0
    for line in lines:
        if (own := line.get("cpu_seconds_total")) is not None:
            ranks = round(line["tokens_per_second"] / line["tokens_per_second_device"])
            total, before = total + ranks * (own - before), own
            line = {**line, "cpu_seconds_total": total}
        yield line


def wall_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Wall time of all updates, over all starts of a run."""
    spans = zip(lines, [0, *(line["step"] for line in lines)], strict=False)
    return float(sum(line["seconds"] * (line["step"] - before) for line, before in spans))


def _point(line: Mapping[str, Any]) -> dict[str, Any]:
    """A validation: its step, cost so far, held-out losses and scores."""
    kept = {key: line[key] for key in _CURVE_KEYS if key in line}
    return {"step": line["step"], **kept} | {
        key.removeprefix("valid/"): _rounded(value) for key, value in line.items() if key.startswith("valid/")
    }


def _losses(line: Mapping[str, Any]) -> dict[str, Any]:
    """Training losses of a step, KL terms among them."""
    names = [key for key in line if key in ("loss", "ar", "nar", "aux", "length") or key.startswith("kl_")]
    return {"step": line["step"], "cpu_seconds_total": line.get("cpu_seconds_total")} | {
        name: _rounded(line[name]) for name in names
    }


def _thinned(lines: Sequence[Mapping[str, Any]], points: int = 60) -> list[Mapping[str, Any]]:
    """At most so many lines, evenly, the last among them."""
    stride = max(1, len(lines) // points)
    return list(lines)[::-stride][::-1]


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def portable(text: str, folder: Path, placeholder: str) -> str:
    """Text without the places where the clone and the runs happen to lie."""
    text = text.replace(str(folder), placeholder).replace(f"{ROOT}/", "")
    return re.sub(r"/[^\s=]*/(?=launch/|ds_configs/)", "", text)


def output_of(folder: Path, run: str, system: str) -> Path:
    """Where an evaluation leaves the test outputs of a system; system "references": what is asked for."""
    return folder / run / "eval" / "test" / f"{system}.txt"


def significance(
    output: Callable[[str, str], Path],
    runs: Mapping[str, Any],
    pairs: Sequence[tuple[str, str, str, str, str]],
) -> list[dict[str, Any]]:
    """Paired bootstrap of outputs on the test set, where both are there, on as many lines.

    Args:
        output: the file of a run and a system, as `output_of` gives it.
        runs: by name.
        pairs: (run, system, baseline run, baseline system, what it says).
    """
    found = []
    for name, system, other, other_system, what in pairs:
        files = [output(name, system), output(other, other_system)]
        if name in runs and other in runs and all(path.is_file() for path in files):
            ours, theirs = (
                TextLines(run, read_lines(path).lines) for run, path in zip((name, other), files, strict=True)
            )
            references = read_lines(output(name, "references"))
            if len(ours.lines) == len(theirs.lines):
                found.append({"what": what, **compare_translations(ours, references, theirs)})
    return found


def fixed(value: Any, digits: int = 2, per: float = 1) -> str:
    """A number over another with so many digits and commas between thousands; empty where there is none."""
    return f"{value / per:,.{digits}f}" if isinstance(value, int | float) else ""


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("pages")),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    # What was not measured leaves its cell empty.
    undefined=ChainableUndefined,
)
_PAGES.filters["fixed"] = fixed


def render(name: str, content: Mapping[str, Any], **more: Any) -> str:
    """The page NAME.md of what its JSON holds, and of what was reckoned from that."""
    return _PAGES.get_template(f"{name}.md.j2").render(content, **more)


def write_page(path: Path, text: str, content: Mapping[str, Any] | None = None) -> None:
    """Write a page and the JSON beside it.

    Raises:
        ResourceError: the folder cannot be written.
    """
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        figures = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomic(path.with_suffix(".json"), f"{figures}\n".encode())
    write_atomic(path, text.encode())
    print(f"wrote {path}", flush=True)
