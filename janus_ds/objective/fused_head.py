"""Output projection and losses in one function over chunks of rows: no logits are ever kept.

For each chunk the logits, all cross-entropies, the KL terms and the gradient of the logits are made
in the forward pass; then dH = dZ W and dW += dZ^T H. Nothing of vocabulary width outlives a chunk and
nothing is computed twice; the weight itself is not needed in the backward pass (which ZeRO-3 likes).
Tokens that AR, NAR and AUX all predict go as one group, since the KL terms pair their rows.

Exact: loss and gradients equal those of `tests/support/plain_losses.py` under autograd. Logits, softmax
and the sums over chunks are float32 at least; for 16-bit inputs the operands of the products are 16-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from janus_ds.objective.chunk_math import Terms, VocabSlice, chunk_gradient, chunk_losses, logit_gradient
from janus_ds.parallel.tensor_parallel import ParallelLayers

_CPU_ELEMENTS = 6_000_000
_CUDA_ELEMENTS = 150_000_000
_COLUMNS = 8192
"""Of the vocabulary at a time: large tensors that live for a moment cost more than what is done with them."""
_HALF_RANGE = 64.0
"""Factor on gradients that pass through 16 bits: keeps eps / V normal, far from the largest float16."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that predict the same tokens, one row of each stream a token.

    Attributes:
        names: streams, as keys of the head's hidden inputs.
        rows: for each stream, the rows to take of it, int64 (n,), each row at most once.
    """

    names: tuple[str, ...]
    rows: tuple[Tensor, ...]
    target_n: Tensor
    terms: Terms

    def sum_names(self) -> list[str]:
        """Names of the sums in the order of `ChunkResult.sums`: "ar", "ar_nll", "kl_ar_nar" and so on."""
        pairs = [f"kl_{self.names[g]}_{self.names[h]}" for g, h, _ in self.terms.pairs]
        return [*self.names, *(f"{name}_nll" for name in self.names), *pairs]


@dataclass(frozen=True)
class HeadPlan:
    """All that the head computes, but the tensors that carry gradients."""

    groups: tuple[RowGroup, ...]
    vocab_size: int
    parallel: ParallelLayers
    chunk_rows: int | None = None
    """Rows of logits that exist at a time; None: by vocabulary and device."""
    compiled: bool = False
    """Chunk mathematics by torch.compile; left alone where nothing asks for gradients."""


def fused_head(
    hidden: Mapping[str, Tensor], weight_VD: Tensor, plan: HeadPlan
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted total of all groups, with gradients to hidden rows and weight.

    Args:
        hidden: hidden rows of each stream, (N, D) each; replicated under tensor parallelism.
        weight_VD: output table, or this rank's rows of it; rows beyond the vocabulary are padding.

    Returns:
        the total (0-dim, float32 at least) and the sums by name, float64 without gradient.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (*hidden.values(), weight_VD))
    apply: Callable[..., tuple[Tensor, ...]] = _FusedHead.apply
    total, *group_sums = apply(plan, tuple(hidden), wanted, weight_VD, *hidden.values())
    sums: dict[str, Tensor] = {}
    for group, values in zip(plan.groups, group_sums, strict=True):
        for name, value in zip(group.sum_names(), values.unbind(), strict=True):
            sums[name] = sums[name] + value if name in sums else value
    return total, sums


def rows_per_chunk(vocab_rows: int, device: torch.device) -> int:
    """Rows of logits to hold at a time.

    On a CPU few rows stay near the cache, but each chunk passes once over the weight's gradient; on
    a GPU that pass must be small against the products, so chunks are large.
    """
    if device.type == "cuda":
        return min(max(_CUDA_ELEMENTS // max(vocab_rows, 1), 2048), 16384)
    return min(max(_CPU_ELEMENTS // max(vocab_rows, 1), 96), 512)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: HeadPlan,
        names: tuple[str, ...],
        wanted: bool,
        weight_VD: Tensor,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        operand = _operand_dtype(hidden[0])
        with torch.autocast(weight_VD.device.type, enabled=False):
            rows = dict(zip(names, hidden, strict=True))
            head = _Head(plan, weight_VD, rows, operand, wanted)
            sums = [head.run(group) for group in plan.groups]
            total = sum(_weighted(s, group.terms) for s, group in zip(sums, plan.groups, strict=True))
            if wanted:
                ctx.save_for_backward(*head.gradients())
                ctx.dtypes = [x.dtype for x in (weight_VD, *hidden)]
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)
        return torch.as_tensor(total).to(head.dtype), *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * (3 + len(ctx.dtypes))
        # Still in at least float32: the loss scale of float16 comes in here, before the cast. In
        # place, to save a copy of the table: a second backward fails on autograd's version check.
        gradients = (gradient.mul_(grad_total) for gradient in ctx.saved_tensors)
        return None, None, None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))


class _Head:
    """Buffers and accumulators of one call."""

    def __init__(
        self,
        plan: HeadPlan,
        weight_VD: Tensor,
        hidden: dict[str, Tensor],
        operand: torch.dtype,
        wanted: bool,
    ) -> None:
        rows, first = weight_VD.shape[0], plan.parallel.rank * weight_VD.shape[0]
        count = min(max(plan.vocab_size - first, 0), rows)
        self.dtype = torch.float64 if operand == torch.float64 else torch.float32
        self._vocab = VocabSlice(plan.vocab_size, first, count, plan.parallel)
        self._hidden = hidden
        self._operand = operand
        self._product = operand if weight_VD.is_cuda else self.dtype
        # On a CPU, where no product of bf16 gives float32.
        self._narrow = weight_VD.dtype == operand == torch.bfloat16 and not weight_VD.is_cuda
        weight_VD = weight_VD.detach()
        self._weight_VD = weight_VD[:count] if self._narrow else self._rounded(weight_VD[:count])
        self._wanted = wanted
        self._compiled = plan.compiled and wanted and count > 0
        # By the rows of the table here, padding included: all ranks must cut the same chunks.
        chunk_rows = plan.chunk_rows or rows_per_chunk(rows, weight_VD.device)
        if self._narrow and plan.parallel.size == 1 and not plan.chunk_rows:
            # The pass over the gradient weighs more beside faster products.
            chunk_rows = min(5 * chunk_rows, 512)
        self._chunk_rows = max(chunk_rows, *(len(group.names) for group in plan.groups))
        self._buffers: dict[str, Tensor] = {}
        unit = max([1e-30, *(c for g in plan.groups for c in _coefficients(g.terms))])
        self._gradient_unit = unit if operand == self.dtype else unit / _HALF_RANGE
        if wanted:
            lengths = [len(h_ND) for h_ND in hidden.values()]
            self._hidden_gradient = weight_VD.new_zeros(sum(lengths), weight_VD.shape[1], dtype=self.dtype)
            parts = torch.split(self._hidden_gradient, lengths)
            self._hidden_gradients = dict(zip(hidden, parts, strict=True))
            self._weight_gradient = torch.zeros_like(weight_VD, dtype=self.dtype)

    def run(self, group: RowGroup) -> Tensor:
        """Sums of one group's terms; adds to the gradients, in units of the largest coefficient."""
        streams, terms = len(group.names), _divided(group.terms, self._gradient_unit)
        sums = torch.zeros(2 * streams + len(terms.pairs), dtype=torch.float64, device=self._weight_VD.device)
        step = max(1, self._chunk_rows // streams)
        for start in range(0, len(group.target_n), step):
            target_n = group.target_n[start : start + step]
            rows = [index[start : start + step] for index in group.rows]
            h_ND = torch.cat(
                [self._hidden[s].index_select(0, r) for s, r in zip(group.names, rows, strict=True)]
            )
            h_ND = self._rounded(h_ND)
            z_GnV = self._logits(h_ND).view(streams, len(target_n), self._vocab.count)
            if self._compiled:
                sums += chunk_gradient(z_GnV, target_n, terms, self._vocab)
                self._accumulate(z_GnV.flatten(0, 1), h_ND, group.names, rows)
                continue
            p_GnV = self._buffer("softmax", len(h_ND)).view_as(z_GnV) if terms.pairs else None
            result = chunk_losses(z_GnV, target_n, terms, self._vocab, p_GnV)
            sums += result.sums
            if self._wanted:
                dz_NV = logit_gradient(z_GnV, result, terms, self._vocab).flatten(0, 1)
                self._accumulate(dz_NV, h_ND, group.names, rows)
        return sums

    def gradients(self) -> list[Tensor]:
        """Of the table and each stream's hidden rows."""
        for gradient in (self._weight_gradient, self._hidden_gradient):
            gradient.mul_(self._gradient_unit)
        self._vocab.parallel.all_reduce_sum(self._hidden_gradient)
        return [self._weight_gradient, *self._hidden_gradients.values()]

    def _logits(self, h_ND: Tensor) -> Tensor:
        if self._product != self.dtype:
            return torch.mm(h_ND, self._weight_VD.t(), out_dtype=self.dtype)
        z_NV = self._buffer("logits", len(h_ND))
        if not self._narrow:
            return torch.mm(h_ND, self._weight_VD.t(), out=z_NV)
        with _bf16_inside():
            for part in self._columns():
                torch.mm(h_ND, self._weight_VD[part].float().t(), out=z_NV[:, part])
        return z_NV

    def _accumulate(self, dz_NV: Tensor, h_ND: Tensor, names: tuple[str, ...], rows: list[Tensor]) -> None:
        gradient_VD = self._weight_gradient[: self._vocab.count]
        if self._narrow:
            # Rounded once more than in float32; the gradients are in the end, the sum over chunks is not.
            dz_NV, h_ND = dz_NV.to(self._operand), h_ND.to(self._operand)
            dh_ND = torch.mm(dz_NV, self._weight_VD).to(self.dtype)
            for part in self._columns():
                gradient_VD[part] += torch.mm(dz_NV[:, part].t(), h_ND)
        elif self._product == self.dtype:
            dz_NV = self._rounded(dz_NV)
            dh_ND = torch.mm(dz_NV, self._weight_VD)
            gradient_VD.addmm_(dz_NV.t(), h_ND)
        else:
            dz_NV = self._rounded(dz_NV)
            dh_ND = torch.mm(dz_NV, self._weight_VD, out_dtype=self.dtype)
            gradient_VD += torch.mm(dz_NV.t(), h_ND, out_dtype=self.dtype)
        for name, index, part_nD in zip(names, rows, dh_ND.chunk(len(names)), strict=True):
            self._hidden_gradients[name].index_copy_(0, index, part_nD)

    def _columns(self) -> list[slice]:
        return [slice(start, start + _COLUMNS) for start in range(0, self._vocab.count, _COLUMNS)]

    def _rounded(self, x: Tensor) -> Tensor:
        """An operand of a product: rounded as the inputs are. CPUs then multiply in float32."""
        return x.to(self._operand).to(self._product)

    def _buffer(self, name: str, rows: int) -> Tensor:
        """A (rows, V) view of a buffer kept for all chunks; rows aligned to a cache line (1.5 x faster)."""
        if name not in self._buffers:
            width = -(-self._vocab.count // 64) * 64
            self._buffers[name] = self._weight_VD.new_empty(self._chunk_rows, width, dtype=self.dtype)
        return self._buffers[name][:rows, : self._vocab.count]


@contextmanager
def _bf16_inside() -> Iterator[None]:
    """Let oneDNN multiply bf16 numbers that are written as float32 for what they are: fast with AMX."""
    settings = cast(Any, torch.backends.mkldnn).matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _operand_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Dtype that operands of matrix products are rounded to: the hidden rows', or autocast's."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _coefficients(terms: Terms) -> list[float]:
    return [abs(c) for c in (*terms.ce, *(k for _, _, k in terms.pairs))]


def _divided(terms: Terms, unit: float) -> Terms:
    pairs = tuple((g, h, k / unit) for g, h, k in terms.pairs)
    return replace(terms, ce=tuple(c / unit for c in terms.ce), pairs=pairs)


def _weighted(sums: Tensor, terms: Terms) -> Tensor:
    streams = len(terms.ce)
    total = sums.new_zeros(())
    for place, coefficient in enumerate(terms.ce):
        total = total + coefficient * sums[place]
    for place, (_, _, coefficient) in enumerate(terms.pairs, start=2 * streams):
        total = total + coefficient * sums[place]
    return total
