"""The pretraining program under its launchers, each start a session of its own that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from janus_ds.observe.writers import read_metrics
from tests.support.launch import free_port, kill_session
from tests.support.processes import alive, wait_until
from tests.support.program import Program
from tests.support.programs import BIN, ROOT, program_environment


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
    wait_until(lambda: program.steps >= step, 200.0, f"step {step}\n{program.log}")


def gone(program: Program, patience: float = 60.0) -> None:
    """Wait until no process of the run is left."""
    wait_until(lambda: not alive(program.run), patience, f"the end of all processes\n{program.log}")


def figures_of(run: Path) -> list[list[Any]]:
    """What must be equal, bit for bit, in two runs of one recipe."""
    names = ("step", "loss", "ar", "nar", "aux", "grad_norm", "lr", "samples_total", "valid/loss")
    return [[line.get(name) for name in names] for line in read_metrics(run / "metrics.jsonl")]
