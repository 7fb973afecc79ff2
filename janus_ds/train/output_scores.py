"""Scores of the validation set's outputs along a run: greedy AR, and NAR with a few iterations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from janus_ds.config.schema import RunConfig
from janus_ds.data.pair_encoding import plain_ids
from janus_ds.data.pair_text import PairText, held_out_text
from janus_ds.data.tokenizer import Tokenizer
from janus_ds.decode.generator import Generator, trained_modes
from janus_ds.decode.text import one_line
from janus_ds.errors import ConfigError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.layers import DenseLayers

__all__ = ["OutputScores", "scored_modes"]


def scored_modes(config: RunConfig) -> tuple[str, ...]:
    """Modes whose outputs the run scores.

    Raises:
        ConfigError: one of them is not trained.
    """
    asked = tuple(mode for mode in config.train.valid_bleu.split(",") if mode != "none")
    trained = trained_modes(config.objective)
    for mode in asked:
        if mode not in trained:
            raise ConfigError(
                f"the objective {config.objective.preset!r} does not train mode {mode!r}",
                f"train.valid_bleu: {config.train.valid_bleu}",
                f"set train.valid_bleu to {','.join(trained)}",
            )
    return asked


class _StoppedError(Exception):
    """Leaves a search between two batches."""


class OutputScores:
    """Decodes fixed sources with given weights and scores the outputs by the task's metric.

    A whole model of its own, since the engine's weights may be partitioned over ranks.

    Args:
        config: the resolved run.
        tokenizer: the run's tokenizer.
        text: sources and references.
        device: where to decode.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, text: PairText, device: torch.device) -> None:
        self._config = config
        self._tokenizer = tokenizer
        count = config.train.valid_bleu_samples or len(text.sources)
        self._sources = [tokenizer.encode(source) for source in text.sources[:count]]
        if text.longest_source is not None:
            # As the training sources were cut.
            longest = min(text.longest_source, config.model.max_source_positions - 2)
            self._sources = [plain_ids(row, tokenizer.special)[:longest] for row in self._sources]
        self._references = text.references[:count]
        self._device = device
        self._model: JanusModel | None = None
        self._modes = scored_modes(config)
        self._metric = VALIDATION_METRICS[config.train.valid_task]

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> OutputScores | None:
        """For the run's own validation text; None where no scores are asked for.

        Raises:
            ConfigError: a mode that is not trained; DataError: the text is missing.
        """
        if not scored_modes(config):
            return None
        text = held_out_text(Path(config.data.path or ""), "valid")
        return cls(config, tokenizer, text, device)

    def __call__(
        self, weights: Mapping[str, Tensor], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The metric of `train.valid_task` by mode, in percent; None where `stop` was true after a batch."""
        special = self._tokenizer.special
        if self._model is None:
            self._model = JanusModel(self._config.model, special, DenseLayers()).to(self._device)
        self._model.load_state_dict(dict(weights))
        try:
            return {mode: self._score(self._model, mode, stop) for mode in self._modes}
        except _StoppedError:
            return None

    def _score(self, model: JanusModel, mode: str, stop: Callable[[], bool]) -> float:
        def after_batch(done: int, count: int) -> None:
            if stop():
                raise _StoppedError

        config, train = self._config, self._config.train
        decode = replace(config.decode, mode=mode, beam=1, iterations=train.valid_bleu_iterations)
        # An untrained model never ends a sentence.
        longest = decode.max_length or min(config.data.block_tokens, 200)
        decode = replace(decode, max_length=min(longest, config.model.max_target_positions - 2))
        generator = Generator(model, self._tokenizer, self._tokenizer.special, replace(config, decode=decode))
        found = generator.generate_ids(self._sources, after_batch)
        outputs = [one_line(self._tokenizer.decode(candidates[0].tokens)) for candidates in found]
        return self._metric.score(outputs, self._references)
