"""One self-contained HTML page about runs: tables, pictures, samples, and how all of it was made."""

from __future__ import annotations

import base64
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from janus_ds import __version__
from janus_ds.errors import UsageError
from janus_ds.io import disk_faults, write_atomic
from janus_ds.tools.report_data import RunFolder, read_runs
from janus_ds.tools.report_figures import draw_curve_pictures, draw_task_pictures
from janus_ds.tools.report_samples import sample_cards
from janus_ds.tools.report_style import Picture, require_matplotlib
from janus_ds.tools.report_tables import mode_tables, run_table, signature_lines

__all__ = ["PAGE", "ReportRequest", "write_report"]

PAGE = "index.html"
_DPI = 150
_CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --line: #ddd; --band: #f4f4f2;
  --mark: #fbe3c4; --mark-ink: #5a2a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e2; --soft: #a5a5a2; --paper: #1b1c1e;
  --line: #3c3d40; --band: #26272a; --mark: #5b3a10; --mark-ink: #ffe2bd; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.none { color: var(--soft); }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { vertical-align: bottom; }
td { white-space: nowrap; } .text, tbody th, tr:first-child > th:first-child { text-align: left; }
tbody th { white-space: nowrap; } tbody th, td { vertical-align: top; } h3 { font-size: 1rem; }
th.group { text-align: center; }
tr.mode th { background: var(--band); padding-top: .5rem; }
tr.mean { font-style: italic; background: var(--band); }
.best { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
figure { margin: .5rem 0 1rem; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; padding: .4rem; box-sizing: border-box; }
.sample { width: 100%; } .sample td { text-align: left; white-space: normal; min-width: 22rem; width: 100%; }
.sample th { font-weight: 400; color: var(--soft); vertical-align: top; }
.sample caption { text-align: left; } .reference td { font-weight: 600; }
mark { background: var(--mark); color: var(--mark-ink); text-decoration: underline wavy; padding: 0 .1rem;
  text-underline-offset: 2px; text-decoration-thickness: 1px; }
del { text-decoration: none; font-weight: 700; color: var(--mark-ink); background: var(--mark);
  cursor: help; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band); padding: .5rem .7rem;
  font-size: .8rem; border-radius: 4px; }
