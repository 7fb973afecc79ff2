"""Data directories of pairs: parallel text for translation (task nmt), and what all pairs have in common.

Training pairs are cleaned, which is counted, and put into a mixed order, so that any run of members is a
fair sample. Held-out pairs are never cleaned: their text is kept as given in `raw/` for scoring, and only
what no loss can be computed on (an empty side, a side too long) is left out of their shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from janus_ds.batch import SpecialTokens
from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.prepare.blocks import hash_sample
from janus_ds.data.prepare.journal import SplitState, SplitWriter, finished_manifest
from janus_ds.data.prepare.pair_files import PairCleaner, PairFiles, pair_key
from janus_ds.data.prepare.pool import ordered_map
from janus_ds.data.prepare.settings import PairSettings
from janus_ds.data.stream.index import MANIFEST_NAME, Manifest, SplitTotals
from janus_ds.data.stream.shards import Packing, token_dtype
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from janus_ds.data.text.word_tokenizer import train_words
from janus_ds.errors import DataError
from janus_ds.io import atomic_dir, disk_faults, write_atomic

__all__ = [
    "STREAMS",
    "EncodedPairs",
    "PairPacking",
    "PairReport",
    "build_whole",
    "joined",
    "paired",
    "plain_ids",
    "portions",
    "prepare_pairs",
    "structural",
    "write_split",
]


@dataclass(frozen=True)
class PairReport:
    """What a preparation of pairs made."""

    output: Path
    manifest: Manifest
    already_whole: bool = False

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What was read, cut or left out and why, by split."""
        return dict(self.manifest.settings["counts"])


