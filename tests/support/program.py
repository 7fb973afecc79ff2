"""The pretraining program on the tiny recipe, started as often as a test kills it, alone or by a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.checkpoint.manifest import step_of
from janus_ds.config.schema import TrainConfig
from janus_ds.observe import read_metrics
from janus_ds.parallel.topology import Topology
from tests.observe.test_meters import events
from tests.support.launch import free_port, kill_session, rank_environment
from tests.support.processes import alive, halted, wait_until
from tests.support.programs import BIN, ROOT, program_environment
from tests.support.warm import WarmProcess, warm_starter

STEPS = 40
SETTINGS = (f"train.max_steps={STEPS}", "train.save_every=4", "train.valid_every=20", "data.workers=1")
PATIENCE = 600.0
ALONE = Topology(torch.device("cpu"))


@dataclass(frozen=True)
class Program:
    """The pretraining program with a run folder, on one process or on two by the deepspeed launcher.

    Args:
        inputs: recipe and data, as `make_inputs` makes them; logs lie here, too.
        run: the run folder.
        ranks: processes.
        settings: overrides.
        forked: starts come from the warm starter; else Python is started anew, under the launcher if several.
        halts: where it halts by itself; see :meth:`halting`.
    """

    inputs: Path
    run: Path
    ranks: int = 1
    settings: tuple[str, ...] = SETTINGS
    forked: bool = True
    halts: str = ""

    def halting(self, *steps: int, file: int = 0) -> Program:
        """One that halts behind each of these steps, or before it writes so many a file of tensors."""
        return replace(self, halts=json.dumps([steps, file]))

    @property
    def words(self) -> list[str]:
        """The script and its arguments."""
        script = ["launch/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"]
        options = ["--recipe", str(self.inputs / "recipe.yaml"), "--data", str(self.inputs / "data")]
        words = [*script, *options, "--output", str(self.run), "--set", *self.settings]
        return ["tests/support/halted.py", self.halts, *words] if self.halts else words

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The program in a session of its own, all of which is killed at the end."""
        start = [sys.executable] if self.ranks == 1 else deepspeed()
        with self.running_ranks() if self.forked else launched(self, start) as (process,):
            yield process

    @contextmanager
    def running_ranks(self) -> Iterator[list[WarmProcess]]:
        """The ranks, forked by the starter, each in a session of its own; killed at the end."""
        port = free_port()
        with ExitStack() as stack:
            processes = []
            for rank in range(self.ranks):
                place = {} if self.ranks == 1 else rank_environment(rank, self.ranks, port)
                processes.append(warm_starter().start(self.words, self.log, place))
                stack.callback(kill_session, processes[-1])
            yield processes

    def finish(self, patience: float = PATIENCE) -> int:
        """Run to the end; returns the exit code, of several ranks the first one that is not 0."""
        if self.forked and self.ranks > 1:
            with self.running_ranks() as processes:
                return next((code for code in [p.wait(patience) for p in processes] if code), 0)
        with self.running() as process:
            return int(process.wait(patience))

    @property
    def log(self) -> Path:
        """What its starts have printed."""
        return self.inputs / f"{self.run.name}.log"

    @property
    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        return last_step(self.run / "metrics.jsonl")

    @property
    def checkpoint(self) -> int:
        """The step of the checkpoint that a start would find, after verifying it."""
        found = CheckpointManager(self.run / "checkpoints", TrainConfig(), ALONE).latest()
        return 0 if found is None else step_of(found) or 0

    @property
    def saving(self) -> bool:
        """Whether a save is going on, or has been torn."""
        return any((self.run / "checkpoints").glob(".saving-*"))

    @property
    def said(self) -> str:
        """All that its starts have printed."""
        return self.log.read_text(errors="replace")


def deepspeed(*options: str) -> list[str]:
    """The deepspeed launcher; two ranks on this host unless the options say otherwise."""
    return [str(BIN / "deepspeed"), *(options or ("--num_gpus", "2", "--master_port", str(free_port())))]


def torchrun(*options: str) -> list[str]:
    """The launcher of torch; two ranks on this host unless the options say otherwise."""
    return [str(BIN / "torchrun"), *(options or ("--standalone", "--nproc-per-node=2"))]


@contextmanager
def launched(
    program: Program, *launchers: Sequence[str], **environment: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One session a launcher, all of them and their ranks killed at the end."""
    with ExitStack() as stack:
        # torchrun gives its ranks sessions of their own.
        stack.callback(_kill, program.run)
        processes = []
        for launcher in launchers:
            log = stack.enter_context(program.log.open("ab"))
            process = subprocess.Popen(
                [*launcher, *program.words],
                cwd=ROOT,
                env=program_environment(**environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(kill_session, process)
            processes.append(process)
        yield processes


def _kill(run: Path) -> None:
    for pid in alive(run):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reach(program: Program, step: int) -> None:
    """Wait until a step is in metrics.jsonl."""
    wait_until(lambda: program.steps >= step, PATIENCE, f"step {step}\n{program.log}")


def gone(program: Program) -> None:
    """Wait until no process of the run is left."""
    wait_until(lambda: not alive(program.run), PATIENCE, f"the end of all processes\n{program.log}")


def last_step(metrics: Path) -> int:
    """The step of the last whole line of a metrics.jsonl; 0 if there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 16_384))
        ends = file.read().rpartition(b"\n")[0].splitlines()
    return int(json.loads(ends[-1])["step"]) if ends else 0


def wait_for(
    condition: Callable[[], bool], process: Any, log: Path, patience: float = PATIENCE, pause: float = 0.01
) -> None:
    """Wait until the condition holds, while the process runs; look at it again after a pause, in seconds."""
    deadline, looks = time.monotonic() + patience, 0
    while not condition():
        looks += 1
        if (looks % 20 == 0 and process.poll() is not None) or time.monotonic() > deadline:
            text = log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"the program ended early ({process.poll()}):\n{text}")
        time.sleep(pause)


def wait_for_halt(program: Program, process: Any, step: int = 0) -> None:
    """Wait until the program halts, of several ranks the first one, behind the step if one is given."""

    def halts() -> bool:
        pids = [process.pid] if program.ranks == 1 else alive(program.run)
        return program.steps >= step and any(map(halted, pids))

    wait_for(halts, process, program.log, pause=0.02)


def figures_of(run: Path) -> list[list[Any]]:
    """What must be equal, bit for bit, in two runs of one recipe."""
    losses = ("loss", "ar", "nar", "aux", "length", "valid/loss")
    names = ("step", *losses, "lr", "grad_norm", "samples_total", "tokens_total")
    return [[line.get(name) for name in names] for line in read_metrics(run / "metrics.jsonl")]


def assert_as_unbroken(run: Path, unbroken: Path, steps: int = STEPS) -> None:
    """Weights, moments, every figure of every step, one value a step in both files."""
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-{steps:08d}/{name}"
        assert (run / path).read_bytes() == (unbroken / path).read_bytes()
    assert figures_of(run) == figures_of(unbroken)
    scalars = events(run / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == list(range(1, steps + 1))
    assert scalars["loss"] == events(unbroken / "tensorboard")["loss"]
