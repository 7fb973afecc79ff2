"""Training is the same computation on any ranks, ZeRO stage and tensor-parallel size.

Three jobs (one process, two data-parallel ranks, two tensor-parallel ranks), each of which trains
several tiny models one after the other: a start of ranks costs more than a run. Bad losses and
gradients on one rank: tests/fault/test_not_finite.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from janus_ds.data.stream.source import SampleSource
from janus_ds.errors import DataError, JanusError
from janus_ds.parallel.tensor_parallel import make_layers
from janus_ds.parallel.topology import Topology, init_topology
from janus_ds.train.trainer import Outcome
from tests.support.bad_steps import bad_passes
from tests.support.launch import run_ranks
from tests.support.tiny_training import (
    NO_DROPOUT,
    Result,
    Run,
    allow_fp16,
    assert_bitwise,
    assert_close_weights,
    assert_same_training,
    train,
)

STEPS = 20
SHORT = ("train.max_steps=5", "train.save_every=1", "train.valid_every=0", "train.keep_last=9")
RECOMPUTED = "train.activation_checkpointing=true"
DRAWS = (
    "objective.encoder_passes=2",
    *(f"objective.weight_kl_{name}_{name}=1" for name in ("ar", "nar", "aux")),
    "masking.aux_order=random",
    *SHORT,
)
"""Two dropout draws of everything; without dropout they are equal, so that all ranks can be compared."""
HALF = ("train.max_steps=2", *SHORT[1:])


# What the ranks do. Results of rank 0 are returned; other ranks return what is to be compared.


def one_process(folder: Path) -> dict[str, Result]:
    topology = init_topology(1, process_group=True)
    runs = [
        Run("reference", stage=1, overrides=NO_DROPOUT),
        Run("accumulated", stage=2, micro_batch=4, overrides=NO_DROPOUT),
        Run("unpartitioned", stage=0, overrides=NO_DROPOUT),
        Run("draws", stage=0, overrides=(*NO_DROPOUT, *DRAWS)),
    ]
    return {run.name: train(folder, topology, run) for run in runs}


def data_ranks(folder: Path) -> dict[str, Any]:
    topology = init_topology(1)
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        run = Run(f"zero{stage}", stage=stage, micro_batch=2, overrides=NO_DROPOUT)
        results[run.name] = train(folder, topology, run)
        draws = Run(f"draws{stage}", stage=stage, micro_batch=2, overrides=(*NO_DROPOUT, *DRAWS))
        results[draws.name] = train(folder, topology, draws)
    results["whole"] = train(folder, topology, Run("whole", 1, overrides=SHORT))
    train(folder, topology, Run("resumed", 1, overrides=HALF))
    results["resumed"] = train(folder, topology, Run("resumed", 1, overrides=SHORT))
    allow_fp16()
    # The dynamic loss scale starts too high.
    half = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 18, "hysteresis": 1}}
    results["fp16"] = train(folder, topology, Run("fp16", 2, 2, NO_DROPOUT, half))
    with bad_passes({2: "stop"}, topology, rank=1):
        results["stopped"] = train(folder, topology, Run("stopped", overrides=SHORT))
    results["refused"] = refused(folder, topology)
    return results


def refused(folder: Path, topology: Topology) -> JanusError | None:
    """The error that this rank ends with, where only rank 1 has damaged data."""
    read = SampleSource.read

    def damaged(self: SampleSource, ids: Any) -> Any:
        if topology.rank == 1 and self.name.endswith("train"):
            raise DataError("the checksum is wrong", "shard-000001.tar, member 000003", "copy it again")
        return read(self, ids)

    SampleSource.read = damaged  # type: ignore[method-assign]
    try:
        train(folder, topology, Run("damaged", overrides=SHORT))
    except JanusError as error:
        return error
    finally:
        SampleSource.read = read  # type: ignore[method-assign]
    return None


def tensor_ranks(folder: Path) -> dict[str, Any]:
    topology = init_topology(2)
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        run = Run(f"tensor{stage}", stage=stage, micro_batch=4, overrides=NO_DROPOUT)
        results[run.name] = train(folder, topology, run)
    results["whole"] = train(folder, topology, Run("t-whole", overrides=SHORT))
    train(folder, topology, Run("t-resumed", overrides=HALF))
    results["resumed"] = train(folder, topology, Run("t-resumed", overrides=SHORT))
    results["recomputed"] = train(folder, topology, Run("t-recomputed", 2, overrides=(*SHORT, RECOMPUTED)))
    results["tensor-draws"] = train(folder, topology, Run("t-draws", 1, 4, (*NO_DROPOUT, *DRAWS, RECOMPUTED)))
    results["drawn"] = train(folder, topology, Run("t-drawn", 2, overrides=DRAWS))
    drawn_again = Run("t-drawn-again", 2, overrides=(*DRAWS, RECOMPUTED))
    results["drawn-again"] = train(folder, topology, drawn_again)
    layers = make_layers(2)
    layers.seed_rng(5)
    results["replicated"] = F.dropout(torch.ones(200), 0.5)
    with layers.sharded_rng():
        results["sharded"] = F.dropout(torch.ones(200), 0.5)
    return results


def four_ranks(folder: Path) -> dict[str, Result]:
    topology = init_topology(2)
    runs = [Run(f"both{stage}", stage, micro_batch=2, overrides=NO_DROPOUT) for stage in (1, 2, 3)]
    return {run.name: train(folder, topology, run) for run in runs}


# One start of each.


@pytest.fixture(scope="module")
def jobs(inputs: Path) -> Any:
    """The results of a job's ranks; each job is started when it is first asked for."""

    @cache
    def job(name: str) -> list[Any]:
        worker, ranks = {
            "one": (one_process, 1),
            "data": (data_ranks, 2),
            "tensor": (tensor_ranks, 2),
            "both": (four_ranks, 4),
        }[name]
        return run_ranks(worker, ranks, inputs)

    return job


