"""How each rank leaves a training program."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, exit_on_error
from janus_ds.parallel.liveness import LostRankError
from janus_ds.train.loop.trainer import Outcome
from janus_ds.train.options import FOLLOWER_DELAY

__all__ = ["run_program"]


def run_program(train: Callable[[], Outcome]) -> None:
    """Run and leave with the exit code of the outcome.

    User faults are raised on all ranks together; the first rank prints them (of a lost rank, one rank
    a host; of a fault that one rank alone has, that rank), the others only wait until it has, since
    launchers end all ranks when one is gone.
    """
    _log_to_stderr()

    def main() -> int:
        try:
            return PREEMPTED_EXIT_CODE if train() is Outcome.STOPPED else 0
        except JanusError as error:
            speaks = error.speaker if isinstance(error, LostRankError) else error.local or _is_first_rank()
            if speaks:
                raise
            time.sleep(FOLLOWER_DELAY)
            return error.exit_code

    exit_on_error(main)


def _log_to_stderr() -> None:
    """Our own notes and warnings; DeepSpeed and torch keep their handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger("janus_ds")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
