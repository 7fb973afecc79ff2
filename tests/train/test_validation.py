"""Which validation is the best one, and what a full disk does to its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from janus_ds.checkpoint import manager as best_module
from janus_ds.checkpoint.manifest import WEIGHTS_FILE, fault_of
from janus_ds.checkpoint.tensors import read_weights
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import CheckpointError
from janus_ds.parallel.topology import Topology
from janus_ds.train.state import Meters
from janus_ds.train.trainer import Trainer
from janus_ds.train.validation import BestWeights
from janus_ds.train.watchdog import Watchdog


@dataclass
class Run:
    """A run of validations with one weight, whose value is the step."""

    root: Path
    train: TrainConfig
    meters: Meters = field(default_factory=Meters)
    gathered: int = 0

    def validate(self, step: int, loss: float, **scores: float) -> None:
        def weights() -> dict[str, Tensor]:
            self.gathered += 1
            return {"w": torch.tensor([float(step)])}

        best = BestWeights(self.train, self.meters, self.root, Topology(torch.device("cpu")))
        best.judge(step, {"loss": loss}, scores, weights)

    @property
    def kept(self) -> tuple[int, dict[str, Any]]:
        assert fault_of(self.root / "best") is None
        record: dict[str, Any] = json.loads((self.root / "best/best.json").read_text())
        return int(read_weights(self.root / "best" / WEIGHTS_FILE)["w"]), record


def test_the_lowest_held_out_loss_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, TrainConfig(keep_best="loss", patience=3))
    for step, loss in enumerate([float("nan"), 5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.0], 1):
        run.validate(step, loss)
        assert not run.meters.finished
    assert run.kept[0] == run.meters.best_step == 6
    assert run.kept[1] == {"step": 6, "valid_loss": 3.0, "valid_bleu": {}, "mode": "loss"}
    assert run.gathered == 3
    run.validate(9, 3.1)
    assert run.meters.finished


def test_the_highest_bleu_of_the_mode_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, TrainConfig(keep_best="nar"))
    for step, score in enumerate([0.0, 7.0, 6.0], 1):
        run.validate(step, 1.0 / step, ar=50.0 + step, nar=score)
    assert run.kept[0] == 2
    assert (run.meters.best_bleu, run.meters.best_loss, run.meters.stale_validations) == (7.0, 0.5, 0)
    best = {"nmt by ar, all samples": 53.0, "nmt by nar, 4 iterations, all samples": 7.0}
    assert run.meters.best_scores == best
    off = Run(tmp_path / "off", TrainConfig())
    off.validate(1, 1.0, ar=3.0)
    assert not off.root.exists()


@pytest.mark.parametrize(("keep", "words"), [("loss", ""), ("ar", "; best 30.00")])
def test_the_best_score_is_shown_where_scores_decide(tmp_path: Path, keep: str, words: str) -> None:
    train = TrainConfig(keep_best=keep, valid_bleu="ar")
    run = Run(tmp_path, train)
    run.validate(1, 2.0, ar=30.0)
    trainer = MagicMock(step=2, meters=run.meters, _train=train)
    trainer._validator.losses.return_value = {"loss": 3.0}
    trainer._score.return_value = {"ar": 25.0}
    assert Trainer._validate(trainer) == {"valid/loss": 3.0, "valid/bleu_ar": 25.0}
    assert trainer._reporter.note.call_args.args == (f"step 2 BLEU: ar 25.00{words}",)


class OtherRank(Topology):
    """The second of two ranks, whose first one has met a fault."""

    def agree(self, code: int) -> int:
        return 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [CheckpointError("the model gives values that are not finite", "", ""), value]

    def broadcast_object(self, value: Any) -> Any:
        raise AssertionError("waits for a rank that has left")


@pytest.mark.parametrize("work", [Trainer._score, Trainer._sample])
def test_a_fault_of_the_rank_that_decodes_is_one_of_all(tmp_path: Path, work: Any) -> None:
    trainer: Any = Trainer.__new__(Trainer)
    trainer._topology = topology = OtherRank(torch.device("cpu"), rank=1, world_size=2)
    trainer.step, trainer._train = 100, TrainConfig()
    trainer._watchdog = Watchdog(topology, None, tmp_path, 0.0)
    trainer._memory, trainer._reporter, trainer._outputs = MagicMock(), MagicMock(), MagicMock()
    trainer._memory.during.return_value.__exit__.return_value = None
    trainer._engine = MagicMock(full_weights=lambda: None)
    with pytest.raises(CheckpointError, match="not finite"):
        work(trainer)


def test_patience_waits_for_every_mode(tmp_path: Path) -> None:
    """AR still rises where NAR, which decides what is kept, does not."""
    run = Run(tmp_path, TrainConfig(keep_best="nar", patience=2))
    for step, (ar, nar) in enumerate([(5.0, 5.0), (6.0, 4.0), (6.0, 4.0), (7.0, 4.0), (7.0, 5.0)], 1):
        run.validate(step, 1.0, ar=ar, nar=nar)
        assert not run.meters.finished
    run.validate(6, 1.0, ar=7.0, nar=5.0)
    assert run.meters.finished
    assert run.meters.best_step == 1


def test_patience_compares_scores_of_one_measure_only(tmp_path: Path) -> None:
    """Another start gives NAR fewer iterations: it rises again, below its best under the first ones."""
    before = Run(tmp_path, TrainConfig(keep_best="ar", patience=2))
    before.validate(1, 1.0, ar=9.0, nar=30.0)
    settings = TrainConfig(keep_best="ar", valid_bleu_iterations=0, patience=2)
    after = Run(tmp_path, settings, before.meters.judged_by(settings))
    for step, nar in enumerate([20.0, 21.0, 22.0], 2):
        after.validate(step, 1.0, ar=8.0, nar=nar)
        assert not after.meters.finished
    assert (after.meters.best_step, after.meters.stale_validations) == (1, 0)


def test_a_full_disk_is_a_warning_and_the_earlier_best_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, TrainConfig(keep_best="loss"))
    run.validate(1, 2.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(best_module, "write_tensors", full)
        run.validate(2, 1.0)
    assert "the best weights could not be written" in caplog.text
    assert "training goes on" in caplog.text
    assert run.kept[0] == run.meters.best_step == 1
    run.validate(3, 1.5)
    assert run.kept[0] == 3
