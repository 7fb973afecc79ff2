"""The same steps from any number of workers and ranks; faults come through; workers end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.config.schema import DataConfig, MaskingConfig, RunConfig, TrainConfig
from janus_ds.data.stream.loader import (
    VALIDATION_EPOCH,
    StepData,
    StepLoader,
    validation_batches,
)
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.errors import ConfigError, DataError, ResourceError
from janus_ds.stream_mask import Segment
from tests.support.packed_data import SPECIAL, flip, random_rows, run_config, write_split
from tests.support.processes import takes, wait_until

ROWS = random_rows(50, 30)
STEPS = range(2, 8)  # 12 samples a step, 50 an epoch: epochs end inside


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("loader") / "train", {"target": ROWS})


def config(workers: int = 0, **data: object) -> RunConfig:
    base = run_config()
    return replace(base, data=replace(base.data, workers=workers, **data))


def load(
    split: Path, share: RankShare, steps: range = STEPS, workers: int = 0, run: RunConfig | None = None
) -> list[StepData]:
    maker = BatchMaker(split, run or config(workers), SPECIAL)
    return list(StepLoader(maker, share, steps.start, steps.stop))


def fingerprint(batch: TwoStreamBatch) -> tuple[object, ...]:
    tensors = tuple((name, tuple(t.shape), t.numpy().tobytes()) for name, t in batch.tensors())
    return batch.layout, batch.counts, tensors


def by_sample(batch: TwoStreamBatch) -> dict[int, tuple[object, ...]]:
    """The real rows of each sample: what a batch says about it, padding and neighbours aside."""
    result = {}
    for b, sample in enumerate(batch.sample_id_B.tolist()):
        rows = []
        for segment in Segment:
            columns = batch.layout.columns(segment)
            kept = batch.row_token_BR[b, columns] != SPECIAL.pad
            rows.append(batch.row_token_BR[b, columns][kept].tolist())
            rows.append(batch.row_position_BR[b, columns][kept].tolist())
        source = batch.source_BS[b, : batch.source_length_B[b]].tolist()
        result[sample] = (source, rows, batch.length_target_B[b].item())
    return result


def test_neither_workers_nor_the_first_step_change_anything(split):
    share = RankShare(0, 1, 4)
    alone = load(split, share)
    assert [data.step for data in alone] == list(STEPS)
    for workers, first in ((1, 2), (4, 2), (0, 5)):
        found = load(split, share, range(first, STEPS.stop), workers)
        for one, other in zip(alone[first - STEPS.start :], found, strict=True):
            assert (one.step, one.counts) == (other.step, other.counts)
            assert [fingerprint(b) for b in one.batches] == [fingerprint(b) for b in other.batches]
            assert torch.equal(one.sample_ids, other.sample_ids)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("ranks", "micro"), [(2, 6), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_ranks_together_make_the_global_batch(split, ranks, micro):
    whole = load(split, RankShare(0, 1, 12))
    parts = [load(split, RankShare(rank, ranks, micro)) for rank in range(ranks)]
    for at, data in enumerate(whole):
        shares = [part[at] for part in parts]
        assert {len(s.batches) for s in shares} == {12 // (ranks * micro)}
        ids = torch.cat([s.sample_ids for s in shares])
        assert sorted(ids.tolist()) == sorted(data.sample_ids.tolist())
        assert sum((s.counts for s in shares), BatchCounts()) == data.counts
        # In an epoch's last step a sample can come twice, under two epochs and so two masks.
        if len(set(ids.tolist())) == len(ids):
            ours: dict[int, tuple[object, ...]] = {}
            for share in shares:
                for batch in share.batches:
                    ours |= by_sample(batch)
            assert ours == by_sample(data.batches[0])


def test_equal_micro_batches_are_equal_in_bytes_on_any_rank(split):
    alone = [fingerprint(b) for data in load(split, RankShare(0, 1, 3)) for b in data.batches]
    ranks = [load(split, RankShare(rank, 2, 3)) for rank in (0, 1)]
    shared = [
        fingerprint(ranks[rank][at].batches[k]) for at in range(len(STEPS)) for k in (0, 1) for rank in (0, 1)
    ]
    assert alone == shared


def test_each_sample_once_an_epoch_and_new_masks_in_the_next(split):
    run = replace(config(), train=TrainConfig(global_batch=10, seed=3))
    data = load(split, RankShare(0, 1, 10), range(10), run=run)
    ids = torch.cat([d.sample_ids for d in data]).tolist()
    assert sorted(ids[:50]) == sorted(ids[50:]) == list(range(50))
    assert ids[:50] != ids[50:]
    first: dict[int, object] = {}
    second: dict[int, object] = {}
    for d in data:
        (first if d.step < 5 else second).update(by_sample(d.batches[0]))
    assert sum(first[i] != second[i] for i in range(50)) > 35


def test_packed_steps_come_back_whole(split):
    """And as arrays: a tensor would come by shared memory, which a killed worker leaves behind."""
    data = load(split, RankShare(0, 1, 4))[0]
    packed = bytes(ForkingPickler.dumps(data))
    assert b"torch.multiprocessing" not in packed
    again = pickle.loads(packed)
    assert [fingerprint(b) for b in again.batches] == [fingerprint(b) for b in data.batches]


def broken(tmp_path: Path) -> Path:
    """A split of which one member (samples 24 .. 27) has a flipped bit."""
    folder = write_split(tmp_path / "train", {"target": ROWS})
    maker = BatchMaker(folder, config(), SPECIAL)
    blob = maker.source.parts[0].index.shards[1].members[1].blobs["target.tokens"]
    flip(folder / "shard-000001.tar", blob.offset + 3, 64)
    return folder


def test_an_error_in_a_worker_arrives_as_it_is(tmp_path):
    folder = broken(tmp_path)
    caught = []
    for workers in (0, 2):
        with pytest.raises(DataError) as error:
            load(folder, RankShare(0, 1, 12), range(5), workers)
        caught.append((error.value.what, error.value.where, error.value.fix, str(error.value)))
    assert caught[0] == caught[1]
    assert "was changed since it was written" in caught[0][0]
    assert caught[0][1].endswith("shard-000001.tar, member 000006")
    assert "verify" in caught[0][2]
    assert not multiprocessing.active_children()


def test_workers_outlive_a_stop_signal_and_end_with_the_loader(split):
    loader = StepLoader(BatchMaker(split, config(2), SPECIAL), RankShare(0, 1, 4), 0, 40)
    steps = iter(loader)
    next(steps)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        wait_until(lambda pid=child.pid: takes(pid, signal.SIGTERM, "SigIgn"), 120, "the worker's start")
        os.kill(child.pid, signal.SIGTERM)
    assert [next(steps).step for _ in range(12)] == list(range(1, 13))
    steps.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_while_it_writes_is_reported(split, workers):
    loader = StepLoader(BatchMaker(split, config(workers), SPECIAL), RankShare(0, 1, 4), 0, 1000)
    steps = iter(loader)
    next(steps)
    # Steps of 40 kB and a pipe that holds 64: full, it has a part of one.
    results = steps.gi_frame.f_locals["items"]._worker_result_queue
    wait_until(lambda: not select.select([], [results._writer], [], 0)[1], 120, "the pipe to be full")
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match="data worker process was killed"):
        for _ in steps:
            pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("rows", "change", "what", "fix"),
    [
        ([[7] * 41], {}, "41 target tokens, data.block_tokens allows 40", "raise data.block_tokens"),
        (
            [[7] * 63],
            {"block_tokens": 100},
            "65 target tokens with bos and eos",
            "model.max_target_positions",
        ),
        ([[]], {}, "no target token", "empty lines"),
        ([[7, 500, 7]], {}, "the target has token 500, the tokenizer has 500 symbols", "use the tokenizer"),
    ],
)
def test_unfit_samples_are_named(tmp_path, rows, change, what, fix):
    good = [[8, 9]] * 9
    folder = write_split(tmp_path / "train", {"target": [*good, *rows, *good]})
    maker = BatchMaker(folder, config(**change), SPECIAL)
    with pytest.raises(DataError, match=what) as caught:
        maker.make((np.zeros(3, np.int64), np.array([8, 9, 10])))
    assert caught.value.where.endswith("train/shard-000000.tar, member 000002, sample 1")
    assert fix in caught.value.fix
    maker.make((np.zeros(2, np.int64), np.array([8, 10])))


def test_a_source_longer_than_the_encoders_table_is_named(tmp_path):
    pairs = {"source": [[7] * 62, [7] * 63], "target": [[8], [8]]}
    folder = write_split(tmp_path / "train", pairs)
    maker = BatchMaker(folder, run_config(task="pair"), SPECIAL)
    maker.make((np.zeros(1, np.int64), np.array([0])))
    with pytest.raises(DataError, match=r"65 source tokens .* allows 64"):
        maker.make((np.zeros(1, np.int64), np.array([1])))


def test_no_draw_of_noise_is_too_long_for_the_encoder(tmp_path):
    """Blocks that fill the table: a run would end after many updates, and again at each further start."""
    folder = write_split(tmp_path / "train", {"target": [[8] * 62] * 200})
    run = run_config(data=DataConfig(block_tokens=62, workers=0), masking=MaskingConfig(poisson=0.5))
    step = BatchMaker(folder, run, SPECIAL).make((np.zeros(200, np.int64), np.arange(200)))
    assert step["views"].source.lengths.max() == 64


def test_contradictions_are_refused(split, tmp_path):
    with pytest.raises(ConfigError, match="prepared for task 'denoise'"):
        BatchMaker(split, run_config(task="pair"), SPECIAL)
    empty = write_split(tmp_path / "empty", {"target": []})
    with pytest.raises(DataError, match="holds no sample"):
        load(empty, RankShare(0, 1, 12))
    with pytest.raises(DataError, match="no sample to validate on"):
        next(validation_batches(BatchMaker(empty, config(), SPECIAL), RankShare(0, 1, 4), 8))


@pytest.mark.parametrize(
    ("ranks", "micro", "samples"), [(1, 4, 11), (2, 4, 11), (3, 4, 13), (4, 5, 3), (2, 4, 99)]
)
def test_validation_sees_each_sample_once(split, ranks, micro, samples):
    maker = BatchMaker(split, config(), SPECIAL)
    whole = {}
    for item in validation_batches(maker, RankShare(0, 1, 50), samples):
        whole |= by_sample(item.batch)
    parts = [list(validation_batches(maker, RankShare(r, ranks, micro), samples)) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    counted = [item.batch for part in parts for item in part if item.counted]
    ids = torch.cat([batch.sample_id_B for batch in counted]).tolist()
    assert sorted(ids) == list(range(min(samples, 50)))
    ours: dict[int, tuple[object, ...]] = {}
    for batch in counted:
        ours |= by_sample(batch)
    assert ours == whole


def test_validation_masks_are_those_of_their_own_epoch(split):
    maker = BatchMaker(split, config(), SPECIAL)
    item = next(validation_batches(maker, RankShare(0, 1, 4), 4))
    masked = maker.make((np.full(4, VALIDATION_EPOCH), np.arange(4)))["batches"][0]
    assert fingerprint(item.batch) == fingerprint(masked)
