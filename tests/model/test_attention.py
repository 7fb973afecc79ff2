"""Self-attention of decoder rows: both back ends against the predicate, and what they ask of the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.model.attention import (
    DENSE_ROW_LIMIT,
    DenseRows,
    GroupedRows,
    MultiHeadAttention,
    RowsOfBatch,
    additive_mask,
)
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import SAMPLES
from tests.support.two_stream import Conventions, make_batch, valid_rows

LAYOUTS = {
    "janus": {"arc", "vis", "cmp", "msk", "arq", "qry"},
    "without_aux": {"arc", "vis", "msk", "arq"},
    "cmlm": {"vis", "msk"},
    "ar_query": {"arc", "arq"},
    "ar": {"arc"},
    "aux_alone": {"vis", "cmp", "msk", "qry"},
    "plain_ar_and_nar": {"arc", "vis", "msk"},
}
HEADS, WIDTH = 2, 4


@dataclass
class Recorder:
    """A kernel without dropout that remembers how it was called."""

    calls: list[tuple[int, int, bool, bool]] = field(default_factory=list)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        self.calls.append((q.shape[2], k.shape[2], mask is not None, causal))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return out.transpose(1, 2)


def batch_of(name: str) -> TwoStreamBatch:
    return make_batch(SAMPLES, Conventions(rows=frozenset(LAYOUTS[name]), extra_padding=2))


def predicate_mask(batch: TwoStreamBatch) -> Tensor:
    content = slice(batch.layout.content_rows)
    return batch.layout.visible(slice(None), content) & batch.content_valid_BC()[:, None]


def inputs(batch: TwoStreamBatch) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, content = batch.layout.rows, batch.layout.content_rows
    made = [
        torch.randn(len(SAMPLES), HEADS, n, WIDTH, dtype=torch.float64, generator=generator)
        for n in (rows, content, content)
    ]
    q, k, v = (x.requires_grad_() for x in made)
    return q, k, v


def by_formula(batch: TwoStreamBatch) -> tuple[Tensor, list[Tensor]]:
    """Output of all valid rows and gradients of q, k, v, from the predicate and a plain softmax."""
    q, k, v = inputs(batch)
    scores = q @ k.transpose(2, 3) / WIDTH**0.5
    weights = scores.masked_fill(~predicate_mask(batch)[:, None], -1e30).softmax(-1)
    out = (weights @ v).transpose(1, 2)[valid_rows(batch)]
    return out.detach(), list(torch.autograd.grad(out.pow(2).sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["dense", "grouped"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_back_end_computes_the_predicate(name: str, backend: str) -> None:
    batch = batch_of(name)
    rows = RowsOfBatch.build(batch, torch.float64, backend)
    expected, gradients = by_formula(batch)
    q, k, v = inputs(batch)
    every = rows.every.attend(Recorder(), q, k, v)
    assert bool(torch.isfinite(every).all()), "padding rows must stay finite"
    out = every[valid_rows(batch)]
    assert float((out - expected).abs().max()) < 1e-12
    found = torch.autograd.grad(out.pow(2).sum(), (q, k, v))
    for ours, theirs in zip(found, gradients, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-12
    first = batch.layout.predicted_start
    assert rows.predicted.first_row == first
    predicted = rows.predicted.attend(Recorder(), q[:, :, first:], k, v)
    assert float((predicted - every[:, first:]).abs().max()) < 1e-12


def test_a_sample_without_masked_tokens_stays_finite() -> None:
    samples = [SAMPLES[0], SAMPLES[1].__class__([0, 2], [0, 2], [])]
    batch = make_batch(samples)
    for backend in ("dense", "grouped"):
        rows = RowsOfBatch.build(batch, torch.float64, backend).every
        torch.manual_seed(0)
        r, c = batch.layout.rows, batch.layout.content_rows
        q, k, v = (torch.randn(2, 1, n, WIDTH, dtype=torch.float64) for n in (r, c, c))
        assert bool(torch.isfinite(rows.attend(Recorder(), q, k, v)).all())


def test_grouped_asks_for_no_mask_on_ar_rows_and_for_few_pairs() -> None:
    batch = batch_of("janus")
    layout = batch.layout
    q, k, v = inputs(batch)
    recorder = Recorder()
    rows = GroupedRows.build(batch, torch.float64)
    rows.attend(recorder, q, k, v)
    original, auxiliary = layout.vis + layout.msk, layout.vis + layout.cmp + layout.msk
    assert recorder.calls == [
        (layout.arc, layout.arc, False, True),
        (layout.arq, layout.arc, False, True),
        (original, original, True, False),
        (layout.cmp + layout.qry, auxiliary, True, False),
    ]
    recorder.calls.clear()
    first = layout.predicted_start
    rows.from_row(first).attend(recorder, q[:, :, first:], k, v)
    assert [call[0] for call in recorder.calls] == [layout.arq, layout.msk, layout.qry]


def test_the_back_end_follows_the_shape() -> None:
    def chosen(layout: RowLayout) -> type:
        base = batch_of("janus")
        tokens = torch.zeros(3, layout.rows, dtype=torch.int64)
        fields = {name: value for name, value in base.tensors() if not name.startswith("row_")}
        batch = TwoStreamBatch(
            layout=layout,
            counts=base.counts,
            row_token_BR=tokens,
            row_position_BR=tokens,
            **fields,
        )
        return type(RowsOfBatch.build(batch, torch.float32).every)

    short, long = DENSE_ROW_LIMIT, DENSE_ROW_LIMIT + 8
    assert chosen(RowLayout(arc=short, vis=short // 2, msk=short // 2, arq=short)) is DenseRows
    assert chosen(RowLayout(arc=long, vis=short // 2, msk=short // 2, arq=long)) is GroupedRows
    assert chosen(RowLayout(arc=short)) is GroupedRows
    assert chosen(RowLayout(vis=short // 2, msk=short // 2)) is GroupedRows


def test_an_additive_mask_leaves_no_row_blind() -> None:
    mask = additive_mask(torch.tensor([[True, False], [False, False]]), torch.float32)
    assert mask.tolist() == [[0.0, -torch.inf], [0.0, 0.0]]


class CountingLayers(ParallelLayers):
    """Counts how often the sharded random stream is entered."""

    entered = 0

    @contextmanager
    def _stream(self) -> Iterator[None]:
        self.entered += 1
        yield

    def sharded_rng(self):  # type: ignore[no-untyped-def]
        return self._stream()


def test_attention_dropout_acts_in_training_only_and_draws_from_the_sharded_stream() -> None:
    layers = CountingLayers()
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, 0.5, 0.02, layers)
    q = k = torch.zeros(1, 2, 64, 4)
    ones = torch.ones(1, 2, 64, 4)
    dropped = attention.train().kernel(q, k, ones)
    assert layers.entered == 1
    assert float(dropped.std()) > 0.01
    assert abs(float(dropped.mean()) - 1) < 0.05, "kept weights are scaled up"
    assert not torch.equal(dropped[:, :, 0], dropped[:, :, 1]), "heads draw apart"
    assert torch.allclose(attention.eval().kernel(q, k, ones), ones.transpose(1, 2))
    assert layers.entered == 1