def build_whole(output: Path, request: dict[str, Any], build: Callable[[Path], Manifest]) -> PairReport:
    """Make `output`, beside its place and renamed into it when whole; return at once where it is there.

    Args:
        output: the data directory; must be new, empty, or of the same request.
        request: what decides the bytes, as JSON; kept in the manifest's settings.
        build: fills the folder that it is given and saves the manifest.

    Raises:
        DataError: the output folder holds something else.
        ResourceError: full disk or missing permission.
    """
    if (output / MANIFEST_NAME).is_file():
        return PairReport(output, finished_manifest(output, request), already_whole=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError("the output is not an empty folder", str(output), "choose another output folder")
    with disk_faults(output), atomic_dir(output) as building:
        manifest = build(building)
    return PairReport(output, manifest)


Pair = tuple[str, str]


def portions(pairs: Iterable[Pair], size: int) -> Iterator[tuple[Sequence[Pair], int]]:
    """Pairs in portions of `size`, each with the number of pairs up to its end; at least one portion."""
    portion: list[Pair] = []
    done = 0
    for pair in pairs:
        portion.append(pair)
        if len(portion) == size:
            done += size
            yield portion, done
            portion = []
    if portion or not done:
        yield portion, done + len(portion)


def structural(special: SpecialTokens) -> frozenset[int]:
    """Symbols that text may spell but a sample must not hold: an eos inside would mean the end."""
    return frozenset((special.bos, special.pad, special.eos, special.mask))


def plain_ids(ids: Sequence[int], special: SpecialTokens) -> list[int]:
    """Tokens of a text without such symbols."""
    dropped = structural(special)
    return [id_ for id_ in ids if id_ not in dropped]


STREAMS = ("source", "target")
"""The two sides of a sample, in the order in which pairs hold them."""


@dataclass(frozen=True)
class EncodedPairs:
    """A portion of pairs as token rows, and what was counted on the way."""

    samples: dict[str, Ragged]
    counts: Counter[str]


@dataclass(frozen=True)
class PairPacking:
    """How many samples go where, and the vocabulary that decides how wide a token is stored."""

    samples_per_member: int
    members_per_shard: int
    vocab_size: int


def paired(sides: Sequence[Sequence[list[int]]], kept: Sequence[int], vocab_size: int) -> dict[str, Ragged]:
    """The pairs with these numbers, of a row of tokens for each pair on each side."""
    dtype = np.dtype(token_dtype(vocab_size))
    return {
        name: Ragged.from_rows([rows[i] for i in kept], dtype)
        for name, rows in zip(STREAMS, sides, strict=True)
    }


def joined(parts: Sequence[dict[str, Ragged]]) -> dict[str, Ragged]:
    """Portions put together."""
    return {name: Ragged.concatenate([part[name] for part in parts]) for name in STREAMS}


def write_split(folder: Path, samples: dict[str, Ragged], packing: PairPacking) -> SplitTotals:
    """Write shards and index; training pairs are shuffled once, so that neighbours have nothing in common.

    Args:
        folder: of the split; its name is the split's.
        samples: as :func:`joined` gives them.
        packing: how.
    """
    if folder.name == "train":
        order = shuffled(keys(0, 0, 0, Stream.MEMBER_ORDER), len(samples["target"]))
        samples = {name: rows.take(order) for name, rows in samples.items()}
    form = Packing(token_dtype(packing.vocab_size), packing.samples_per_member, packing.members_per_shard)
    writer = SplitWriter(folder, form, SplitState())
    writer.add(samples)
    index, sha256 = writer.finish(STREAMS)
    return SplitTotals(len(index.shards), index.samples, index.tokens, sha256)


_UNIT_PAIRS = 4000

Show = Callable[[str, int], None]
"""Called with the stage and the number of pairs done in it."""


def prepare_pairs(
    files: Mapping[str, Sequence[PairFiles]],
    output: Path,
    settings: PairSettings,
    processes: int = 1,
    show: Show | None = None,
) -> PairReport:
    """Make a data directory of parallel text; it appears whole or not at all.

    Args:
        files: by split: train, and any of valid and test.
        output: the data directory; must be new, empty, or of the same preparation.
        settings: what is made.
        processes: processes that tokenise; changes nothing.
        show: called now and then.

    Raises:
        ConfigError: settings that cannot be meant.
        DataError: missing, damaged, empty or unequal files; text that is not UTF-8; an output folder that
            holds something else.
        ResourceError: full disk, missing permission, a killed worker.
    """
    settings.check()
    request = _request(files, settings)

    def build(building: Path) -> Manifest:
        job = _Job(files, building, settings, processes, show or (lambda stage, pairs: None))
        return job.run(request)

    return build_whole(output, request, build)


def _request(files: Mapping[str, Sequence[PairFiles]], settings: PairSettings) -> dict[str, Any]:
    """What decides the result, as JSON."""
    return {
        "settings": settings.to_json(),
        "inputs": {
            split: [[path.name, path.stat().st_size] for pair in pairs for path in (pair.source, pair.target)]
            for split, pairs in files.items()
        },
        "tokenizer": load_tokenizer(Path(settings.tokenizer)).fingerprint if settings.given else None,
    }


class _Job:
    """One call of :func:`prepare_pairs`."""

    def __init__(
        self,
        files: Mapping[str, Sequence[PairFiles]],
        folder: Path,
        settings: PairSettings,
        processes: int,
        show: Show,
    ) -> None:
        self._files = files
        self._folder = folder
        self._settings = settings
        self._processes = processes
        self._show = show
        self._held_out: set[bytes] = set()

    def run(self, request: dict[str, Any]) -> Manifest:
        for split in ("valid", "test"):
            self._keep_raw(split)
        tokenizer = self._tokenizer()
        tokenizer.save(self._folder / "tokenizer")
        counts, totals = {}, {}
        for split in self._files:
            totals[split], counts[split] = self._split(split, tokenizer)
        settings = {"request": request, "counts": counts, "lowercase": self._settings.lowercase}
        settings["languages"] = {
            "source": self._settings.languages.source,
            "target": self._settings.languages.target,
        }
        manifest = Manifest(
            "pair", tokenizer.fingerprint, tokenizer.special.vocab_size, settings, dict(totals)
        )
        manifest.save(self._folder)
        return manifest

    def _pairs(self, split: str) -> Iterator[tuple[str, str]]:
        lower = self._settings.lowercase
        for files in self._files.get(split, ()):
            for source, target in files.read():
                yield (source.lower(), target.lower()) if lower else (source, target)

    def _keep_raw(self, split: str) -> None:
        """The text of a held-out split, as given, for scoring."""
        if split not in self._files:
            return
        lines = [pair for files in self._files[split] for pair in files.read()]
        folder = self._folder / "raw"
        with disk_faults(folder):
            folder.mkdir(exist_ok=True)
        languages = (self._settings.languages.source, self._settings.languages.target)
        for side, language in enumerate(languages):
            text = "".join(f"{pair[side]}\n" for pair in lines)
            write_atomic(folder / f"{split}.{language}", text.encode())
        self._held_out |= {pair_key(*pair) for pair in self._pairs(split)}

    def _tokenizer(self) -> Tokenizer:
        settings = self._settings
        if settings.given:
            return load_tokenizer(Path(settings.tokenizer))
        self._show("reading text for the tokenizer", 0)
        lines = (text for pair in self._cleaned(Counter()) for text in pair)
        if settings.trained_kind is None:
            return train_words(lines)
        sample = hash_sample(lines, settings.tokenizer_sample_mb * 1_000_000)
        if not sample:
            self._refuse_nothing_left()
        self._show("training the tokenizer", 0)
        return train_sentencepiece(sample, settings.trained_kind, settings.vocab_size)

    def _cleaned(self, counts: Counter[str]) -> Iterator[tuple[str, str]]:
        cleaner = PairCleaner(self._settings, self._held_out, counts)
        return (pair for pair in self._pairs("train") if cleaner.keeps(*pair))

    def _split(self, split: str, tokenizer: Tokenizer) -> tuple[SplitTotals, dict[str, int]]:
        counts: Counter[str] = Counter()
        pairs = self._cleaned(counts) if split == "train" else _counted(self._pairs(split), counts)
        encoder = _Encoder(tokenizer, self._settings.max_tokens)
        parts: list[dict[str, Ragged]] = []
        for part, more in ordered_map(encoder, portions(pairs, _UNIT_PAIRS), self._processes):
            counts.update(part.counts)
            parts.append(part.samples)
            self._show(f"writing {split}", more)
        samples = joined(parts)
        if not len(samples["target"]):
            self._refuse_nothing_left(split)
        settings = self._settings
        packing = PairPacking(
            settings.samples_per_member, settings.members_per_shard, tokenizer.special.vocab_size
        )
        return write_split(self._folder / split, samples, packing), dict(counts)

    def _refuse_nothing_left(self, split: str = "train") -> None:
        places = [str(path) for pair in self._files[split] for path in (pair.source, pair.target)]
        raise DataError(
            f"no pair is left for {split}: all are empty, too long or too unequal",
            ", ".join(places[:4]),
            "look at the files, or raise --max-tokens and --max-ratio",
        )


class _Encoder:
    """Pairs to tokens; leaves out what cannot be a sample."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._forbidden = structural(tokenizer.special)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> EncodedPairs:
        sides = [self._tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1)]
        counts: Counter[str] = Counter()
        kept = []
        for number, rows in enumerate(zip(*sides, strict=True)):
            fault = self._fault(rows)
            counts[fault or "kept"] += 1
            if fault is None:
                kept.append(number)
        samples = paired(sides, kept, self._tokenizer.special.vocab_size)
        for name, ragged in samples.items():
            counts[f"{name}_tokens"] += len(ragged.values)
            counts["unknown_tokens"] += int(np.count_nonzero(ragged.values == self._tokenizer.special.unk))
        return EncodedPairs(samples, counts)

    def _fault(self, rows: tuple[list[int], ...]) -> str | None:
        if not all(rows):
            return "empty"
        if max(map(len, rows)) > self._max_tokens:
            return "too_long"
        # An eos inside a sentence would mean its end.
        if not all(self._forbidden.isdisjoint(row) for row in rows):
            return "with_special_symbols"
        return None


def _counted(pairs: Iterator[tuple[str, str]], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        counts["lines"] += 1
        yield pair
