"""Data directories of pairs: parallel text for translation (task nmt), and the tasks of GLGE.

Training pairs are put into a mixed order, so that any run of members is a fair sample. Of parallel text,
training pairs are cleaned and those with a side too long left out; of GLGE (section 5.2 of the paper) long
sides are cut; both are counted. The held-out text stays as given in `raw/` for scoring, and only what no loss
can be computed on is left out of its shards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from janus_ds.batch import Ragged
from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.data.prepare.pair_files import Pair, PairFiles, find_files, pair_key, read_pairs
from janus_ds.data.prepare.settings import GlgeSettings, Limits, PairSettings
from janus_ds.data.prepare.train_tokenizer import train_words, trained_tokenizer
from janus_ds.data.prepare.writing import PrepareReport, SplitWriter, finished_manifest, ordered_map, portions
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.data.stream.shards import ShardFormat, token_dtype
from janus_ds.data.text.text_files import TextFile
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer, plain_ids, structural
from janus_ds.errors import DataError
from janus_ds.io import atomic_dir, atomic_file, disk_faults

_STREAMS = ("source", "target")
_GLGE_SIDES = ("src", "tgt")
_UNIT_PAIRS = 4000
_SHORT_WORDS = 10
"""Where the longer side has fewer words than this, the ratio says nothing."""
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4}")
"""Chinese and Japanese; Thai, Lao, Burmese and Khmer."""

Show = Callable[[str, int], None]
"""Called with the stage and the number of pairs done in it."""


def prepare_pairs(
    files: Mapping[str, Sequence[PairFiles]],
    output: Path,
    settings: PairSettings,
    processes: int = 1,
    show: Show | None = None,
) -> PrepareReport:
    """Make a data directory of parallel text; it appears whole or not at all.

    Args:
        files: by split: train, and any of valid and test.
        output: the data directory; must be new, empty, or of the same preparation.
        processes: processes that tokenise; changes nothing.

    Raises:
        ConfigError: settings that cannot be meant.
        DataError: missing, damaged, empty or unequal files; text that is not UTF-8; an output folder that
            holds something else.
        ResourceError: full disk, missing permission, a killed worker.
    """
    settings.check()
    request = {
        "settings": settings.to_json(),
        "inputs": {
            split: [
                [*_known_by(path), *(["/".join(side)] if side else [])]
                for pair in pairs
                for path, side in zip((pair.source, pair.target), pair.fields, strict=True)
            ]
            for split, pairs in files.items()
        },
        "tokenizer": load_tokenizer(Path(settings.tokenizer)).fingerprint if settings.given else None,
    }

    def build(folder: Path) -> Manifest:
        text = _ParallelText(files, settings)
        builder = _Builder(folder, settings, processes, show)
        languages = (settings.languages.source, settings.languages.target)
        for split in ("valid", "test"):
            if split in files:
                builder.keep_raw(split, (pair for part in files[split] for pair in part.read()), languages)
        tokenizer = text.tokenizer(builder.show)
        for split in files:
            counts: Counter[str] = Counter()
            encode = partial(_leaving_out, tokenizer, settings.max_tokens)
            builder.write(split, text.chosen(split, counts), encode, counts, text.nothing_left(split))
        return builder.finish(tokenizer, request, languages, settings.lowercase)

    return _build_whole(output, request, build)


def prepare_glge(
    folder: Path, output: Path, settings: GlgeSettings, processes: int = 1, show: Show | None = None
) -> PrepareReport:
    """Make a data directory of one task; it appears whole or not at all.

    Args:
        folder: the task's folder in GLGE's layout (`pair_files.find_files`).
    """
    settings.check()
    tokenizer = load_tokenizer(settings.tokenizer)
    files = find_files(folder)
    request = {
        "settings": {**asdict(settings), "tokenizer": tokenizer.fingerprint},
        "inputs": {s: [_known_by(p) for p in pair if p] for s, pair in files.items()},
    }

    def build(building: Path) -> Manifest:
        builder = _Builder(building, settings, processes, show)
        for split, (source, target) in files.items():
            if split != "train":
                names = _GLGE_SIDES[: 1 if target is None else 2]
                builder.keep_raw(split, read_pairs(source, target), names)
            if target is not None:
                what, where = f"no pair of {split} has text on both sides", f"{source} and {target}"
                nothing = DataError(what, where, "look at the files")
                encode = partial(_cutting, tokenizer, settings.limits)
                builder.write(split, read_pairs(source, target), encode, Counter(), nothing)
        return builder.finish(tokenizer, request, _GLGE_SIDES, lowercase=False)

    return _build_whole(output, request, build)


def _known_by(path: Path) -> list[str | int]:
    """What is remembered of an input file."""
    file = TextFile(path)
    return [file.name, file.size]


def _build_whole(output: Path, request: dict[str, Any], build: Callable[[Path], Manifest]) -> PrepareReport:
    """Build beside the output and rename; nothing to do where it is there already."""
    manifest = finished_manifest(output, request)
    if manifest is not None:
        return PrepareReport(output, manifest, already_whole=True)
    with disk_faults(output), atomic_dir(output) as building:
        return PrepareReport(output, build(building))


_Encoded = tuple[dict[str, Ragged], Counter[str]]
"""A portion of pairs as token rows, and what was counted on the way."""


class _Builder:
    """Fills one data directory: raw text, shards and manifest."""

    def __init__(
        self, folder: Path, settings: PairSettings | GlgeSettings, processes: int, show: Show | None
    ) -> None:
        self._folder, self._settings, self._processes = folder, settings, processes
        self.show = show or (lambda stage, pairs: None)
        self._totals: dict[str, SplitTotals] = {}
        self._counts: dict[str, dict[str, int]] = {}

    def keep_raw(self, split: str, pairs: Iterable[Pair], names: Sequence[str]) -> None:
        """The text of a held-out split, as given, for scoring; a name for each side that is there."""
        raw = self._folder / "raw"
        with disk_faults(self._folder), ExitStack() as opened:
            raw.mkdir(exist_ok=True)
            files = [opened.enter_context(atomic_file(raw / f"{split}.{name}")) for name in names]
            for pair in pairs:
                for file, text in zip(files, pair, strict=False):
                    file.write(f"{text}\n".encode())

    def write(
        self,
        split: str,
        pairs: Iterable[Pair],
        encode: Callable[[Sequence[Pair]], _Encoded],
        counts: Counter[str],
        nothing: DataError,
    ) -> None:
        """Encode a split and write its shards and index; training pairs are shuffled once.

        Args:
            encode: turns portions into tokens; called in other processes.
            counts: what was counted of the pairs so far; counts of `encode` are added.
            nothing: raised where no pair is left.
        """
        parts: list[dict[str, Ragged]] = []
        units = portions(((pair, n) for n, pair in enumerate(pairs, 1)), lambda _: 1, _UNIT_PAIRS)
        for (part, counted), done in ordered_map(encode, units, self._processes):
            counts.update(counted)
            parts.append(part)
            self.show(f"writing {split}", done)
        if not any(len(part["target"]) for part in parts):
            raise nothing
        samples = {name: Ragged.concatenate([part[name] for part in parts]) for name in _STREAMS}
        if split == "train":
            order = shuffled(keys(0, 0, 0, Stream.MEMBER_ORDER), len(samples["target"]))
            samples = {name: rows.take(order) for name, rows in samples.items()}
        dtype = samples["target"].values.dtype.name
        packing = ShardFormat(dtype, self._settings.samples_per_member, self._settings.members_per_shard)
        writer = SplitWriter(self._folder / split, packing)
        writer.add(samples)
        self._totals[split] = writer.finish(_STREAMS)
        self._counts[split] = dict(counts)

    def finish(
        self, tokenizer: Tokenizer, request: dict[str, Any], languages: Sequence[str], lowercase: bool
    ) -> Manifest:
        """Save the tokenizer and the manifest."""
        tokenizer.save(self._folder / "tokenizer")
        settings = {
            "request": request,
            "counts": self._counts,
            "lowercase": lowercase,
            "languages": dict(zip(_STREAMS, languages, strict=True)),
        }
        manifest = Manifest(
            "pair", tokenizer.fingerprint, tokenizer.special.vocab_size, settings, self._totals
        )
        manifest.save(self._folder)
        return manifest


class _ParallelText:
    """The pairs of each split, cleaned for training, and the tokenizer made of them."""

    def __init__(self, files: Mapping[str, Sequence[PairFiles]], settings: PairSettings) -> None:
        self._files, self._settings = files, settings
        self._held_out = {pair_key(*pair) for split in ("valid", "test") for pair in self._pairs(split)}

    def _pairs(self, split: str) -> Iterator[Pair]:
        lower = self._settings.lowercase
        for files in self._files.get(split, ()):
            for source, target in files.read():
                yield (source.lower(), target.lower()) if lower else (source, target)

    def chosen(self, split: str, counts: Counter[str]) -> Iterator[Pair]:
        """Pairs for the shards: of train those that are clean."""
        if split == "train":
            yield from _clean(self._pairs(split), self._settings, self._held_out, counts)
            return
        for pair in self._pairs(split):
            counts["lines"] += 1
            yield pair

    def tokenizer(self, show: Show) -> Tokenizer:
        """The given one, or one trained on both sides of the training pairs."""
        settings = self._settings
        if settings.given:
            return load_tokenizer(Path(settings.tokenizer))
        show("reading text for the tokenizer", 0)
        lines = (text for pair in self.chosen("train", Counter()) for text in pair)
        if settings.trained_kind is None:
            return train_words(lines)
        return trained_tokenizer(lines, settings, self.nothing_left("train"), lambda stage: show(stage, 0))

    def nothing_left(self, split: str) -> DataError:
        """The error of a split without pairs."""
        places = [str(path) for pair in self._files[split] for path in (pair.source, pair.target)]
        return DataError(
            f"no pair is left for {split}: all are empty, too long or too unequal",
            ", ".join(places[:4]),
            "look at the files, or raise --max-tokens and --max-ratio",
        )


def _words(text: str) -> int:
    """Words between spaces; where a script has none, each sign of Chinese and Japanese, and four letters."""
    if text.isascii():
        return len(text.split())
    return len(_UNSPACED.findall(text)) + len(_UNSPACED.sub(" ", text).split())


def _clean(
    pairs: Iterable[Pair], settings: PairSettings, held_out: Set[bytes], counts: Counter[str]
) -> Iterator[Pair]:
    """The pairs that are trained on.

    Args:
        held_out: keys of validation and test pairs: training pairs among them are counted, and kept.
        counts: what is read, left out ("empty", "too_unequal", "duplicates") and "also_held_out".
    """
    seen: set[bytes] = set()
    for source, target in pairs:
        counts["lines"] += 1
        key = pair_key(source, target)
        fewer, more = sorted((_words(source), _words(target)))
        if not source or not target:
            counts["empty"] += 1
        elif more >= _SHORT_WORDS and more > settings.max_ratio * fewer:
            counts["too_unequal"] += 1
        elif key in seen and settings.duplicates == "drop":
            counts["duplicates"] += 1
        else:
            seen.add(key)
            counts["also_held_out"] += key in held_out
            yield source, target


def _paired(sides: Sequence[Sequence[list[int]]], kept: Sequence[int], vocab_size: int) -> dict[str, Ragged]:
    """The pairs with these numbers, of a row of tokens for each pair on each side."""
    dtype = np.dtype(token_dtype(vocab_size))
    return {
        name: Ragged.from_rows([rows[i] for i in kept], dtype)
        for name, rows in zip(_STREAMS, sides, strict=True)
    }


def _leaving_out(tokenizer: Tokenizer, max_tokens: int, pairs: Sequence[Pair]) -> _Encoded:
    """Pairs to tokens; leaves out what cannot be a sample."""
    special, forbidden = tokenizer.special, structural(tokenizer.special)
    sides = [tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1)]
    counts: Counter[str] = Counter()
    kept = []
    for number, rows in enumerate(zip(*sides, strict=True)):
        if not all(rows):
            counts["empty"] += 1
        elif max(map(len, rows)) > max_tokens:
            counts["too_long"] += 1
        elif not all(forbidden.isdisjoint(row) for row in rows):
            # An eos inside a sentence would mean its end.
            counts["with_special_symbols"] += 1
        else:
            counts["kept"] += 1
            kept.append(number)
    samples = _paired(sides, kept, special.vocab_size)
    for name, ragged in samples.items():
        counts[f"{name}_tokens"] += len(ragged.values)
        counts["unknown_tokens"] += int(np.count_nonzero(ragged.values == special.unk))
    return samples, counts


def _cutting(tokenizer: Tokenizer, limits: Limits, pairs: Sequence[Pair]) -> _Encoded:
    """Pairs to tokens, cut to the limits."""
    counts: Counter[str] = Counter(lines=len(pairs))
    sides: list[list[list[int]]] = [[], []]
    for side, (name, limit) in enumerate(zip(_STREAMS, (limits.source, limits.target), strict=True)):
        for row in tokenizer.encode_batch([pair[side] for pair in pairs]):
            plain = plain_ids(row, tokenizer.special)
            counts[f"{name}_special_symbols_removed"] += len(row) - len(plain)
            counts[f"{name}_cut"] += len(plain) > limit
            counts[f"{name}_tokens_cut"] += max(0, len(plain) - limit)
            counts[f"{name}_tokens"] += min(len(plain), limit)
            sides[side].append(plain[:limit])
    kept = [number for number, rows in enumerate(zip(*sides, strict=True)) if all(rows)]
    counts["kept"] = len(kept)
    counts["with_an_empty_side"] = len(pairs) - len(kept)
    return _paired(sides, kept, tokenizer.special.vocab_size), counts
