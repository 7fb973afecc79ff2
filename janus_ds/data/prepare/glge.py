"""From GLGE's files to a data directory of pairs for fine-tuning (section 5.2 of the paper).

Too long sides are cut, which is counted, and training pairs are put into a mixed order, so that any run
of members is a fair sample. The held-out text stays as given in `raw/` for scoring: `valid.src`,
`valid.tgt` and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.prepare.pair_files import find_files, read_pairs
from janus_ds.data.prepare.pairs import (
    STREAMS,
    EncodedPairs,
    PairPacking,
    PairReport,
    build_whole,
    joined,
    paired,
    plain_ids,
    portions,
    write_split,
)
from janus_ds.data.prepare.pool import ordered_map
from janus_ds.data.prepare.settings import GlgeSettings, Limits
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer
from janus_ds.errors import DataError
from janus_ds.io import disk_faults, write_atomic

__all__ = ["prepare_glge"]

_UNIT_PAIRS = 2000

_SIDES = ("src", "tgt")

Show = Callable[[str, int], None]
"""Called with the split and the number of its pairs done."""


def prepare_glge(
    folder: Path, output: Path, settings: GlgeSettings, processes: int = 1, show: Show | None = None
) -> PairReport:
    """Make a data directory of one task; it appears whole or not at all.

    Args:
        folder: the task's folder in GLGE's layout (`pair_files.find_files`).
        output: the data directory; must be new, empty, or of the same preparation.
        settings: what is made.
        processes: processes that tokenise; changes nothing.
        show: called now and then.

    Raises:
        ConfigError: settings that cannot be meant.
        DataError: missing, damaged, empty or unequal files, no tokenizer, or an output folder that holds
            something else.
        ResourceError: full disk, missing permission, a killed worker.
    """
    settings.check()
    tokenizer = load_tokenizer(settings.tokenizer)
    files = find_files(folder)
    request = {
        "settings": {**asdict(settings), "tokenizer": tokenizer.fingerprint},
        "inputs": {s: [[p.name, p.stat().st_size] for p in pair if p] for s, pair in files.items()},
    }

    def build(building: Path) -> Manifest:
        job = _Job(building, settings, tokenizer, processes, show or (lambda split, pairs: None))
        return job.run(files, request)

    return build_whole(output, request, build)


class _Job:
    """One call of :func:`prepare_glge`."""

    def __init__(
        self, folder: Path, settings: GlgeSettings, tokenizer: Tokenizer, processes: int, show: Show
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._tokenizer = tokenizer
        self._processes = processes
        self._show = show

    def run(self, files: dict[str, tuple[Path, Path | None]], request: dict[str, Any]) -> Manifest:
        self._tokenizer.save(self._folder / "tokenizer")
        totals: dict[str, SplitTotals] = {}
        counts: dict[str, dict[str, int]] = {}
        for split, (source, target) in files.items():
            if split != "train":
                self._keep_raw(split, source, target)
            if target is not None:
                totals[split], counts[split] = self._split(split, source, target)
        languages = dict(zip(STREAMS, _SIDES, strict=True))
        settings = {"request": request, "counts": counts, "languages": languages, "lowercase": False}
        tokenizer = self._tokenizer
        manifest = Manifest("pair", tokenizer.fingerprint, tokenizer.special.vocab_size, settings, totals)
        manifest.save(self._folder)
        return manifest

    def _keep_raw(self, split: str, source: Path, target: Path | None) -> None:
        lines = list(read_pairs(source, target))
        raw = self._folder / "raw"
        with disk_faults(raw):
            raw.mkdir(exist_ok=True)
        for side, name in enumerate(_SIDES[: 1 if target is None else 2]):
            write_atomic(raw / f"{split}.{name}", "".join(f"{pair[side]}\n" for pair in lines).encode())

    def _split(self, split: str, source: Path, target: Path) -> tuple[SplitTotals, dict[str, int]]:
        encode = _Encoder(self._tokenizer, self._settings.limits)
        counts: Counter[str] = Counter()
        parts: list[dict[str, Ragged]] = []
        for part, done in ordered_map(
            encode, portions(read_pairs(source, target), _UNIT_PAIRS), self._processes
        ):
            parts.append(part.samples)
            counts.update(part.counts)
            self._show(split, done)
        samples = joined(parts)
        if not len(samples["target"]):
            raise DataError(
                f"no pair of {split} has text on both sides", f"{source} and {target}", "look at the files"
            )
        settings = self._settings
        vocab_size = self._tokenizer.special.vocab_size
        packing = PairPacking(settings.samples_per_member, settings.members_per_shard, vocab_size)
        return write_split(self._folder / split, samples, packing), dict(counts)


class _Encoder:
    """Pairs to tokens, cut to the limits."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = (limits.source, limits.target)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> EncodedPairs:
        counts: Counter[str] = Counter(lines=len(pairs))
        sides = [self._side(side, [pair[side] for pair in pairs], counts) for side in (0, 1)]
        kept = [number for number, rows in enumerate(zip(*sides, strict=True)) if all(rows)]
        counts["kept"] = len(kept)
        counts["with_an_empty_side"] = len(pairs) - len(kept)
        return EncodedPairs(paired(sides, kept, self._tokenizer.special.vocab_size), counts)

    def _side(self, side: int, texts: list[str], counts: Counter[str]) -> list[list[int]]:
        name, limit = STREAMS[side], self._limits[side]
        rows = []
        for row in self._tokenizer.encode_batch(texts):
            plain = plain_ids(row, self._tokenizer.special)
            counts[f"{name}_special_symbols_removed"] += len(row) - len(plain)
            counts[f"{name}_cut"] += len(plain) > limit
            counts[f"{name}_tokens_cut"] += max(0, len(plain) - limit)
            counts[f"{name}_tokens"] += min(len(plain), limit)
            rows.append(plain[:limit])
        return rows
