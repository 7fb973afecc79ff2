"""Attention of the few rows of an AR step on a CPU, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from janus_ds.model.attention import MultiHeadAttention
from janus_ds.model.decoding import cpu_kernels
from janus_ds.model.decoding.cpu_kernels import attend_few, by_columns, few_rows, stored_by_columns
from janus_ds.parallel.layers import ParallelLayers


def _random(rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    # As the projections leave them: heads behind the rows.
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator).transpose(1, 2) for n in (rows, keys, keys))
    return q, k, v


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (5, 40), (10, 7), (33, 64)])
def test_it_is_torchs_attention(rows: int, keys: int) -> None:
    q, k, v = _random(rows, keys)
    hidden = torch.rand(2, 1, rows, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[..., 0] = False
    for mask in (None, torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)):
        expected = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        for stored in (k, by_columns(k)):
            torch.testing.assert_close(attend_few(q, stored, v, mask), expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_wider_pool_is_taken_as_it_stands() -> None:
    q, k, v = _random(5, 64)
    pool = by_columns(k)
    expected = F.scaled_dot_product_attention(q, k[:, :, :20], v[:, :, :20]).transpose(1, 2)
    part = pool.narrow(2, 0, 20)
    assert stored_by_columns(part)
    assert not stored_by_columns(k)
    torch.testing.assert_close(attend_few(q, part, v[:, :, :20], None), expected, rtol=1e-5, atol=1e-6)


def test_the_kernel_takes_this_way_where_it_is_faster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = MultiHeadAttention(24, 3, 0.0, 0.02, ParallelLayers())
    calls: list[int] = []

    def counted(*parts: torch.Tensor) -> torch.Tensor:
        calls.append(parts[0].shape[2])
        return attend_few(*parts)

    monkeypatch.setattr("janus_ds.model.attention.attend_few", counted)
    monkeypatch.setattr(cpu_kernels, "_MOST_PRODUCTS", {torch.get_num_threads(): 5 * 40 * 8})
    for rows, columns, taken in ((5, True, True), (5, False, False), (6, True, False)):
        q, k, v = _random(rows, 40)
        calls.clear()
        found = attention.kernel(q, by_columns(k) if columns else k, v)
        assert bool(calls) == taken
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    q, k, v = _random(5, 40)
    assert not few_rows(q.requires_grad_(), by_columns(k))
    monkeypatch.setattr(cpu_kernels, "_MOST_PRODUCTS", {})
    assert not few_rows(q.detach(), by_columns(k))
