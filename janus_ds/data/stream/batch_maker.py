"""Sample numbers in, batches out: read, check, mask, collate. Runs in the loader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.batch import SpecialTokens, TwoStreamBatch
from janus_ds.config.schema import RunConfig
from janus_ds.data.masking.collate import Collator, RowKinds
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.masking.views import Views, make_views
from janus_ds.data.stream.open_dataset import SplitPlace
from janus_ds.data.stream.source import MixedSource, SampleSource
from janus_ds.errors import ConfigError, DataError

Array = NDArray[Any]

_CACHED_MEMBERS = 16


class BatchMaker:
    """Turns samples of one split into batches for one run; a function of its arguments alone.

    Holds no tokenizer. May be pickled and used after a fork.

    Args:
        split: DATA/train or DATA/valid; or the opened places that are mixed.
        config: resolved (`config.presets.resolve`).
        special: special symbols of the data's tokenizer.

    Raises:
        DataError: no index, or a damaged one; ConfigError: data of the other task.
    """

    def __init__(self, split: Path | Sequence[SplitPlace], config: RunConfig, special: SpecialTokens) -> None:
        self.config = config
        places = [SplitPlace.of(split)] if isinstance(split, Path) else split
        cached = 2 * config.data.shuffle_window + _CACHED_MEMBERS
        max_damage = config.data.max_damage if config.data.on_damage == "quarantine" else None
        parts = [SampleSource(place, cached, max_damage) for place in places]
        self.source = MixedSource(parts, [place.weight for place in places])
        task = "pair" if "source" in self.source.streams else "denoise"
        if task != config.data.task:
            raise ConfigError(
                f"the data is prepared for task {task!r}, the run asks for {config.data.task!r}",
                f"data.task, {self.source.name}",
                "set data.task to what the data is, or give other data",
            )
        self._special = special
        classes = config.model.length_classes or config.model.max_target_positions
        self._collate = Collator(
            special,
            config.objective,
            classes,
            config.data.pad_multiple,
            config.model.max_source_positions,
            config.data.pack_rows,
        )

    @property
    def kinds(self) -> RowKinds:
        """Which decoder rows the batches have."""
        return self._collate.kinds

    def read(self, ids: Array) -> dict[str, Ragged]:
        """The samples with these numbers by stream, checked.

        Raises:
            DataError: damaged data, or a sample that is empty, too long or of another vocabulary; names
                shard, member and sample.
        """
        samples = self.source.read(ids)
        self._check(ids, samples)
        return samples

    def mask(self, epochs: Array, ids: Array, samples: dict[str, Ragged]) -> Views:
        """Source, target and mask of samples that were read.

        Raises:
            DataError: a source that does not fit the encoder's position table.
        """
        seed = self.config.train.seed
        views = make_views(self.config.masking, self._special, seed, epochs, ids, samples)
        limit, key = self.config.model.max_source_positions, "model.max_source_positions"
        self._refuse(ids, views.source.lengths, limit, "source tokens with bos and eos", key)
        return views

    def views(self, epochs: Array, ids: Array) -> Views:
        """Read and mask samples.

        Args:
            epochs, ids: int64, shape (B,).

        Raises:
            DataError: as from `read` and `mask`.
        """
        return self.mask(epochs, ids, self.read(ids))

    def collate(self, views: Views, ids: Array) -> TwoStreamBatch:
        """One batch of views."""
        return self._collate(views, ids)

    def batches(self, epochs: Array, ids: Array) -> list[TwoStreamBatch]:
        """Micro-batches.

        Args:
            epochs, ids: int64, shape (micro-batches, samples of each).
        """
        return self.micro_batches(list(zip(epochs, ids, strict=True)))

    def micro_batches(self, parts: Sequence[tuple[Array, Array]]) -> list[TwoStreamBatch]:
        """As :meth:`batches`, of any sizes.

        Args:
            parts: (epochs, ids) of each micro-batch, int64.
        """
        epochs, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        if self.config.data.on_damage == "quarantine":
            ids = self.source.sound(ids)
        views = self.views(epochs, ids)
        ends = np.cumsum([len(part) for _, part in parts]).tolist()
        starts = [0, *ends[:-1]]
        return [self._collate(views.slice(a, b), ids[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _check(self, ids: Array, samples: dict[str, Ragged]) -> None:
        inner_B = samples["target"].lengths
        data, model = self.config.data, self.config.model
        self._refuse(ids, inner_B, data.block_tokens, "target tokens", "data.block_tokens")
        self._refuse(
            ids,
            inner_B + 2,
            model.max_target_positions,
            "target tokens with bos and eos",
            "model.max_target_positions",
        )
        if (inner_B == 0).any():
            raise DataError(
                "the sample has no target token",
                self.source.origin(int(ids[np.argmin(inner_B)])),
                "prepare the data again without empty lines",
            )
        for stream, rows in samples.items():
            if len(rows.values) and int(rows.values.max()) >= self._special.vocab_size:
                place = int(np.searchsorted(rows.offsets, np.argmax(rows.values), side="right")) - 1
                raise DataError(
                    f"the {stream} has token {int(rows.values.max())}, the tokenizer has "
                    f"{self._special.vocab_size} symbols",
                    self.source.origin(int(ids[place])),
                    "use the tokenizer that the data was prepared with",
                )

    def _refuse(self, ids: Array, length_B: Array, limit: int, what: str, key: str) -> None:
        worst = int(np.argmax(length_B))
        if length_B[worst] > limit:
            raise DataError(
                f"the sample has {length_B[worst]} {what}, {key} allows {limit}",
                self.source.origin(int(ids[worst])),
                f"raise {key}, or prepare the data again with shorter blocks",
            )
