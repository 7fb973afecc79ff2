"""Kills, signals and a full disk: nothing is lost, and the resumed run is the unbroken one bit for bit.

`make fault-test` runs the long form as well (marked heavy).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.checkpoint.manager import CheckpointManager, SavePolicy, step_of
from janus_ds.errors import PREEMPTED_EXIT_CODE, ResourceError, TrainingError
from janus_ds.observe.writers import read_metrics
from janus_ds.parallel.topology import Topology
from tests.support.launch import ROOT, free_port, kill_session
from tests.support.tiny_training import make_inputs
from tests.unit.test_meters import events

STEPS = 40
SETTINGS = (f"train.max_steps={STEPS}", "train.save_every=4", "train.valid_every=20", "data.workers=1")
PATIENCE = 180.0
ALONE = Topology(torch.device("cpu"))


@dataclass(frozen=True)
class Program:
    """The pretraining program with a run folder, on one process or on two by the deepspeed launcher."""

    inputs: Path
    run: Path
    ranks: int = 1
    settings: tuple[str, ...] = SETTINGS

    def command(self) -> list[str]:
        script = ["launch/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"]
        options = ["--recipe", str(self.inputs / "recipe.yaml"), "--data", str(self.inputs / "data")]
        start = [sys.executable]
        if self.ranks > 1:
            start = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(self.ranks)]
            start += ["--master_port", str(free_port())]
        return [*start, *script, *options, "--output", str(self.run), "--set", *self.settings]

    @contextmanager
    def running(self, before: Callable[[], None] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The program in a session of its own, all of which is killed at the end."""
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=before,
            )
            try:
                yield process
            finally:
                kill_session(process)

    def finish(self, before: Callable[[], None] | None = None) -> int:
        """Run to the end; returns the exit code."""
        with self.running(before) as process:
            return process.wait(PATIENCE)

    @property
    def log(self) -> Path:
        return self.inputs / f"{self.run.name}.log"

    @property
    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        lines = read_metrics(self.run / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    @property
    def checkpoint(self) -> int:
        """The step of the checkpoint that a start would find, after verifying it."""
        found = CheckpointManager(self.run / "checkpoints", SavePolicy(), ALONE).latest()
        return 0 if found is None else step_of(found) or 0

    @property
    def saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".saving-*"))

    @property
    def said(self) -> str:
        """All that its starts have printed."""
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("fault"))


@pytest.fixture(scope="module")
def unbroken(inputs: Path) -> Path:
    """The run without kills."""
    program = Program(inputs, inputs / "unbroken")
    assert program.finish() == 0, program.log.read_text()[-3000:]
    return program.run


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the program ended early ({process.poll()}):\n{log.read_text()[-3000:]}")
        time.sleep(0.001)


def kill_at_step(program: Program, step: int, delay: float) -> None:
    with program.running() as process:
        wait_for(lambda: program.steps >= step, process, program.log)
        time.sleep(delay)


def kill_in_save(program: Program, delay: float) -> bool:
    """Kill shortly after a save has begun; returns whether it left a torn one."""
    start = program.checkpoint
    with program.running() as process:
        # The first save of this start: later ones would let the run end before the next kill.
        wait_for(lambda: program.saving, process, program.log)
        time.sleep(delay)
    torn = program.saving
    assert program.checkpoint >= start
    return torn


