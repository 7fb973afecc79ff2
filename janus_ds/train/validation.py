"""Validation: held-out losses, equal on any number of ranks, scored and sampled outputs, the best weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.checkpoint.manager import save_best
from janus_ds.config.modes import trained_modes
from janus_ds.config.schema import RunConfig, TrainConfig
from janus_ds.data.prepare.pair_files import PairText, held_out_text
from janus_ds.data.stream.loader import ValidationBatch
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.text.tokenizer import Tokenizer
from janus_ds.decode.generator import Generator
from janus_ds.decode.search_settings import search_settings
from janus_ds.decode.text import fit_sources, long_warning, markdown_text, one_line
from janus_ds.errors import ResourceError
from janus_ds.metrics.glge import VALIDATION_METRICS
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import LossReport
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.parallel.topology import Topology, raise_on_all_ranks
from janus_ds.train.engine import TrainingEngine
from janus_ds.train.state import Meters, measure_of, patience_is_over


class Validator:
    """Evaluates a fixed set of batches.

    Args:
        batches: this rank's batches, as many as every other rank has; their masks never change.
    """

    def __init__(self, batches: Sequence[ValidationBatch], topology: Topology) -> None:
        self._batches = batches
        self._topology = topology
        own = sum((item.batch.counts for item in batches if item.counted), BatchCounts())
        self._counts = global_counts(own, topology)

    def losses(
        self, engine: TrainingEngine, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Each term as its mean over the whole set, and the weighted total as "loss".

        Args:
            stop: asked before each batch, on all ranks with one answer; true ends it with None.
        """
        sums: dict[str, Tensor] = {}
        with engine.evaluation():
            for item in self._batches:
                if stop():
                    return None
                report = engine.forward(item.batch, self._counts)
                add_terms(sums, report, 1.0 if item.counted else 0.0)
        return global_terms(sums, self._topology)


def add_terms(sums: dict[str, Tensor], report: LossReport, share: float = 1.0) -> None:
    """Add a micro-batch's parts to the sums of its step, its total under the name "loss"."""
    for name, value in {"loss": report.total, **report.terms}.items():
        part = value.detach().to(torch.float64) * share
        sums[name] = sums[name] + part if name in sums else part


def global_counts(counts: BatchCounts, topology: Topology) -> BatchCounts:
    """Counts over all data-parallel ranks: what losses are divided by."""
    return BatchCounts(*topology.sum_over_data(counts.values()))


def global_terms(terms: Mapping[str, Tensor], topology: Topology) -> dict[str, float]:
    """Sums of the ranks' parts of each term. One transfer, one wait for the device."""
    names = sorted(terms)
    if not names:
        return {}
    parts = torch.stack([terms[name] for name in names])
    return dict(zip(names, topology.sum_tensor_over_data(parts).tolist(), strict=True))


class _StoppedError(Exception):
    """Leaves a search between two batches."""


