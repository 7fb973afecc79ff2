"""Sample numbers in, batches out: a webdataset pipeline whose stages read, check, mask and collate.

What goes from stage to stage is one step as a dict, as webdataset's samples are:

- `__key__`, `step` (number of the update; None outside of training) and `parts`, the (epochs, sample numbers)
  of each micro-batch, from the source stage; `epochs` and `ids` hold them in one row;
- `target`, and for pairs `source`: the samples' tokens without bos and eos (`Ragged`), from `read`;
- `views`: both sides with bos and eos, and the masks, from `mask`;
- `batches`: the micro-batches, from `collate`.

Stages of the user stand between `read` and `check`. The pipeline runs in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from janus_ds.batch import Ragged, SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.data.masking.collate import Collator, RowKinds
from janus_ds.data.masking.counter_rng import SampleKeys
from janus_ds.data.masking.views import make_views
from janus_ds.data.stream.open_dataset import SplitPlace, check_task
from janus_ds.data.stream.source import SampleSource
from janus_ds.errors import ConfigError, DataError

Array = NDArray[Any]
Step = dict[str, Any]
Stage = Callable[[Iterator[Step]], Iterator[Step]]
"""As `webdataset.map(function)` gives it."""

_CACHED_MEMBERS = 16


class BatchMaker:
    """Turns samples of one split into batches for one run; a function of its arguments alone.

    Holds no tokenizer. May be pickled (if the stages can be) and used after a fork.

    Args:
        split: DATA/train or DATA/valid; or the opened places that are mixed.
        config: resolved (`config.presets.resolve`).
        stages: of the user, after reading. A stage hands on each step with as many samples as it came with,
            and is a function of the step: of `ids` and `epochs`, not of a generator of its own.

    Raises:
        DataError: no index, or a damaged one; ConfigError: data of the other task.
    """

    def __init__(
        self,
        split: Path | Sequence[SplitPlace],
        config: RunConfig,
        special: SpecialTokens,
        stages: Sequence[Stage] = (),
    ) -> None:
        self.config = config
        self._stages, self._special = stages, special
        self._replaces = config.data.on_damage == "quarantine"
        places = 1 if isinstance(split, Path) else len(split)
        cached = 2 * config.data.shuffle_window * places + _CACHED_MEMBERS
        self.source = SampleSource(split, cached, config.data.max_damage if self._replaces else None)
        task = "pair" if "source" in self.source.streams else "denoise"
        check_task(task, config.data.task, self.source.name)
        self._collator = Collator(
            special,
            config.objective,
            config.model.length_classes or config.model.max_target_positions,
            config.data.pad_multiple,
            config.model.max_source_positions,
        )

    @property
    def kinds(self) -> RowKinds:
        """Which decoder rows the batches have."""
        return self._collator.kinds

    def pipeline(self, source: Callable[[], Iterator[Step]]) -> wds.DataPipeline:
        """All stages, to be iterated over.

        Args:
            source: the source stage; gives `__key__`, `step` and `parts`.

        Raises:
            DataError: while iterating: damaged data, or a sample that is empty, too long or of another
                vocabulary; names shard, member and sample.
        """
        ours = (wds.map(stage) for stage in (self.check, self.mask, self.collate))
        return wds.DataPipeline(source, wds.map(self.read), *self._stages, *ours)

    def make(self, *parts: tuple[Array, Array]) -> Step:
        """One step by itself, outside of training, with all that the stages add to it.

        Args:
            parts: (epochs, sample numbers) of each micro-batch, int64.

        Raises:
            ConfigError: a stage has left it out.
        """
        step: Step = {"__key__": "samples apart", "step": None, "parts": parts}
        made: Step | None = next(iter(self.pipeline(lambda: iter([step]))), None)
        if made is None:
            raise left_out(step["__key__"])
        return made

    def read(self, step: Step) -> Step:
        """First stage: the samples, those in damaged members replaced if the run wants it."""
        epochs, ids = (np.concatenate(column) for column in zip(*step["parts"], strict=True))
        ids, samples = self.source.read_whole(ids) if self._replaces else (ids, self.source.read(ids))
        return {**step, "epochs": epochs, "ids": ids, **samples}

    def check(self, step: Step) -> Step:
        """After the user's stages: each sample fits the run."""
        ids = step["ids"]
        for stream in self.source.streams:
            rows = step.get(stream)
            if not isinstance(rows, Ragged) or len(rows) != len(ids):
                raise ConfigError(
                    f"a stage of the pipeline left {stream!r} without the step's {len(ids)} samples",
                    f"the stages given to the training program, {step['__key__']}",
                    f"hand on a Ragged of as many rows, such as step[{stream!r}].map(function)",
                )
            values = rows.values
            if len(values) and not 0 <= values.min() <= values.max() < self._special.vocab_size:
                worst = int(np.argmax((values < 0) | (values >= self._special.vocab_size)))
                place = int(np.searchsorted(rows.offsets, worst, side="right")) - 1
                raise DataError(
                    f"the {stream} has token {int(values[worst])}, the tokenizer has "
                    f"{self._special.vocab_size} symbols",
                    self.source.origin(int(ids[place])),
                    "use the tokenizer that the data was prepared with",
                )
        inner_B = step["target"].lengths
        self._refuse_targets(ids, inner_B)
        if (inner_B == 0).any():
            raise DataError(
                "the sample has no target token",
                self.source.origin(int(ids[np.argmin(inner_B)])),
                "prepare the data again without empty lines",
            )
        return step

    def mask(self, step: Step) -> Step:
        """Source, target and mask of each sample; refuses sources beyond the encoder's position table.

        In pretraining, masks of spans without tokens may make a source longer than its target: those that the
        table has no room for are left out, so that no draw can end a run.
        """
        config, ids = self.config, step["ids"]
        samples = {stream: step[stream] for stream in self.source.streams}
        keys = SampleKeys(config.train.seed, step["epochs"], ids)
        most = config.model.max_source_positions - 2
        views = make_views(config.masking, self._special, keys, samples, most)
        self._refuse_sources(ids, views.source.lengths)
        return {**step, "views": views}

    def collate(self, step: Step) -> Step:
        """Last stage: the micro-batches."""
        batches, start = [], 0
        for _, part in step["parts"]:
            stop = start + len(part)
            batches.append(self._collator(step["views"].slice(start, stop), step["ids"][start:stop]))
            start = stop
        return {**step, "batches": batches}

    def refuse_long(self, inner_N: Array, source_N: Array) -> None:
        """Refuse, before the first step, samples that the run has no room for, unless stages may cut them.

        Args:
            inner_N: target tokens of all samples of one source, from the index.
            source_N: its source tokens, with bos and eos; of pairs.

        Raises:
            DataError: names the longest.
        """
        if not self._stages:
            ids = np.arange(len(inner_N))
            self._refuse_targets(ids, inner_N)
            if "source" in self.source.streams:
                self._refuse_sources(ids, source_N)

    def _refuse_targets(self, ids: Array, inner_B: Array) -> None:
        self._refuse(ids, inner_B, self.config.data.block_tokens, "target tokens", "data.block_tokens")
        limit, key = self.config.model.max_target_positions, "model.max_target_positions"
        self._refuse(ids, inner_B + 2, limit, "target tokens with bos and eos", key)

    def _refuse_sources(self, ids: Array, length_B: Array) -> None:
        limit, key = self.config.model.max_source_positions, "model.max_source_positions"
        self._refuse(ids, length_B, limit, "source tokens with bos and eos", key)

    def _refuse(self, ids: Array, length_B: Array, limit: int, what: str, key: str) -> None:
        worst = int(np.argmax(length_B))
        if length_B[worst] > limit:
            raise DataError(
                f"the sample has {length_B[worst]} {what}, {key} allows {limit}",
                self.source.origin(int(ids[worst])),
                f"raise {key}, or prepare the data again with shorter blocks",
            )


def left_out(key: str) -> ConfigError:
    """The error about a step that a stage of the user has not handed on."""
    return ConfigError(
        "a stage of the pipeline did not hand on a step",
        f"the stages given to the training program, {key}",
        "let stages change samples, not leave out steps: the order of the data is counted in them",
    )


def names_of(stages: Sequence[Stage]) -> list[str]:
    """What stages are called, for the identity of a run: `map(function)`."""

    def name(part: Any) -> str:
        return str(getattr(part, "__qualname__", type(part).__qualname__))

    found = []
    for stage in stages:
        inner = [name(part) for part in getattr(stage, "args", ())]
        inner += [f"{key}={name(part)}" for key, part in getattr(stage, "kw", {}).items()]
        found.append(f"{name(getattr(stage, 'f', stage)).strip('_')}({', '.join(inner)})")
    return found