def test_losses_fall_and_accumulation_changes_nothing(jobs: Any) -> None:
    one = jobs("one")[0]
    reference = one["reference"]
    assert reference.outcome is Outcome.COMPLETE
    losses = reference.series("loss")
    assert losses[-1] < losses[0] - 0.3
    assert len(reference.series("valid/loss")) == 2
    assert_same_training(one["accumulated"], reference, STEPS)
    assert_same_training(one["unpartitioned"], reference, STEPS)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_in_every_zero_stage_train_as_one_process(jobs: Any, stage: int) -> None:
    assert_same_training(jobs("data")[0][f"zero{stage}"], jobs("one")[0]["reference"], STEPS)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_tensor_parallel_ranks_train_as_one_process(jobs: Any, stage: int) -> None:
    assert_same_training(jobs("tensor")[0][f"tensor{stage}"], jobs("one")[0]["reference"], STEPS)


@pytest.mark.parametrize(
    ("job", "run"), [*(("data", f"draws{stage}") for stage in range(4)), ("tensor", "tensor-draws")]
)
def test_two_draws_train_alike_on_all_ranks(jobs: Any, job: str, run: str) -> None:
    """Two draws, two encoder passes, a random AUX order: in every ZeRO stage, tensor parallel, recomputed."""
    result, reference = jobs(job)[0][run], jobs("one")[0]["draws"]
    for key in ("loss", "ar", "nar", "aux", "length", "kl_ar_ar", "kl_nar_nar", "kl_aux_aux"):
        assert result.series(key) == pytest.approx(reference.series(key), rel=1e-5, abs=1e-6), key
    assert_close_weights(result, reference)


def test_two_draws_differ_under_dropout_and_recomputation_repeats_them(jobs: Any) -> None:
    results = jobs("tensor")[0]
    assert min(results["drawn"].series("kl_ar_ar")) > 1e-4
    assert_bitwise(results["drawn-again"], results["drawn"])


def test_resuming_is_bitwise_with_dropout_on(jobs: Any) -> None:
    """In stage 1; in 2: test_elastic.py, in 3: tests/fault/test_not_finite.py."""
    results = jobs("data")[0]
    assert [line["step"] for line in results["resumed"].lines] == [1, 2, 3, 4, 5]
    assert_bitwise(results["resumed"], results["whole"])


def test_fp16_finds_its_loss_scale_and_trains_as_fp32(jobs: Any) -> None:
    result, reference = jobs("data")[0]["fp16"], jobs("data")[0]["zero2"]
    scales = result.series("loss_scale")
    skipped = [line.get("skipped", False) for line in result.lines]
    assert scales[0] == 2**18
    assert 1 < scales[-1] < scales[0]
    assert 0 < sum(skipped) < 10
    assert result.series("valid/loss")[-1] == pytest.approx(reference.series("valid/loss")[-1], rel=0.08)


def test_resuming_is_bitwise_under_tensor_parallelism(jobs: Any) -> None:
    results = jobs("tensor")[0]
    assert_bitwise(results["resumed"], results["whole"])


def test_dropout_under_tensor_parallelism(jobs: Any) -> None:
    """Replicated rows drop alike, sharded ones apart, and recomputation draws the same again."""
    first, second = jobs("tensor")
    assert torch.equal(first["replicated"], second["replicated"])
    assert not torch.equal(first["sharded"], second["sharded"])
    assert_bitwise(first["recomputed"], first["whole"])


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tensor_and_data_parallel_ranks_together(jobs: Any, stage: int) -> None:
    assert_same_training(jobs("both")[0][f"both{stage}"], jobs("one")[0]["reference"], STEPS)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(jobs: Any) -> None:
    ranks = jobs("data")
    assert [rank["stopped"].outcome for rank in ranks] == [Outcome.STOPPED] * 2
    assert [line["step"] for line in ranks[0]["stopped"].lines] == [1, 2, 3]


def test_one_ranks_fault_is_every_ranks_error(jobs: Any) -> None:
    for rank in jobs("data"):
        assert isinstance(rank["refused"], DataError)
        assert rank["refused"].where == "shard-000001.tar, member 000003"
