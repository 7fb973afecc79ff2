"""Tensor parallelism on two processes against one: layers, initialisation, random streams, fused head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from janus_ds.objective.fused_head import fused_head
from janus_ds.parallel.tensor_parallel import (
    ParallelLayers,
    deepspeed_mpu,
    make_layers,
    shard_dims,
    take_shard,
)
from janus_ds.parallel.topology import Topology, close_topology, init_topology
from tests.support.head_cases import CASES, HeadInputs, gradients, make_inputs, make_plan, reference
from tests.support.launch import run_ranks

STD = 0.3
EXACT = 1e-12


class Block(nn.Module):
    """Embedding, column -> row pair: what a model does with the layers."""

    def __init__(self, layers: ParallelLayers) -> None:
        super().__init__()
        self.table = layers.vocab_embedding(12, 6, std=STD)
        self.fc1 = layers.column_linear(6, 8, std=STD)
        self.fc2 = layers.row_linear(8, 6, std=STD)

    def forward(self, token_BT: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.tanh(self.fc1(self.table(token_BT))))
        return out


def seeded_block(layers: ParallelLayers) -> Block:
    """The same weights at every size; biases away from zero, cut as the layer is."""
    torch.manual_seed(3)
    block = Block(layers).double()
    with torch.no_grad():
        whole = torch.randn(8, dtype=torch.float64)
        block.get_parameter("fc1.bias").copy_(take_shard(whole, 0, layers.rank, layers.size))
        block.get_parameter("fc2.bias").copy_(torch.randn(6, dtype=torch.float64))
    return block


def loss_and_gradients(block: Block) -> tuple[Tensor, dict[str, Tensor]]:
    token_BT = torch.arange(12).view(3, 4)
    loss = (block(token_BT) * torch.linspace(-1, 1, 6, dtype=torch.float64)).pow(2).sum()
    names, parameters = zip(*block.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def worker() -> dict[str, Any]:
    torch.set_num_threads(1)
    topology = init_topology(2)
    layers = make_layers(2)
    found: dict[str, Any] = {"topology": topology_facts(topology)}
    found["layers"] = layer_facts(layers)
    found["random"] = random_facts(layers)
    found["head"] = {case.name: head_error(i, layers) for i, case in enumerate(CASES)}
    found["padding_only"] = padding_only_error(layers)
    topology.barrier()
    close_topology()
    return found


def topology_facts(topology: Topology) -> dict[str, Any]:
    mpu: Any = deepspeed_mpu()
    return {
        "place": (topology.tensor_rank, topology.data_rank, topology.data_size),
        "agreed": topology.agree(3 * topology.rank),
        "sum": topology.sum_over_data([topology.rank + 1]),
        "broadcast": topology.broadcast_object({"from": topology.rank}),
        "gathered": topology.gather_objects(topology.rank),
        "mpu": (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()),
        "mpu_data": mpu.get_data_parallel_world_size(),
    }


def layer_facts(layers: ParallelLayers) -> dict[str, Any]:
    block, dense = seeded_block(layers), seeded_block(make_layers(1))
    dims = shard_dims(block)
    loss, grads = loss_and_gradients(block)
    dense_loss, dense_grads = loss_and_gradients(dense)
    merged = {n: layers.gather_shards(p.detach(), dims[n]) for n, p in block.named_parameters()}
    exact = dict(dense.named_parameters())
    return {
        "dims": dims,
        "loss": float((loss - dense_loss).abs()),
        "initialisation": max(float((merged[n] - exact[n]).abs().max()) for n in dims),
        "gradients": max(
            float((g - take_shard(dense_grads[n], dims[n], layers.rank, layers.size)).abs().max())
            for n, g in grads.items()
        ),
        "state": sorted(block.state_dict()),
        "reload": str(block.load_state_dict(block.state_dict(), strict=True)),
        "types": (type(block.fc1(torch.zeros(2, 6).double())), block.fc1(torch.zeros(2, 6).double()).shape),
    }


def random_facts(layers: ParallelLayers) -> dict[str, Any]:
    def draws() -> tuple[list[float], list[float]]:
        replicated = torch.rand(4).tolist()
        with layers.sharded_rng():
            sharded = torch.rand(4).tolist()
        return replicated + torch.rand(2).tolist(), sharded

    layers.seed_rng(2**63 - 2)
    first = draws()
    layers.seed_rng(2**63 - 2)
    again = draws()
    x = torch.ones(64, requires_grad=True)

    def drop(y: Tensor) -> Tensor:
        with layers.sharded_rng():
            return nn.functional.dropout(nn.functional.dropout(y, 0.5) * 1.5, 0.5)

    out = checkpoint(drop, x, use_reentrant=False, context_fn=layers.recompute_contexts)
    with layers.sharded_rng():
        between = torch.rand(3)  # moves the stream on between forward and recomputation
    out.sum().backward()
    with layers.sharded_rng():
        after = torch.rand(3)
    assert x.grad is not None
    return {
        "first": first,
        "repeats": first == again,
        # Without the contexts recomputation would draw other masks, and this would not hold.
        "recomputed": bool(torch.equal(out.detach(), x.grad)),
        "moves_on": not torch.equal(between, after),
    }


def shard_inputs(whole: HeadInputs, layers: ParallelLayers) -> HeadInputs:
    def cut(x: Tensor) -> Tensor:
        return take_shard(x.detach(), 0, layers.rank, layers.size).clone().requires_grad_()

    hidden = {name: x.detach().clone().requires_grad_() for name, x in whole.hidden.items()}
    return HeadInputs(
        hidden,
        cut(whole.weight_VD),
        whole.index,
        whole.target_T,
        whole.unmasked_U,
        whole.unmasked_target_U,
    )


def head_error(number: int, layers: ParallelLayers) -> float:
    """Largest difference of loss, sums and gradients from whole logits in one process."""
    case, whole = CASES[number], make_inputs(CASES[number])
    inputs = shard_inputs(whole, layers)
    plan = make_plan(case, inputs, layers, chunk_rows=4)
    total, sums = fused_head(inputs.hidden, inputs.weight_VD, plan)
    wanted, wanted_sums = reference(case, whole)
    errors = [float(abs(total - wanted)), *(float(abs(sums[n] - wanted_sums[n])) for n in sums)]
    exact = gradients(2.0 * wanted, whole)
    for name, gradient in gradients(2.0 * total, inputs).items():
        part = take_shard(exact[name], 0 if name == "weight" else None, layers.rank, layers.size)
        errors.append(float((gradient - part).abs().max()))
    return max(errors)


def padding_only_error(layers: ParallelLayers) -> float:
    """The last rank holds nothing but padding: a vocabulary that fills half of the table."""
    case, whole = CASES[1], make_inputs(CASES[1])
    whole.target_T = whole.target_T.clamp(max=14)
    whole.unmasked_target_U = whole.unmasked_target_U.clamp(max=14)
    small = 15
    inputs = shard_inputs(whole, layers)
    plan = make_plan(case, inputs, layers, chunk_rows=4)
    plan = type(plan)(plan.groups, small, layers, 4)
    total, _ = fused_head(inputs.hidden, inputs.weight_VD, plan)
    plan = type(plan)(plan.groups, small, make_layers(1), None)
    wanted, _ = fused_head(whole.hidden, whole.weight_VD, plan)
    exact, found = gradients(wanted, whole), gradients(total, inputs)
    shards = (float(abs(total - wanted)), *(float((found[n] - exact[n]).abs().max()) for n in whole.hidden))
    return max(shards)


def test_two_ranks_compute_what_one_computes() -> None:
    ranks = run_ranks(worker, 2)
    for rank, found in enumerate(ranks):
        check_topology(rank, found["topology"])
        check_layers(found["layers"])
        assert found["random"]["repeats"]
        assert found["random"]["recomputed"]
        assert found["random"]["moves_on"]
        for name, error in found["head"].items():
            assert error < EXACT, name
        assert found["padding_only"] < EXACT
    replicated, sharded = zip(*(found["random"]["first"] for found in ranks), strict=True)
    assert replicated[0] == replicated[1]
    assert not set(sharded[0]) & set(sharded[1])
    assert not set(replicated[0]) & set(sharded[0])


def check_topology(rank: int, found: dict[str, Any]) -> None:
    assert found["place"] == (rank, 0, 1)
    assert found["agreed"] == 3
    assert found["sum"] == [rank + 1]
    assert found["broadcast"] == {"from": 0}
    assert found["gathered"] == [0, 1]
    assert found["mpu"] == (rank, 2)
    assert found["mpu_data"] == 1


def check_layers(found: dict[str, Any]) -> None:
    assert found["dims"] == {
        "table.weight": 0,
        "fc1.weight": 0,
        "fc1.bias": 0,
        "fc2.weight": 1,
        "fc2.bias": None,
    }
    assert found["initialisation"] == 0
    assert found["loss"] < EXACT
    assert found["gradients"] < EXACT
    assert found["state"] == sorted(found["dims"])
    assert "All keys matched" in found["reload"]
    assert found["types"] == (torch.Tensor, torch.Size([2, 4]))
