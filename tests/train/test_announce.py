"""What a run says of itself, and how it shows that it goes on."""

from __future__ import annotations

import os
import re
import shutil
import sys
import termios
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from janus_ds.config.deepspeed import read_setup
from janus_ds.config.load import load_run_config
from janus_ds.data.stream.index import Manifest
from janus_ds.errors import DataError
from janus_ds.parallel.topology import Topology
from janus_ds.progress import Progress, duration
from janus_ds.train.build_run import build_run
from janus_ds.train.reporting import ProgressBar, Reporter, announce_end, announce_start
from janus_ds.train.state import Meters
from janus_ds.train.trainer import Outcome, Trainer

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests/golden/frozen"


def test_a_run_begins_with_what_it_is_and_ends_with_what_comes_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    topology = Topology(torch.device("cpu"), world_size=4, data_size=2, tensor_size=2)
    settings = [f"data.path={FROZEN / 'data'}", "data.batch=samples", "train.global_batch=32"]
    config, execution = read_setup(
        FROZEN / "recipe.yaml", settings, ROOT / "ds_configs/zero2.json", 2, tensor_size=2
    )
    run = build_run(config, execution, tmp_path / "my run", topology)
    announce_start(run, topology, 3)
    said = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().err.splitlines()[1:])
    size = run.train.source.samples
    assert " M parameters: " in said["model"]
    assert (
        said["data"]
        == f"{FROZEN / 'data'}: {size:,} samples to train on, {run.valid.source.samples:,} held out"
    )
    assert said["batch"] == "32 samples = 16 micro x 1 accumulation x 2 data-parallel"
    assert said["ranks"].startswith("4 = 2 data-parallel x 2 tensor-parallel on cpu, threads ")
    assert said["engine"] == "fp32, ZeRO 2"
    assert said["steps"].endswith("going on from 3")
    assert said["weights"] == "from the run's own checkpoint of step 3"
    announce_end(run, topology, 9, Meters(samples=2 * size, tokens=1234, seconds=286.0))
    ended = capsys.readouterr().err
    assert f"({2.0} epochs), 1,234 tokens in 4 min 46 s of steps" in ended
    assert f"janus-ds decode --checkpoint '{tmp_path / 'my run'}' --mode ar,nar --heldout 3" in ended
    no_way = replace(run.config.objective, weight_ar=0.0, weight_length=0.0)
    announce_end(replace(run, config=replace(run.config, objective=no_way)), topology, 9, Meters())
    assert "janus-ds decode" not in (ended := capsys.readouterr().err)
    assert "janus-ds report" in ended
    announce_start(run, Topology(torch.device("cpu"), rank=1, world_size=2), 0)
    assert capsys.readouterr().err == ""


def test_epochs_of_a_mixture_are_those_of_each_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    alone, data, copy = Topology(torch.device("cpu")), FROZEN / "data", tmp_path / "copy"
    shutil.copytree(data, copy)
    settings = [f"data.path={data}=3,{copy}=1", "data.batch=samples", "train.max_steps=10"]
    setup = read_setup(FROZEN / "recipe.yaml", settings, ROOT / "ds_configs/zero2.json", 1)
    run = build_run(*setup, tmp_path / "run", alone)
    announce_end(run, alone, 10, Meters(samples=2 * run.train.source.samples))
    announce_start(run, alone, 0)
    ended = capsys.readouterr().err
    assert f" samples (3.0 epochs of {data / 'train'}, 1.0 epochs of {copy / 'train'}), " in ended
    assert re.search(rf"steps +10 \(\d\.\d epochs of {data / 'train'}, ", ended)


def test_validation_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    copy, alone = shutil.copytree(FROZEN / "data", tmp_path / "data"), Topology(torch.device("cpu"))
    settings = [f"data.path={FROZEN / 'data'}", f"data.valid_path={copy / 'valid'}", "train.valid_bleu=none"]
    settings.append("train.keep_best=none")
    setup = read_setup(FROZEN / "recipe.yaml", settings, ROOT / "ds_configs/zero2.json", 1)
    build_run(*setup, tmp_path / "run", alone)
    replace(Manifest.load(copy), tokenizer_fingerprint="ab" * 32).save(copy)
    with pytest.raises(DataError, match="prepared with another tokenizer") as caught:
        build_run(*setup, tmp_path / "run", alone)
    assert str(copy / "valid") in caught.value.where
    (copy / "manifest.json").unlink()
    build_run(*setup, tmp_path / "run", alone)


def test_a_validation_that_is_made_up_for_is_no_step_of_the_bar(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A stop has interrupted the validation of the last step; the next start does it, and no step."""
    run: Any = SimpleNamespace(config=load_run_config(None, ["train.max_steps=6"]), folder=tmp_path)
    run.tokenizer = SimpleNamespace(special=SimpleNamespace(vocab_size=8))
    engine: Any = SimpleNamespace(topology=Topology(torch.device("cpu")), dtype=torch.float32)
    reporter = Reporter(run, engine, 6, Meters(unvalidated={"loss": 1.0}))
    reporter.write(6, {"loss": 1.0})
    reporter.close()
    assert capsys.readouterr().err.endswith("step 6 of 6, 0 s left: loss 1.000\n")


@pytest.mark.parametrize("step", [0, 3])
def test_a_stop_says_that_a_step_is_saved_only_where_there_is_one(
    step: int, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = SimpleNamespace(close=lambda: None, leave=lambda: None, reason="SIGTERM")
    trainer: Any = SimpleNamespace(step=step, _train=SimpleNamespace(max_steps=9), _finish=lambda: None)
    trainer._signals = trainer._reporter = nothing
    assert Trainer._stop(trainer) is Outcome.STOPPED
    said = {
        0: ["asked to stop (SIGTERM) before the first step"],
        3: [
            "asked to stop (SIGTERM): saving at step 3",
            "not complete: step 3 of 9 is saved; the same command goes on",
        ],
    }
    assert caplog.messages == said[step]


def test_off_a_terminal_lines_are_dated_and_nothing_is_written_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = ProgressBar(4, 6, visible=True)
    bar.advance({"loss": 2.0, "ar": 1.0})
    bar.note("step 5 held out: loss 2.000")
    bar.advance({"loss": 1.5, "tokens_per_second": 1234.5})
    bar.close()
    note, last = capsys.readouterr().err.splitlines()
    assert note == "step 5 held out: loss 2.000"
    assert last.split(" ", 2)[2] == "step 6 of 6, 0 s left: loss 1.500, 1,234 tokens/s"
    ProgressBar(0, 2, visible=False).advance({"loss": 1.0})
    Progress(0.0).show("hidden", now=True)
    assert capsys.readouterr().err == ""
    assert [duration(x) for x in (3.6, 286, 7380)] == ["4 s", "4 min 46 s", "2 h 3 min"]


def test_figures_of_an_earlier_step_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(0, 3, visible=True)
    bar.advance({"loss": 2.0})
    bar.advance({})
    bar.advance({})
    assert capsys.readouterr().err.endswith("step 3 of 3, 0 s left; step 1: loss 2.000\n")


def test_on_a_narrow_terminal_a_line_takes_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wraps would leave its first row behind, five times a second."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        line = Progress()
        for number in range(3):
            line.show(f"step {number}, " + "x" * 100, now=True)
        line.end()
        shown = ""
        while not shown.endswith("\n"):
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    rows = shown.rstrip().split("\r\x1b[K")[1:]
    assert [row[:7] for row in rows] == ["step 0,", "step 1,", "step 2,"]
    assert {len(row) for row in rows} == {39}