@media print { body { max-width: none; } }
"""


@dataclass(frozen=True)
class ReportRequest:
    """What is to be reported.

    Attributes:
        runs: run folders.
        output: folder of the page and its pictures.
        split: whose scores.
        samples: test sentences shown; 0: none.
        command: the command line, for the foot of the page.
    """

    runs: Sequence[Path]
    output: Path
    split: str = "test"
    samples: int = 6
    command: Sequence[str] = ()


def write_report(request: ReportRequest) -> list[Path]:
    """Write index.html and the PNGs; returns their paths, the page first.

    Raises:
        UsageError: no run, a folder that is none, a negative number of samples.
        MissingDependencyError: matplotlib is not installed.
        ResourceError: the output cannot be written.
    """
    if request.samples < 0:
        raise UsageError(f"{request.samples} samples cannot be shown", "--samples", "give 0 or more")
    in_the_way = [path for path in (request.output, *request.output.parents) if path.is_file()]
    if in_the_way:
        raise UsageError(
            "a file is where the report's folder should be", str(in_the_way[0]), "name another --output"
        )
    require_matplotlib()
    runs = read_runs(request.runs, request.split)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    by_task = {task: draw_task_pictures(runs, task, _DPI) for task in tasks}
    curves = draw_curve_pictures(runs, _DPI)
    page = "\n".join(_page(request, runs, by_task, curves))
    with disk_faults(request.output):
        request.output.mkdir(parents=True, exist_ok=True)
    written = [request.output / PAGE]
    write_atomic(written[0], f"{page}\n".encode())
    for picture in [*(p for found in by_task.values() for p in found), *curves]:
        if picture.png is not None:
            written.append(request.output / f"{picture.name}.png")
            write_atomic(written[-1], picture.png)
    return written


def _page(
    request: ReportRequest,
    runs: Sequence[RunFolder],
    by_task: dict[str, list[Picture]],
    curves: Sequence[Picture],
) -> Iterator[str]:
    title = escape(f"Runs {', '.join(run.label for run in runs)}")
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{_CSS}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield f'<p class="soft">{escape(_subtitle(request, runs))}</p>'
    yield from _notes(runs)
    for task, pictures in by_task.items():
        yield from _task(request, runs, task, pictures)
    if not by_task:
        yield "<h2>Scores</h2><p class=none>No run has scores yet.</p>"
        yield run_table(runs, "nmt")
    yield "<h2>Training</h2>"
    yield from map(_figure, curves)
    yield from _making(request, runs, list(by_task))
    yield "</body></html>"


def _subtitle(request: ReportRequest, runs: Sequence[RunFolder]) -> str:
    counts = {
        f"{task} {request.split}, n = {system.scores.get('n', '?')}"
        for run in runs
        for task, systems in run.tasks.items()
        for system in systems.values()
    }
    told = "; ".join(sorted(counts)) or f"no scores of split {request.split}"
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}; {told}; made {_now()}"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _notes(runs: Sequence[RunFolder]) -> Iterator[str]:
    noted = [(run.label, note) for run in runs for note in dict.fromkeys(run.notes)]
    if noted:
        items = "".join(f"<li><b>{escape(label)}</b>: {escape(note)}</li>" for label, note in noted)
        yield f"<h2>Missing or odd</h2><ul>{items}</ul>"


def _task(
    request: ReportRequest, runs: Sequence[RunFolder], task: str, pictures: Sequence[Picture]
) -> Iterator[str]:
    yield f"<h2>{escape(task)}: every run</h2>"
    yield run_table(runs, task)
    yield (
        "<p class=soft>Bold and underlined: the best run of the column; &ndash;: not there. Means are over "
        "seeds of one recipe. Last third: gain of a line fitted to validation BLEU over the last third of "
        "the updates (four points at least), ± two standard errors.</p>"
    )
    yield from map(_figure, pictures)
    yield f"<h2>{escape(task)}: all scores, mode by mode</h2>"
    yield mode_tables(runs, task)
    yield (
        "<p class=soft>Best of each mode marked: higher is better, but fewer repetitions, fewer ms, and a "
        "length nearest to 100 %.</p>"
    )
    if request.samples:
        yield f"<h2>{escape(task)}: sample outputs</h2>"
        yield (
            "<p class=soft>Sentences at equal distances through the set, chosen by nothing else. "
            "<mark>Marked</mark>: words that the reference does not have there; <del>‸</del>: words of the "
            "reference are missing (rest the pointer on it to see which).</p>"
        )
        yield sample_cards(runs, task, request.split, request.samples)


def _figure(picture: Picture) -> str:
    head = f"<h3>{escape(picture.title)}</h3>"
    if picture.png is None:
        return f"{head}<p class=none>{escape(picture.caption)}</p>"
    data = base64.b64encode(picture.png).decode("ascii")
    image = f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    return f"{head}<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _making(request: ReportRequest, runs: Sequence[RunFolder], tasks: Sequence[str]) -> Iterator[str]:
    yield "<h2>How this was made</h2>"
    if request.command:
        yield f"<p>This page, {_now()}, janus_ds {escape(__version__)}:</p>"
        yield f"<pre>{escape(shlex.join(request.command))}</pre>"
    for run in runs:
        yield f"<p><b>{escape(run.label)}</b>: {escape(_circumstances(run))}</p>"
        starts = [dict(start) for start in run.record.get("attempts") or []]
        commands = dict.fromkeys(shlex.join(map(str, start.get("command", ()))) for start in starts)
        if commands:
            first = starts[0].get("time", "?")
            yield f"<p class=soft>{len(starts)} start(s), the first {escape(str(first))}:</p>"
            yield "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    lines = dict.fromkeys(line for task in tasks for line in signature_lines(runs, task))
    if lines:
        yield f"<p>Metrics:</p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _circumstances(run: RunFolder) -> str:
    """Folder, machine, versions, commit, and which weights were scored, as far as told."""
    parts = [str(run.folder)]
    hardware, versions = run.record.get("hardware"), run.record.get("versions")
    if isinstance(hardware, dict):
        gpus = ", ".join(hardware.get("gpus") or []) or "no GPU"
        parts.append(f"{hardware.get('machine', '?')}, {hardware.get('cpus', '?')} CPUs, {gpus}")
    if isinstance(versions, dict):
        parts += [f"{name} {versions[name]}" for name in ("torch", "deepspeed") if versions.get(name)]
    if run.record.get("git_commit"):
        parts.append(f"commit {str(run.record['git_commit'])[:12]}")
    weights = {
        f"scored: {system.scores['checkpoint']}, mean of {system.scores.get('average', 1)} checkpoint(s)"
        for systems in run.tasks.values()
        for system in systems.values()
        if system.scores.get("checkpoint")
    }
    return "; ".join([*parts, *sorted(weights)])
