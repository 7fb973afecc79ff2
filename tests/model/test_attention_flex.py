"""FlexAttention: its rule against the predicate, its values against dense attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.attention_flex import FlexRows
from janus_ds.model.batch_attention import RowsOfBatch, fitting
from tests.model.test_attention import LAYOUTS, batch_of, inputs, predicate_mask
from tests.support.two_stream import long_batch, valid_rows


@torch.no_grad()
def built(batch: TwoStreamBatch, block: int, first_row: int = 0) -> FlexRows:
    return FlexRows.build(batch, torch.float64, block, first_row)


def dense_rule(rows: FlexRows, batch: TwoStreamBatch) -> Tensor:
    """The rule that the kernel asks, evaluated for all pairs, (B, T, C)."""
    b, q, kv = torch.meshgrid(
        torch.arange(len(batch.sample_id_B)),
        torch.arange(batch.layout.rows - rows.first_row),
        torch.arange(batch.layout.content_rows),
        indexing="ij",
    )
    return rows.blocks.mask_mod(b, torch.zeros_like(b), q, kv)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rule_is_the_predicate(name: str) -> None:
    batch = batch_of(name)
    for first_row in (0, batch.layout.predicted_start):
        rows = built(batch, 8, first_row)
        assert torch.equal(dense_rule(rows, batch), predicate_mask(batch)[:, first_row:])


def test_blocks_of_long_ragged_sentences() -> None:
    batch = long_batch()
    blocks = built(batch, 128).blocks
    assert int(blocks.full_kv_num_blocks.sum()) > 0, "some blocks need no rule"
    computed = blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()
    assert int(computed) < 0.6 * blocks.kv_indices.numel(), "and many are skipped"


@torch.no_grad()
@pytest.mark.parametrize("name", ["janus"])
def test_values_are_those_of_dense_attention(name: str) -> None:
    batch = batch_of(name)
    q, k, v = (x.detach() for x in inputs(batch))
    rows = RowsOfBatch.build(batch, torch.float64, "flex")
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~predicate_mask(batch)[:, None], -1e30)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    valid, first = valid_rows(batch), batch.layout.predicted_start
    every = rows.every.attend(None, q, k, v)  # type: ignore[arg-type]
    assert bool(torch.isfinite(every).all())
    assert float((every - expected)[valid].abs().max()) < 1e-12
    predicted = rows.predicted.attend(None, q[:, :, first:], k, v)  # type: ignore[arg-type]
    assert float((predicted - expected[:, first:])[valid[:, first:]].abs().max()) < 1e-12


def test_it_is_never_chosen_by_itself_and_refuses_what_it_cannot_do() -> None:
    long = RowLayout(arc=4096, vis=2048, cmp=2048, msk=2048, arq=4096, qry=2048)
    assert fitting(long) == "grouped"
    with pytest.raises(ConfigError, match="no gradients on a CPU"):
        RowsOfBatch.build(batch_of("janus"), torch.float32, "flex")
    with pytest.raises(ConfigError, match="cannot drop attention weights"):
        RowsOfBatch.build(batch_of("janus"), torch.float32, "flex", dropout=0.1)
