"""Sample outputs side by side, with the words marked that differ from the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from janus_ds.errors import JanusError
from janus_ds.metrics.files import read_lines
from janus_ds.tools.report_data import RunFolder, sorted_modes
from janus_ds.tools.report_words import mode_title

__all__ = ["marked", "sample_cards"]

_WORDS = re.compile(r"(\s*)(\w+|[^\w\s])")
_GAP = '<del title="missing: {words}">‸</del>'


@dataclass(frozen=True)
class _Output:
    """All outputs of one run in one mode."""

    run: str
    mode: str
    lines: list[str]


def sample_cards(runs: Sequence[RunFolder], task: str, split: str, count: int) -> str:
    """HTML of `count` test sentences, taken at equal distances, with every run's output in every mode.

    Args:
        runs: runs whose outputs lie beside their scores.
        task: whose outputs.
        split: of the test set, to find the sources.
        count: how many sentences.
    """
    references = _references(runs, task)
    outputs = list(_outputs(runs, task, references))
    if not references or not outputs:
        return "<p class=none>No outputs lie beside the scores, hence no samples.</p>"
    sources = next((s for run in runs if (s := run.sources(split, references))), None)
    length = min([len(references), *(len(output.lines) for output in outputs)])
    number = min(count, length)
    places = [(2 * i + 1) * length // (2 * number) for i in range(number)]
    cards = [_card(place, sources, references, outputs) for place in places]
    missing = "" if sources else "<p class=none>The sources are not at hand.</p>"
    return missing + "".join(cards)


def _references(runs: Sequence[RunFolder], task: str) -> list[str]:
    """The references of the first run that has some."""
    for folder in _folders(runs, task):
        lines = _lines(folder / "references.txt")
        if lines:
            return lines
    return []


def _folders(runs: Sequence[RunFolder], task: str) -> Iterator[Path]:
    for run in runs:
        for system in run.tasks.get(task, {}).values():
            if system.hypotheses is not None:
                yield system.hypotheses.parent


def _lines(path: Path) -> list[str]:
    try:
        return read_lines(path).lines
    except JanusError:
        return []


def _outputs(runs: Sequence[RunFolder], task: str, references: Sequence[str]) -> Iterator[_Output]:
    for run in runs:
        systems = run.tasks.get(task, {})
        for mode in sorted_modes([systems]):
            path = systems[mode].hypotheses
            lines = _lines(path) if path is not None else []
            own = _lines(path.parent / "references.txt") if path is not None else []
            # Another test set, or another order of it, cannot stand side by side with the rest.
            if lines and own[: len(references)] == list(references)[: len(own)]:
                yield _Output(run.label, mode, lines)


def _card(
    place: int, sources: Sequence[str] | None, references: Sequence[str], outputs: Sequence[_Output]
) -> str:
    rows = []
    if sources is not None:
        rows.append(f"<tr><th colspan=2 scope=row>source</th><td>{escape(sources[place])}</td></tr>")
    reference = references[place]
    rows.append(
        f'<tr class="reference"><th colspan=2 scope=row>reference</th><td>{escape(reference)}</td></tr>'
    )
    for run in dict.fromkeys(output.run for output in outputs):
        alike: dict[str, list[str]] = {}
        for output in outputs:
            if output.run == run:
                alike.setdefault(output.lines[place], []).append(mode_title(output.mode))
        for number, (text, modes) in enumerate(alike.items()):
            name = f"<th scope=row rowspan={len(alike)}>{escape(run)}</th>" if number == 0 else ""
            shown = marked(reference, text) if text.strip() else "<i>empty</i>"
            rows.append(f"<tr>{name}<th>{escape(', '.join(modes))}</th><td>{shown}</td></tr>")
    table = f'<table class="sample"><caption>Sentence {place + 1}</caption>{"".join(rows)}</table>'
    return f'<div class="wide">{table}</div>'


def marked(reference: str, text: str) -> str:
    """HTML of a text with marks where it differs from the reference, word by word.

    Words that the reference does not have at that place are marked; a caret stands where words of the
    reference are missing. Punctuation counts as words; what is compared is the longest common sequence of
    `difflib`.
    """
    words = _WORDS.findall(text)
    expected = [word for _, word in _WORDS.findall(reference)]
    matcher = SequenceMatcher(None, expected, [word for _, word in words], autojunk=False)
    parts = []
    for what, first, last, begin, end in matcher.get_opcodes():
        found = "".join(escape(space + word) for space, word in words[begin:end])
        if what == "delete":
            parts.append(_GAP.format(words=escape(" ".join(expected[first:last]))))
        elif what == "equal":
            parts.append(found)
        else:
            space = found[: len(found) - len(found.lstrip())]
            parts.append(f"{space}<mark>{found.lstrip()}</mark>")
    return "".join(parts).strip()
