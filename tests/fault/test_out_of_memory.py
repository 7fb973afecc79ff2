"""One of two ranks has no memory left: it says what of, the other ends as well and names it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch

from janus_ds.cli.train import train_and_exit
from janus_ds.config.deepspeed import TrainOptions
from janus_ds.errors import ResourceError, TrainingError
from janus_ds.observe import read_metrics
from janus_ds.train.engine import TrainingStep
from janus_ds.train.signals import StopSignals
from tests.support.launch import let_ranks_end
from tests.support.processes import wait_until
from tests.support.tiny_training import make_inputs


def too_much(folder: Path) -> None:
    """Train; rank 1 asks for 140 TB in its fourth forward pass, the second of its second step."""
    original, count = TrainingStep.forward, 0

    def first_step_is_written() -> bool:
        lines = read_metrics(folder / "run/metrics.jsonl")
        return len(lines) == 1 and (folder / "run/checkpoints/step-00000001").exists()

    def forward(self: TrainingStep, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4 and os.environ["RANK"] == "1":
            wait_until(first_step_is_written, 600, "the first step's line and checkpoint")
            torch.empty(1 << 45)
        return original(self, *arguments)

    TrainingStep.forward = forward  # type: ignore[method-assign]
    config = folder / f"zero2-{os.environ['RANK']}.json"
    config.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2}')
    options = TrainOptions(
        deepspeed_config=config,
        recipe=folder / "recipe.yaml",
        overrides=(f"data.path={folder / 'data'}", "train.save_every=1"),
        output=folder / "run",
        tensor_parallel=1,
    )
    raise SystemExit(train_and_exit(options, StopSignals()))


def test_the_rank_speaks_and_the_others_name_it(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path)
    first, second = let_ranks_end(too_much, 2, folder)
    assert second.code == ResourceError.exit_code, second.text
    assert "error: out of memory: " in second.text
    assert "tried to allocate 140737488355328 bytes" in second.text
    assert (
        "where: rank 1, in the forward pass of step 2, micro-batch 2; micro-batch of 2 samples: "
        in second.text
    )
    assert "train_micro_batch_size_per_gpu 2 -> 1 with gradient_accumulation_steps 2 -> 4" in second.text
    assert first.code == TrainingError.exit_code, first.text
    assert "error: another rank was lost" in first.text
    assert f"where: rank 1 on {socket.gethostname()}" in first.text
    for rank in (first, second):
        assert "Traceback" not in rank.text
        assert not rank.leftovers
    assert len(read_metrics(folder / "run/metrics.jsonl")) == 1
    assert [path.name for path in (folder / "run/checkpoints").glob("step-*")] == ["step-00000001"]
