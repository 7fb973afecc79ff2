"""The alpha-beta model: what a message costs, and over which link."""

from __future__ import annotations

import pytest

from janus_ds.config.load import load_run_config
from janus_ds.model.weights import parameter_shapes
from janus_ds.tools.scaling import Machine, message_seconds, step_time, wire_bytes
from janus_ds.tools.traffic import Execution, Sent, rank_parameters, zero_traffic

MACHINE = Machine(4, 1e12, latency_intra=1.0, latency_inter=10.0, bandwidth_intra=100.0, bandwidth_inter=20.0)


def sent(operation: str = "all-reduce", group: str = "data", calls: int = 1, size: int = 400) -> Sent:
    return Sent("x", operation, group, calls, size)


def test_a_ring_or_a_tree_over_the_slowest_link() -> None:
    four = Execution(1, data_size=4)
    # Ring: 6 (1 + 400 / 400) = 12; tree: 4 (1 + 4) = 20.
    assert message_seconds(sent(), four, MACHINE) == pytest.approx(12)
    # A tiny message goes by tree: 2 log2(4) latencies, not 2 x 3.
    assert message_seconds(sent(size=4), four, MACHINE) == pytest.approx(4 * 1.04)
    assert message_seconds(sent("all-gather"), four, MACHINE) == pytest.approx(3 * 2)
    assert message_seconds(sent("all-gather", calls=2, size=800), four, MACHINE) == pytest.approx(12)
    eight = Execution(1, data_size=8)
    assert message_seconds(sent("all-gather", size=800), eight, MACHINE) == pytest.approx(7 * (10 + 5))


def test_tensor_groups_stay_in_a_node_and_their_rings_share_its_network() -> None:
    both = Execution(1, data_size=4, tensor_size=2)
    assert message_seconds(sent(group="tensor"), both, MACHINE) == pytest.approx(2 * (1 + 2))
    # Four data ranks over two nodes, two such rings: half of 20 for each.
    assert message_seconds(sent("all-gather"), both, MACHINE) == pytest.approx(3 * (10 + 400 / 4 / 10))
    assert message_seconds(sent(), Execution(1), MACHINE) == 0


def test_a_step_is_work_and_messages() -> None:
    time = step_time(8e12, [sent(), sent("all-gather")], Execution(1, data_size=4), MACHINE)
    assert (time.work, time.messages, time.total) == pytest.approx((2, 18, 20))
    assert wire_bytes(sent(), Execution(1, data_size=4)) == 600
    assert wire_bytes(sent("reduce-scatter"), Execution(1, data_size=4)) == 300


def test_padding_buckets_and_stages() -> None:
    model = load_run_config(None).model
    whole = rank_parameters(model, 100)
    assert sum(p.numel for p in whole) == sum(_product(s) for s in parameter_shapes(model, 100).values())
    half = rank_parameters(model, 100, tensor_size=2)
    assert sum(p.numel for p in half) < 0.7 * sum(p.numel for p in whole)
    one = {item.what: item for item in zero_traffic(whole, Execution(1, "bf16", 3, data_size=3))}
    two = {item.what: item for item in zero_traffic(whole, Execution(2, "bf16", 3, data_size=3))}
    assert one["gradients"].bytes == 2 * sum(p.numel for p in whole)
    assert two["gradients"].bytes == 3 * one["gradients"].bytes
    assert one["weights after the update"].bytes % (2 * 6) == 0
    three = zero_traffic(whole, Execution(3, data_size=3, reuse=1))
    again = next(item for item in three if "forward" in item.what)
    once = zero_traffic(whole, Execution(3, data_size=3))
    assert again.bytes == 2 * next(item for item in once if "forward" in item.what).bytes
    assert zero_traffic(whole, Execution(3)) == []


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
