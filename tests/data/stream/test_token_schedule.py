"""Batches by token budget: one order for any number of ranks, full, balanced, of like length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from janus_ds.batch import BatchCounts
from janus_ds.config.schema import MaskingConfig, RunConfig
from janus_ds.data.stream.loader import StepData, StepLoader, make_step_plan
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.stream.token_schedule import (
    Group,
    SampleCosts,
    TokenSchedule,
    expected_rows,
    sample_costs,
    share_out,
)
from janus_ds.errors import ConfigError, DataError
from tests.support.packed_data import SPECIAL, random_rows, run_config, write_split

MEMBERS = np.array([200, 200, 37, 200, 200, 163]) * 4


def costs() -> SampleCosts:
    draw = np.random.default_rng(0)
    target = np.minimum(draw.poisson(12, 4000) + draw.poisson(3, 4000), 60) + 3
    source = np.maximum(target + draw.integers(-4, 5, 4000), 3)
    return SampleCosts(target, source, np.maximum(target, source).astype(float), 4.0 * target + source)


def schedule(c: SampleCosts, seed: int = 1, budget: float = 400, groups: int = 2) -> TokenSchedule:
    return TokenSchedule(seed, MEMBERS, c, 3, budget, groups)


def test_every_epoch_holds_each_sample_once_in_equally_many_groups_and_another_order():
    c = costs()
    plan = schedule(c, groups=1)
    n = plan.groups_per_epoch
    epochs = [[plan.groups(step)[0] for step in range(e * n, (e + 1) * n)] for e in range(3)]
    for number, groups in enumerate(epochs):
        assert {group.epoch for group in groups} == {number}
        assert np.array_equal(np.sort(np.concatenate([g.ids for g in groups])), np.arange(4000))
    assert [g.ids.tolist() for g in epochs[0]] != [g.ids.tolist() for g in epochs[1]]
    # Groups are mixed anew, not only put into another order.
    first = {frozenset(g.ids.tolist()) for g in epochs[0]}
    assert len(first & {frozenset(g.ids.tolist()) for g in epochs[1]}) < 3


def test_groups_keep_to_the_budget_are_nearly_full_and_hardly_padded():
    c = costs()
    plan = schedule(c, groups=1)
    groups = [plan.groups(step)[0].ids for step in range(plan.groups_per_epoch)]
    filled = np.array([len(ids) * c.width_N[ids].max() for ids in groups])
    assert filled.max() <= 400
    assert filled.mean() > 0.8 * 400
    padded = sum(len(ids) * c.target_N[ids].max() for ids in groups)
    assert c.target_N.sum() / padded > 0.95
    random = sum(len(ids) * c.target_N[ids].max() for ids in np.array_split(np.arange(4000), len(groups)))
    assert c.target_N.sum() / random < 0.75


def test_the_order_is_a_function_of_seed_and_lengths_and_starts_anywhere():
    c = costs()
    late, early = schedule(c), schedule(c)
    wanted = [[g.ids.tolist() for g in early.groups(step)] for step in range(60)]
    assert [g.ids.tolist() for g in late.groups(59)] == wanted[59]
    assert [g.ids.tolist() for g in late.groups(3)] == wanted[3]
    assert [g.ids.tolist() for g in schedule(c, seed=2).groups(3)] != wanted[3]


@pytest.mark.parametrize(("groups", "parts"), [(1, 2), (2, 2), (2, 4), (4, 2), (4, 1), (3, 2), (2, 3)])
def test_parts_hold_the_groups_and_are_balanced(groups, parts):
    c = costs()
    plan = schedule(c, groups=groups)
    spread = []
    for step in range(20):
        found = plan.groups(step)
        shared = share_out(found, c, parts)
        assert len(shared) == parts
        pairs = [(int(e), int(i)) for epochs, ids in shared for e, i in zip(epochs, ids, strict=True)]
        assert sorted(pairs) == sorted((g.epoch, int(i)) for g in found for i in g.ids)
        work = [c.rows_N[ids].sum() for _, ids in shared]
        spread.append(max(work) / (sum(work) / parts))
    assert np.mean(spread) < 1.2


def test_no_part_is_empty_even_with_one_heavy_sample():
    c = SampleCosts(*(np.array([50, 3, 3, 3, 3]) for _ in range(2)), *(np.array([50.0, 3, 3, 3, 3]),) * 2)
    for ids in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        for parts in (2, 3, 4, 5):
            shared = share_out([Group(0, np.array(ids))], c, parts)
            assert all(len(part) for _, part in shared)
            assert sorted(int(i) for _, part in shared for i in part) == [0, 1, 2, 3, 4]


def test_an_update_mixes_lengths_over_its_groups():
    c = costs()
    plan = schedule(c, groups=4)
    means = [np.mean([c.target_N[g.ids].mean() for g in plan.groups(step)]) for step in range(10)]
    single = schedule(c, groups=1)
    alone = [c.target_N[single.groups(step)[0].ids].mean() for step in range(40)]
    assert np.std(means) < 0.7 * np.std(alone)


def test_a_sample_beyond_the_budget_and_no_sample_are_refused():
    with pytest.raises(ConfigError, match=r"sample \d+ alone counts") as error:
        schedule(costs(), budget=20)
    assert "batch_tokens" in error.value.where
    assert "raise train.batch_tokens" in error.value.fix
    nothing = SampleCosts(*(np.zeros(0, dtype=np.int64),) * 2, *(np.zeros(0),) * 2)
    with pytest.raises(DataError, match="holds no sample"):
        TokenSchedule(1, np.zeros(0, dtype=np.int64), nothing, 3, 100, 1)


def test_expected_rows_count_the_streams():
    inner = np.array([10])
    masking = MaskingConfig(target="span_union", target_share=0.7)
    # 3 N + 2 M: AR content and queries of N - 1 rows, N for the original part, 2 M for AUX.
    assert expected_rows(inner, 2, True, True, masking)[0] == 2 * 11 + 12 + 2 * 7
    assert expected_rows(inner, 1, False, False, masking)[0] == 11
    uniform = MaskingConfig(target="uniform", target_share=0.0)
    assert expected_rows(inner, 0, True, True, uniform)[0] == 12 + 10


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "train"
    return write_split(folder, {"source": random_rows(90, 30, 1), "target": random_rows(90, 30, 2)})


def token_config(**train: object) -> RunConfig:
    base = run_config(task="pair")
    train = {"batch_tokens": 300, "batch_groups": 2, "seed": 3, **train}
    return replace(
        base,
        data=replace(base.data, batch="tokens", shuffle_window=30),
        train=replace(base.train, **train),
    )


def load(split: Path, share: RankShare, run: RunConfig | None = None, start: int = 0) -> list[StepData]:
    maker = BatchMaker(split, run or token_config(), SPECIAL)
    return list(StepLoader(maker, share, start, start + 6))


def test_lengths_come_from_the_offsets_alone(split):
    maker = BatchMaker(split, token_config(), SPECIAL)
    samples = maker.source.read(np.arange(90))
    begun = maker.source.arriving()
    lengths = maker.source.parts[0].lengths()
    assert maker.source.arriving() != begun  # which the watchdog looks at
    assert all(np.array_equal(lengths[name], samples[name].lengths) for name in samples)
    c = sample_costs(maker.source.parts[0], maker.kinds, maker.config)
    assert np.array_equal(c.width_N, np.maximum(samples["source"].lengths, samples["target"].lengths) + 2)


def test_ranks_together_read_what_one_rank_reads_in_equally_many_batches(split):
    whole = load(split, RankShare(0, 1, 8, 1))
    for ranks, accumulation in ((2, 1), (2, 2), (1, 3)):
        parts = [load(split, RankShare(rank, ranks, 8, accumulation)) for rank in range(ranks)]
        for at, data in enumerate(whole):
            shares = [part[at] for part in parts]
            assert {len(s.batches) for s in shares} == {accumulation}
            ids = torch.cat([s.sample_ids for s in shares])
            assert sorted(ids.tolist()) == sorted(data.sample_ids.tolist())
            assert sum((s.counts for s in shares), BatchCounts()) == data.counts
    late = load(split, RankShare(0, 1, 8, 1), start=4)
    assert torch.equal(late[0].sample_ids, whole[4].sample_ids)
    assert torch.equal(late[0].batches[0].row_token_BR, whole[4].batches[0].row_token_BR)


def test_batches_are_the_same_samples_whatever_the_objective(split):
    found = []
    for preset in ("ar", "cmlm", "paper", "released"):
        base = run_config(preset, task="pair")
        run = replace(token_config(), objective=base.objective, masking=base.masking)
        found.append([data.sample_ids.tolist() for data in load(split, RankShare(0, 1, 8, 1), run)])
    assert all(ids == found[0] for ids in found)


def test_too_many_ranks_for_the_smallest_batch_are_refused(split):
    maker = BatchMaker(split, token_config(), SPECIAL)
    with pytest.raises(ConfigError, match=r"smallest batch has \d+ samples, for 40 ranks x 2") as caught:
        make_step_plan(maker, RankShare(0, 40, 8, 2))
    assert "data.shuffle_window" in caught.value.fix


def test_the_smallest_batch_may_hold_a_group_twice_where_an_epoch_begins():
    """The few samples of the last members can come last in one epoch and first in the next."""
    target = np.random.default_rng(1).integers(5, 40, 2049)
    c = SampleCosts(target, target, target.astype(float), target.astype(float))
    plan = TokenSchedule(1, np.array([256] * 8 + [1]), c, 8, 400, 2)
    borders = [plan.groups((n + 1) * plan.groups_per_epoch // 2) for n in range(80)]
    assert min(sum(len(g.ids) for g in groups) for groups in borders) == plan.smallest_step == 2
    even = TokenSchedule(1, np.array([256] * 8 + [1]), c, 8, 400, 1)
    assert even.smallest_step == 1


def test_a_sample_that_no_step_has_room_for_is_named_before_the_first(split):
    run, share = token_config(), RankShare(0, 1, 8, 1)
    longest = int(BatchMaker(split, run, SPECIAL).source.parts[0].lengths()["target"].max())
    short = replace(run, data=replace(run.data, block_tokens=longest - 1))
    with pytest.raises(
        DataError, match=f"{longest} target tokens, data.block_tokens allows {longest - 1}"
    ) as caught:
        make_step_plan(BatchMaker(split, short, SPECIAL), share)
    assert "member" in caught.value.where
    make_step_plan(
        BatchMaker(split, replace(run, data=replace(run.data, block_tokens=longest)), SPECIAL), share
    )
    # A stage of the user's own may cut it.
    make_step_plan(BatchMaker(split, short, SPECIAL, [wds.map(dict)]), share)