class OutputDecoder:
    """Decodes held-out inputs while a run trains: scores of a validation text, and samples to look at.

    It has a whole model of its own on this rank, made at the first call, since the engine's weights may be
    partitioned over ranks.

    Args:
        pairs: of the samples, the source as the encoder reads it and the reference.
        text: what is scored, by the metric of `train.valid_task`; None: nothing is.

    Raises:
        ConfigError: AR cannot decode as the run's settings ask; here, and not in the first validation.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        pairs: Sequence[tuple[str, str]],
        text: PairText | None,
    ) -> None:
        self._config, self._tokenizer, self._device, self._pairs = config, tokenizer, device, pairs
        self._model: JanusModel | None = None
        self.modes = () if text is None else scored_modes(config)
        """Whose outputs are scored."""
        self.warning: str | None = None
        """What is to be said about sources that were too long for the model and were cut."""
        if "ar" in trained_modes(config.objective):
            prefix = config.decode.prefix
            search_settings(config, tokenizer.special, tokenizer.encode(prefix) if prefix else ())
        if text is None:
            return
        text, positions = text.first(config.train.valid_bleu_samples), config.model.max_source_positions
        sources, table = text.encoded(tokenizer.encode, tokenizer.special, positions)
        self._sources, cut = fit_sources(sources, table)
        self._references = text.references or []
        if cut:
            self.warning = long_warning(cut, len(self._sources), table)

    def score(
        self, weights: Mapping[str, Tensor], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The metric by mode, in percent; None where `stop` was true after a batch."""
        self._load(weights)
        try:
            return {mode: self._score(mode, stop) for mode in self.modes}
        except _StoppedError:
            return None

    def samples(self, weights: Mapping[str, Tensor]) -> str:
        """Markdown with source, reference and one output for each mode that the model is trained for."""
        self._load(weights)
        rows = [self._tokenizer.encode(source) for source, _ in self._pairs]
        sources, _ = fit_sources(rows, self._config.model.max_source_positions)
        lines = [[("source", source), ("reference", reference)] for source, reference in self._pairs]
        modes = trained_modes(self._config.objective)
        rescore = self._config.decode.rescore if "ar" in modes else None
        for mode in modes:
            found = self._generator(mode=mode, rescore=rescore).generate_ids(sources)
            for own, candidates in zip(lines, found, strict=True):
                own.append((mode, self._tokenizer.decode(candidates[0].tokens)))
        return "\n\n---\n\n".join(
            "\n".join(f"- **{name}**: {markdown_text(text)}" for name, text in own) for own in lines
        )

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        if self._model is None:
            model = JanusModel(self._config.model, self._tokenizer.special, ParallelLayers())
            self._model = model.to(self._device)
        self._model.load_state_dict(dict(weights))

    def _generator(self, **decode: Any) -> Generator:
        """With the weights loaded last, the run's decoding settings, and these changes."""
        if self._model is None:
            raise RuntimeError("no weights have been loaded")
        config = replace(self._config, decode=replace(self._config.decode, **decode))
        return Generator(self._model, self._tokenizer, config)

    def _score(self, mode: str, stop: Callable[[], bool]) -> float:
        outputs = self.texts(mode, stop)
        return VALIDATION_METRICS[self._config.train.valid_task].score(outputs, self._references)

    def texts(self, mode: str, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """What is scored, of the weights loaded last: greedy AR, or NAR after `valid_bleu_iterations`."""

        def after_batch(done: int, count: int) -> None:
            if stop():
                raise _StoppedError

        config = self._config
        # An untrained model never ends a sentence.
        longest = config.decode.max_length or min(config.data.block_tokens, 200)
        generator = self._generator(
            mode=mode,
            beam=1,
            iterations=config.train.valid_bleu_iterations,
            threshold=None,
            rescore=None,
            temperature=0.0,
            max_length=min(longest, config.model.max_target_positions - 2),
        )
        found = generator.generate_ids(self._sources, after_batch)
        return [one_line(self._tokenizer.decode(candidates[0].tokens)) for candidates in found]


def scored_modes(config: RunConfig) -> tuple[str, ...]:
    """Modes whose outputs the run scores."""
    return tuple(mode for mode in config.train.valid_bleu.split(",") if mode != "none")


def scored_text(config: RunConfig) -> PairText | None:
    """The run's own validation text; None where no scores are asked for."""
    return held_out_text(Path(config.data.path or ""), "valid") if scored_modes(config) else None


def text_pairs(
    batch: TwoStreamBatch, source: SampleSource, tokenizer: Tokenizer, count: int
) -> list[tuple[str, str]]:
    """The first samples of a batch as text: what the encoder reads, and the target as it lies on disk."""
    count = min(count, len(batch.sample_id_B))
    targets = source.read(batch.sample_id_B[:count].numpy())["target"]
    return [
        (
            tokenizer.decode(batch.source_BS[i, : int(batch.source_length_B[i])].tolist()),
            tokenizer.decode(targets.row(i).tolist()),
        )
        for i in range(count)
    ]


logger = logging.getLogger(__name__)


class BestWeights:
    """Follows `train.keep_best` from validation to validation; all ranks together.

    Args:
        meters: the best so far; brought up to date here.
    """

    def __init__(self, train: TrainConfig, meters: Meters, root: Path, topology: Topology) -> None:
        self._train = train
        self._meters = meters
        self._root = root
        self._topology = topology

    def judge(
        self,
        step: int,
        losses: Mapping[str, float],
        scores: Mapping[str, float],
        weights: Callable[[], Mapping[str, Tensor] | None],
    ) -> None:
        """Take a validation into account.

        Args:
            losses: held-out losses, equal on all ranks.
            scores: by mode, equal on all ranks.
            weights: gives all weights on rank 0; collective.
        """
        meters, kind = self._meters, self._train.keep_best
        if kind == "loss":
            better = losses["loss"] < (meters.best_loss if meters.best_step else math.inf)
        elif kind in scores:
            better = scores[kind] > meters.best_bleu
        else:
            return
        name = f"valid_{VALIDATION_METRICS[self._train.valid_task].name}"
        measured = {measure_of(self._train, mode): score for mode, score in scores.items()}
        risen = {of: score for of, score in measured.items() if score > meters.best_scores.get(of, -1.0)}
        meters.best_scores |= risen
        if not better:
            meters.stale_validations = 0 if risen else meters.stale_validations + 1
        elif self._keep(step, weights(), {"valid_loss": losses["loss"], name: dict(scores)}):
            meters.best_step, meters.stale_validations = step, 0
            meters.best_bleu, meters.best_loss = scores.get(kind, -1.0), losses["loss"]
        meters.finished = patience_is_over(meters, self._train)

    def _keep(self, step: int, weights: Mapping[str, Tensor] | None, figures: dict[str, Any]) -> bool:
        record = {"step": step, **figures, "mode": self._train.keep_best}
        try:
            raise_on_all_ranks(
                self._topology,
                lambda: save_best(self._root, weights, record) if weights is not None else None,
            )
        except ResourceError as error:
            if self._topology.is_main:
                logger.warning(
                    "%s; training goes on\n  where: %s\n  to do: %s",
                    error.what,
                    error.where,
                    "free disk space",
                )
            return False
        return True
