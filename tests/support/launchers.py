"""The pretraining program under its launchers, each start a session of its own that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_ds.observe.writers import read_metrics
from tests.support.launch import free_port, kill_session
from tests.support.processes import alive, wait_until
from tests.support.programs import BIN, ROOT, program_environment


def deepspeed(*options: str) -> list[str]:
    """The deepspeed launcher; two ranks on this host unless the options say otherwise."""
    return [str(BIN / "deepspeed"), *(options or ("--num_gpus", "2", "--master_port", str(free_port())))]


def torchrun(*options: str) -> list[str]:
    """The launcher of torch; two ranks on this host unless the options say otherwise."""
    return [str(BIN / "torchrun"), *(options or ("--standalone", "--nproc-per-node=2"))]


def figures_of(run: Path) -> list[list[Any]]:
    """What must be equal, bit for bit, in two runs of one recipe."""
    names = ("step", "loss", "ar", "nar", "aux", "grad_norm", "lr", "samples_total", "valid/loss")
    return [[line.get(name) for name in names] for line in read_metrics(run / "metrics.jsonl")]


@dataclass
class TwoRanks:
    """A run of the tiny recipe on two ranks.

    Args:
        inputs: folder of recipe and data.
        name: of the run folder.
        settings: overrides.
    """

    inputs: Path
    name: str
    settings: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def started(self, *launchers: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
        """One session a launcher, all of them killed at the end."""
        environment = program_environment(**self.environment)
        script = ["launch/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"]
        recipe = ["--recipe", str(self.inputs / "recipe.yaml"), "--data", str(self.inputs / "data")]
        with ExitStack() as stack:
            # torchrun gives its ranks sessions of their own.
            stack.callback(self._kill)
            processes = []
            for number, launcher in enumerate(launchers):
                log = stack.enter_context(self.log(number).open("ab"))
                words = [*launcher, *script, *recipe, "--output", str(self.run), "--set", *self.settings]
                process = subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
                )
                stack.callback(kill_session, process)
                processes.append(process)
            yield processes

    def _kill(self) -> None:
        for pid in alive(self.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reach(self, step: int, patience: float = 200.0) -> None:
        """Wait until a step is in metrics.jsonl."""
        wait_until(lambda: self.step >= step, patience, f"step {step}\n{self.text()}")

    def gone(self, patience: float = 60.0) -> None:
        """Wait until no process of the run is left."""
        wait_until(lambda: not alive(self.run), patience, f"the end of all processes\n{self.text()}")

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.inputs / self.name

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        lines = read_metrics(self.run / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(p.name.split("-")[1]) for p in (self.run / "checkpoints").glob("step-*")), default=0)

    @property
    def figures(self) -> list[list[Any]]:
        """See `figures_of`."""
        return figures_of(self.run)

    def log(self, number: int = 0) -> Path:
        """What one launcher and its ranks said."""
        return self.inputs / f"{self.name}.{number}.log"

    def text(self, number: int = 0) -> str:
        """The same, as text."""
        return self.log(number).read_text(errors="replace")[-6000:]
