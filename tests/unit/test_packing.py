"""Packed batches: what is left out, what is kept, and where everything stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.masking.views import Views
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.packing import unpacked
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.stream_mask import Segment
from janus_ds.train.engine import TrainingStep
from tests.support.operations import CountedOperations
from tests.support.packed_data import run_config
from tests.support.tiny_model import TINY, tiny_model
from tests.support.two_stream import TOY

LENGTHS = [(9, 4), (2, 9), (5, 1), (1, 6)]
"""Inner source and target tokens."""
FULL = run_config("paper", "pair").objective


def batch_of(
    packs: bool, multiple: int = 1, objective: ObjectiveConfig = FULL, unmasked: Sequence[int] = ()
) -> TwoStreamBatch:
    draw = np.random.default_rng(3)

    def sentences(column: int) -> Ragged:
        rows = [[0, *draw.integers(TOY.mask + 1, TOY.vocab_size, pair[column]), 2] for pair in LENGTHS]
        return Ragged.from_rows(rows)

    source, target = sentences(0), sentences(1)
    inner = ~np.isin(np.arange(len(target.values)), [*target.offsets[:-1], *(target.offsets[1:] - 1)])
    masked = inner & (draw.random(len(inner)) < 0.5)
    masked[target.offsets[:-1] + 1] = True
    for sample in unmasked:
        masked[target.offsets[sample] : target.offsets[sample + 1]] = False
    views = Views(source, target, masked)
    return Collator(TOY, objective, 12, multiple, packs_rows=packs)(views, np.arange(len(LENGTHS)))


def rows_needed(batch: TwoStreamBatch) -> int:
    layout = batch.layout
    return sum(int(batch.row_length_B(s).sum()) for s in Segment if layout.width(s))


@pytest.mark.parametrize("multiple", [1, 4])
def test_no_row_is_padding_but_for_what_fills_up(multiple: int) -> None:
    packed, padded = batch_of(True, multiple), batch_of(False, multiple)
    needed, rows = rows_needed(padded), packed.row_token_BR.numel()
    assert needed <= rows <= needed + len(Segment) * (multiple - 1)
    assert rows < padded.row_token_BR.numel()
    assert int((packed.row_token_BR != TOY.pad).sum()) == needed
    assert packed.source_BS.shape[1] % multiple == 0
    assert packed.source_BS[packed.source_BS != TOY.pad].tolist() == [
        token for row in padded.source_BS.tolist() for token in row if token != TOY.pad
    ]
    assert packed.counts == padded.counts


@pytest.mark.parametrize("multiple", [1, 4])
def test_unpacking_gives_the_padded_batch_back(multiple: int) -> None:
    padded = batch_of(False, multiple)
    again = unpacked(batch_of(True, multiple))
    assert unpacked(padded) is padded
    assert again.layout == padded.layout
    valid = padded.row_token_BR != TOY.pad
    for name in ("row_token_BR", "row_position_BR"):
        assert torch.equal(getattr(again, name)[valid], getattr(padded, name)[valid]), name
    read = padded.source_BS != TOY.pad
    assert torch.equal(again.source_BS[read], padded.source_BS[read])


@pytest.mark.parametrize("multiple", [1, 4])
def test_samples_without_masked_tokens_are_no_fault(multiple: int) -> None:
    losses = {}
    for packs in (False, True):
        batch = batch_of(packs, multiple, unmasked=[1, 3])
        head = JanusObjective(FULL, TOY.vocab_size, ParallelLayers())
        losses[packs] = float(TrainingStep(tiny_model(TINY), head)(batch, batch.counts)[0].detach())
    assert losses[True] == pytest.approx(losses[False], rel=1e-12)


def test_the_step_asks_the_device_nothing_and_makes_fewer_products() -> None:
    """Counted: values that a step waits for, and rows that go through its products."""
    head = JanusObjective(FULL, TOY.vocab_size, ParallelLayers())
    step, rows = TrainingStep(tiny_model(TINY), head).train(), {}
    for packs in (False, True):
        batch = batch_of(packs)
        with CountedOperations() as seen:
            step(batch, batch.counts)
        assert not seen.calls["_local_scalar_dense"] + seen.calls["nonzero"]
        rows[packs] = batch.row_token_BR.numel() + batch.source_BS.numel()
    assert rows[True] < 0.75 * rows[False]