def assert_as_unbroken(run: Path, unbroken: Path, steps: int = STEPS) -> None:
    """Weights, moments, every figure of every step, one value a step in both files."""
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-{steps:08d}/{name}"
        assert (run / path).read_bytes() == (unbroken / path).read_bytes()
    keys = ("step", "loss", "ar", "nar", "aux", "length", "lr", "grad_norm", "tokens_total", "valid/loss")
    lines, expected = (
        [[line.get(key) for key in keys] for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, unbroken)
    )
    assert lines == expected
    scalars = events(run / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == list(range(1, steps + 1))
    assert scalars["loss"] == events(unbroken / "tensorboard")["loss"]


def kill_and_resume(program: Program, step_kills: int, save_kills: int) -> None:
    """Kills at random steps and in saves, in random order, then lets the run finish."""
    draw = random.Random(step_kills * 100 + save_kills)
    kinds = ["step"] * step_kills + ["save"] * save_kills
    draw.shuffle(kinds)
    torn = 0
    for number, kind in enumerate(kinds):
        if kind == "save":
            torn += kill_in_save(program, draw.uniform(0, 0.03))
        else:
            last = (STEPS - 6) * (number + 1) // len(kinds)
            first = max(program.checkpoint + 1, 1)
            kill_at_step(program, draw.randint(first, max(first, last)), draw.uniform(0, 0.05))
        assert program.steps < STEPS
    assert program.finish() == 0, program.log.read_text()[-3000:]
    assert torn >= save_kills // 2


def test_killed_runs_end_as_the_unbroken_one(inputs: Path, unbroken: Path) -> None:
    program = Program(inputs, inputs / "killed")
    kill_and_resume(program, step_kills=2, save_kills=2)
    assert_as_unbroken(program.run, unbroken)


@pytest.mark.heavy
def test_killed_five_times_at_random_steps(inputs: Path, unbroken: Path) -> None:
    program = Program(inputs, inputs / "killed-5")
    kill_and_resume(program, step_kills=5, save_kills=0)
    assert_as_unbroken(program.run, unbroken)


@pytest.mark.heavy
def test_killed_in_fifty_saves(inputs: Path) -> None:
    """A whole checkpoint after each of 50 kills over the save window, and the same end."""
    steps = 220
    settings = (*SETTINGS, f"train.max_steps={steps}")
    unbroken = Program(inputs, inputs / "unbroken-220", settings=settings)
    assert unbroken.finish() == 0, unbroken.said[-3000:]
    program = Program(inputs, inputs / "killed-50", settings=settings)
    draw, torn = random.Random(50), 0
    for _ in range(50):
        torn += kill_in_save(program, draw.uniform(0, 0.03))
    assert program.finish() == 0, program.said[-3000:]
    assert torn >= 25
    assert_as_unbroken(program.run, unbroken.run, steps)


@pytest.mark.heavy
def test_two_ranks_under_the_launcher_killed_and_resumed(inputs: Path) -> None:
    unbroken = Program(inputs, inputs / "unbroken-2", ranks=2)
    assert unbroken.finish() == 0, unbroken.log.read_text()[-3000:]
    program = Program(inputs, inputs / "killed-2", ranks=2)
    kill_and_resume(program, step_kills=2, save_kills=2)
    assert_as_unbroken(program.run, unbroken.run)


def test_a_signal_saves_and_asks_to_be_started_again(inputs: Path, unbroken: Path) -> None:
    program = Program(inputs, inputs / "stopped")
    with program.running() as process:
        wait_for(lambda: program.steps >= 6, process, program.log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == PREEMPTED_EXIT_CODE
    assert program.checkpoint == program.steps < STEPS
    assert program.finish() == 0
    assert_as_unbroken(program.run, unbroken)
    before = {path: path.stat().st_mtime_ns for path in program.run.rglob("*") if path.is_file()}
    assert program.finish() == 0
    assert f"is complete at step {STEPS}" in program.log.read_text()
    assert before == {path: path.stat().st_mtime_ns for path in program.run.rglob("*") if path.is_file()}
    find_damage(program)
    full_disk(program)


def find_damage(program: Program) -> None:
    """A flipped bit in, and a cut of, each file of the newest checkpoint: the one before is taken."""
    newest = program.run / f"checkpoints/step-{STEPS:08d}"
    draw = random.Random(1)
    files = [path for path in newest.iterdir() if path.is_file()]
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        for place in (0, draw.randrange(len(content)), len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            for damaged in (bytes(flipped), content[:place]):
                path.write_bytes(damaged)
                assert 0 < program.checkpoint < STEPS, (path.name, place)
        path.write_bytes(content)
    assert program.checkpoint == STEPS


def full_disk(program: Program) -> None:
    """Continues a finished run for longer where files cannot grow beyond 300 kB."""
    longer = Program(program.inputs, program.run, settings=(*SETTINGS, f"train.max_steps={STEPS + 8}"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    assert longer.finish(limit) == ResourceError.exit_code
    text = program.said
    assert f"no checkpoint of step {STEPS + 4}: " in text
    assert "training goes on" in text
    assert "error: 2 checkpoints in a row could not be written (" in text
    assert "to do: free disk space" in text
    assert "Traceback" not in text
    assert longer.steps == STEPS + 8
    assert program.checkpoint == STEPS
    assert not program.saving


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, which only root can make."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "janus-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_costs_saves_and_no_training(inputs: Path, unbroken: Path) -> None:
    """A real small disk: saves are skipped while it is full, and made again when there is room."""
    with small_disk(inputs / "disk", 4) as disk:
        program = Program(inputs, disk / "run", settings=(*SETTINGS, "train.max_failed_saves=99"))
        ballast = disk / "ballast"
        with program.running() as process:
            wait_for(lambda: program.steps >= 6, process, program.log)
            process.send_signal(signal.SIGSTOP)
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: "no checkpoint of step" in program.said, process, program.log)
            process.send_signal(signal.SIGSTOP)
            assert 4 <= program.checkpoint <= program.steps
            ballast.unlink()
            process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) == 0, program.said[-3000:]
        assert "MB left; training goes on" in program.said
        assert_as_unbroken(program.run, unbroken)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert Program(inputs, program.run, settings=(*SETTINGS, "train.max_steps=48")).finish() == (
            ResourceError.exit_code
        )
        assert "error: the file or folder cannot be written" in program.said


def test_a_lost_rank_ends_the_others_in_words(inputs: Path) -> None:
    """SIGKILL to one of two ranks: no hang, an exit code, a whole checkpoint."""
    program = Program(inputs, inputs / "lost", ranks=2)
    with program.running() as process:
        wait_for(lambda: program.steps >= 7, process, program.log)
        os.kill(second_rank(process.pid), signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
    text = program.log.read_text()
    assert TrainingError.__name__ not in text
    assert "error: another rank was lost" in text
    assert f"where: rank 1 on {socket.gethostname()} (process " in text
    assert program.checkpoint >= 4


def second_rank(launcher: int) -> int:
    """The process with RANK=1 in the launcher's session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and os.getsid(int(entry.name)) == launcher:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if b"RANK=1" in variables:
                return int(entry.name)
    raise AssertionError("there is no second rank")
