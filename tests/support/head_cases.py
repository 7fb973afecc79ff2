"""Random inputs for the fused head, and its total from whole logits under autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from janus_ds.objective.chunk_math import Terms
from janus_ds.objective.fused_head import HeadPlan, RowGroup
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.plain_losses import label_smoothed_cross_entropy, symmetric_kl

VOCAB, TABLE_ROWS, WIDTH, ROWS = 29, 32, 6, 11
"""Symbols; rows of the padded table; D; hidden rows of each stream."""


@dataclass(frozen=True)
class HeadCase:
    """Weights of the sums, as the objective would give them."""

    name: str
    ce: dict[str, float]
    """Streams that predict the masked tokens, and the weight of each."""
    kl: dict[tuple[str, str], float]
    smoothing: float
    unmasked: bool = True
    """Whether AR has further rows of its own."""


CASES = [
    HeadCase(
        "paper",
        {"ar": 1 / 9, "nar": 1 / 5, "aux": 1 / 5},
        {("ar", "aux"): 2 / 5, ("nar", "aux"): 2 / 5},
        0.1,
    ),
    HeadCase(
        "released",
        {"ar": 1 / 9, "nar": 0.1, "aux": 0.1},
        {("ar", "nar"): 0.2, ("ar", "aux"): 0.6, ("nar", "aux"): 0.2},
        0.1,
    ),
    HeadCase(
        "released-pretraining",
        dict.fromkeys(("ar", "nar", "aux"), 0.5 / 14),
        {("ar", "aux"): 0.5 / 14, ("nar", "aux"): 0.5 / 14},
        0.0,
    ),
    HeadCase("joint", {"ar": 1.0, "nar": 0.25}, {("ar", "nar"): 1.0}, 0.1),
    HeadCase("kl-alone", {"nar": 0.0, "aux": 0.0}, {("nar", "aux"): 1.0}, 0.1, unmasked=False),
    HeadCase("ar", {"ar": 0.125}, {}, 0.1),
    HeadCase("cmlm", {"nar": 0.125}, {}, 0.1, unmasked=False),
]


@dataclass
class HeadInputs:
    """Leaves with gradients, and the rows that predict the masked tokens and the others."""

    hidden: dict[str, Tensor]
    weight_VD: Tensor
    index: dict[str, Tensor]
    target_T: Tensor
    unmasked_U: Tensor
    unmasked_target_U: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """All tensors with gradients, by name."""
        return {**self.hidden, "weight": self.weight_VD}


def make_inputs(case: HeadCase, dtype: torch.dtype = torch.float64, device: str = "cpu") -> HeadInputs:
    """The same values for every case and process; padding rows of the table are not a number."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5

    table = draw(TABLE_ROWS, WIDTH)
    table[VOCAB:] = torch.nan
    order = torch.randperm(ROWS, generator=generator).to(device)
    streams = {name: draw(ROWS, WIDTH) for name in ("ar", "nar", "aux")}
    return HeadInputs(
        hidden={name: streams[name].to(device, dtype).requires_grad_() for name in case.ce},
        weight_VD=table.to(device, dtype).requires_grad_(),
        index={"ar": order[:5], "nar": order.flip(0)[:5], "aux": order.flip(0)[:5]},
        target_T=torch.tensor([0, 28, 3, 14, 16], device=device),
        unmasked_U=order[5:9],
        unmasked_target_U=torch.tensor([7, 15, 27, 1], device=device),
    )


def make_plan(
    case: HeadCase,
    inputs: HeadInputs,
    parallel: ParallelLayers,
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> HeadPlan:
    """What the objective would hand to the head."""
    names = tuple(case.ce)
    pairs = tuple((names.index(g), names.index(h), k) for (g, h), k in case.kl.items())
    masked = RowGroup(
        names,
        tuple(inputs.index[name] for name in names),
        inputs.target_T,
        Terms(tuple(case.ce.values()), pairs, case.smoothing),
    )
    groups = [masked]
    if case.unmasked:
        terms = Terms((case.ce["ar"],), (), case.smoothing)
        groups.append(RowGroup(("ar",), (inputs.unmasked_U,), inputs.unmasked_target_U, terms))
    return HeadPlan(tuple(groups), VOCAB, parallel, chunk_rows, compiled)


def reference(case: HeadCase, inputs: HeadInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and sums from whole logits, for autograd."""
    table = inputs.weight_VD[:VOCAB]
    logits = {name: inputs.hidden[name][inputs.index[name]] @ table.T for name in case.ce}
    sums = dict.fromkeys((*case.ce, *(f"{name}_nll" for name in case.ce)), inputs.weight_VD.new_zeros(()))
    jobs = [(name, z, inputs.target_T) for name, z in logits.items()]
    if case.unmasked:
        z = inputs.hidden["ar"][inputs.unmasked_U] @ table.T
        jobs.append(("ar", z, inputs.unmasked_target_U))
    for name, z, target in jobs:
        smoothed, nll = label_smoothed_cross_entropy(z, target, case.smoothing)
        sums[name] = sums[name] + smoothed.sum()
        sums[f"{name}_nll"] = sums[f"{name}_nll"] + nll.sum()
    for g, h in case.kl:
        sums[f"kl_{g}_{h}"] = symmetric_kl(logits[g], logits[h]).sum()
    parts = [weight * sums[name] for name, weight in case.ce.items()]
    parts += [weight * sums[f"kl_{g}_{h}"] for (g, h), weight in case.kl.items()]
    return torch.stack(parts).sum(), sums


def gradients(total: Tensor, inputs: HeadInputs) -> dict[str, Tensor]:
    """Gradient of the total by leaf name, padding rows of the table included."""
    leaves = inputs.leaves()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
