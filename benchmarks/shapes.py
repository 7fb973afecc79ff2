"""Models, batches and steps that the training benches measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.common import forward_backward
from janus_ds.batch import Ragged, SpecialTokens, TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig, RunConfig
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.views import Views
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.engine import TrainingStep


@dataclass(frozen=True)
class BenchShape:
    """A model preset and the batch it is measured on; tokens count bos and eos."""

    preset: str
    task: str
    samples: int
    source_tokens: int
    target_tokens: int
    masked_tokens: int
    vocab_size: int
    rounds: int


SHAPES: dict[str, BenchShape] = {
    "small": BenchShape("quickstart", "denoise", 8, 64, 64, 32, 4000, 7),
    "iwslt": BenchShape("iwslt", "pair", 12, 26, 26, 13, 10152, 7),
    "bart_base": BenchShape("bart_base", "denoise", 1, 512, 512, 256, 50265, 3),
}


def special_tokens(shape: BenchShape) -> SpecialTokens:
    """Special symbols of the shape's synthetic vocabulary."""
    return SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=shape.vocab_size)


def make_batch(shape: BenchShape, run: RunConfig) -> TwoStreamBatch:
    """Random sentences of one length, masked at random, without padding, for a resolved run."""
    special = special_tokens(shape)
    draw = np.random.default_rng(1)

    def sentences(tokens: int) -> Ragged:
        inner = draw.integers(special.mask + 1, special.vocab_size, (shape.samples, tokens - 2))
        return Ragged.from_rows([[special.bos, *row, special.eos] for row in inner])

    masked = np.zeros((shape.samples, shape.target_tokens), dtype=bool)
    for row in masked:
        row[1 + draw.permutation(shape.target_tokens - 2)[: shape.masked_tokens]] = True
    source, target = sentences(shape.source_tokens), sentences(shape.target_tokens)
    views = Views(source, target, masked.reshape(-1))
    classes = run.model.length_classes or run.model.max_target_positions
    return Collator(special, run.objective, classes, pad_multiple=1)(views, np.arange(shape.samples))


def training_step(model: JanusModel, objective: ObjectiveConfig) -> TrainingStep:
    """The step that training runs, in training mode, on one device."""
    head = JanusObjective(objective, model.special.vocab_size, ParallelLayers())
    return TrainingStep(model, head, objective.encoder_passes).train()


def step_job(model: JanusModel, objective: ObjectiveConfig, batch: TwoStreamBatch) -> Callable[[], None]:
    """A job: forward and backward of that step."""
    step = training_step(model, objective)
    return forward_backward(model, lambda: step(batch, batch.counts)[0])
