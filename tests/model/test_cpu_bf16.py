"""Training in bf16 on a CPU: attention against float64, the law of dropout, and that it can be repeated."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from janus_ds.model import attention

SHAPE = (3, 2, 7, 16)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_loses_no_more_than_torchs(masked: bool, causal: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE).bfloat16().requires_grad_() for _ in range(3)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    mask = torch.zeros(3, 1, 1, 7)
    mask[1, :, :, 5:] = -math.inf
    mask_of = {x: mask.to(x) if masked else None for x in (torch.bfloat16, torch.float64)}
    if masked and causal:
        mask_of = {x: mask.to(x) + torch.full((7, 7), -math.inf, dtype=x).triu(1) for x in mask_of}
    exact = F.scaled_dot_product_attention(
        *exact_inputs, mask_of[torch.float64], is_causal=causal and not masked
    )
    wanted = [exact, *torch.autograd.grad(exact.pow(2).sum(), exact_inputs)]
    errors = []
    for attend in (attention.attend_in_bf16, F.scaled_dot_product_attention):
        out = attend(*inputs, mask_of[torch.bfloat16], is_causal=causal and not masked)
        found = [out, *torch.autograd.grad(out.pow(2).sum(), inputs)]
        errors.append([float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)])
    ours, theirs = errors
    assert max(ours) < 1.5 * max(theirs) < 1e-2


def test_long_rows_take_the_kernel_that_stores_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **y: calls.append(x[0].shape[2]) or plain(*x, **y)
    )
    for rows in (128, 129):
        x = torch.randn(1, 1, rows, 8).bfloat16().requires_grad_()
        attention.attend_in_bf16(x, x, x)
    assert calls == [129]


def test_dropout_keeps_its_share_and_is_drawn_again_from_the_same_state() -> None:
    x = torch.ones(401, 501, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(3)
    first = attention.dropout(x, 0.3)
    torch.manual_seed(3)
    again = attention.dropout(x, 0.3)
    other = attention.dropout(x, 0.3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = first > 0
    assert first[kept].unique().tolist() == [torch.tensor(1 / 0.7, dtype=torch.bfloat16)]
    # Five standard deviations of a binomial law; so do neighbours, which share a random number.
    for pattern, share in ((kept, 0.7), (kept[:, 1:] & kept[:, :-1], 0.49)):
        count = pattern.numel()
        assert abs(float(pattern.float().mean()) - share) < 5 * math.sqrt(share * (1 - share) * 2 / count)
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())
    assert attention.dropout(x, 0.0).equal(x)


def test_other_precisions_take_torchs_dropout() -> None:
    x = torch.ones(40, 50, requires_grad=True)
    torch.manual_seed(3)
    ours = attention.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x, 0.3))
