"""Tables of a report as HTML: one row a run, and all scores mode by mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from janus_ds.tools.report_data import RunFolder, primary_metric, sorted_modes
from janus_ds.tools.report_rows import Row, best_of, metrics_of, rows_of
from janus_ds.tools.report_words import metric_title, mode_title

__all__ = ["mode_tables", "run_table", "signature_lines"]

_NOTHING = '<td class="none">&ndash;</td>'
_SMALL = 10.0


def run_table(runs: Sequence[RunFolder], task: str) -> str:
    """One row a run: objective, updates, and the quality of every mode (the paper's Tables 1 and 6)."""
    rows = rows_of(runs, task)
    modes = sorted_modes([run.tasks.get(task, {}) for run in runs])
    metric = primary_metric([system for run in runs for system in run.tasks.get(task, {}).values()])
    best = {mode: _best(rows, mode, metric) for mode in modes}
    quality = escape(metric_title(metric))
    head = (
        "<tr><th rowspan=2>run</th><th rowspan=2 class=text>objective</th><th rowspan=2>seed</th>"
        f"<th rowspan=2>updates</th><th class=group colspan={max(1, len(modes))}>{quality}</th>"
        "<th rowspan=2 class=text>validation BLEU,<br>last third</th></tr>"
        f"<tr>{''.join(f'<th>{escape(mode_title(mode))}</th>' for mode in modes) or '<th></th>'}</tr>"
    )
    body = []
    for row in rows:
        cells = [_cell(row, mode, metric, best[mode]) for mode in modes] or [_NOTHING]
        texts = f'<td class="text">{escape(row.objective)}</td>'
        texts += "".join(f"<td>{escape(text)}</td>" for text in (row.seed, row.updates))
        trends = f'<td class="text">{"<br>".join(map(escape, row.trends))}</td>'
        body.append(f"{_start(row)}{texts}{''.join(cells)}{trends}</tr>")
    return _table(head, body)


def mode_tables(runs: Sequence[RunFolder], task: str) -> str:
    """All metrics and speeds, runs under the mode that they are compared in (Table 3 among them)."""
    rows = rows_of(runs, task)
    metrics = metrics_of(rows)
    head = f"<tr><th>run</th>{''.join(f'<th>{escape(metric_title(m))}</th>' for m in metrics)}</tr>"
    body = []
    for mode in sorted_modes([run.tasks.get(task, {}) for run in runs]):
        title = f"<th colspan={len(metrics) + 1} scope=rowgroup>{escape(mode_title(mode))}</th>"
        body.append(f'<tr class="mode">{title}</tr>')
        found = [row for row in rows if mode in row.modes]
        best = {metric: _best(found, mode, metric) for metric in metrics}
        for row in found:
            cells = "".join(_cell(row, mode, metric, best[metric]) for metric in metrics)
            body.append(f"{_start(row)}{cells}</tr>")
    return _table(head, body)


def _best(rows: Sequence[Row], mode: str, metric: str) -> str | None:
    """The best value as it is printed, so that values printed alike are marked alike."""
    values = [
        row.modes[mode][metric] for row in rows if not row.is_mean and metric in row.modes.get(mode, {})
    ]
    best = best_of(metric, values)
    alike = len({_number(metric, value) for value in values}) == 1
    return None if best is None or alike else _number(metric, best)


def _number(metric: str, value: float) -> str:
    if metric in ("sentences_per_second", "ms_per_sentence_batch_1"):
        return f"{value:.1f}" if value < _SMALL else f"{value:,.0f}"
    return f"{value:.2f}"


def _cell(row: Row, mode: str, metric: str, best: str | None) -> str:
    value = row.modes.get(mode, {}).get(metric)
    if value is None:
        return _NOTHING
    text = _number(metric, value)
    return f'<td class="best">{text}</td>' if text == best and not row.is_mean else f"<td>{text}</td>"


def _start(row: Row) -> str:
    kind = ' class="mean"' if row.is_mean else ""
    return f"<tr{kind}><th scope=row>{escape(row.label)}</th>"


def _table(head: str, body: Sequence[str]) -> str:
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def signature_lines(runs: Sequence[RunFolder], task: str) -> Iterator[str]:
    """How each metric was computed, and what the scores' makers warn of; each line once."""
    for run in runs:
        for system in run.tasks.get(task, {}).values():
            for name, text in dict(system.scores.get("signatures") or {}).items():
                yield f"{metric_title(name)}: {text}"
            for text in system.scores.get("warnings") or []:
                yield f"warning: {text}"
