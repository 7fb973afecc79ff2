"""The options of a training program, and how each rank leaves it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from janus_ds.config.arguments import add_recipe_arguments
from janus_ds.config.modes import mode_overrides
from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, exit_on_error
from janus_ds.parallel.roll_call import LostRankError
from janus_ds.train.trainer import Outcome

__all__ = ["TrainOptions", "parse_options", "run_program"]

_FOLLOWER_DELAY = 2.0


@dataclass(frozen=True)
class TrainOptions:
    """What the command line says."""

    deepspeed_config: Path
    recipe: Path
    overrides: tuple[str, ...]
    """`section.field=value` each; --data and --init are among them."""
    output: Path | None
    tensor_parallel: int
    mode: str | None = None
    """One of the recipe's `modes`; its fields come before `overrides`."""

    def with_mode(self) -> TrainOptions:
        """The same with the fields of the mode among the overrides.

        Raises:
            UsageError: the recipe has no such mode; ConfigError: it cannot be read.
        """
        if self.mode is None:
            return self
        return replace(self, overrides=(*mode_overrides(self.recipe, self.mode), *self.overrides), mode=None)


def parse_options(argv: Sequence[str], recipe: Path, program: str) -> TrainOptions:
    """Read the command line.

    Args:
        argv: arguments without the program's name.
        recipe: used when --recipe is not given.
        program: one line for --help.
    """
    parser = argparse.ArgumentParser(description=program, allow_abbrev=False)
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        required=True,
        metavar="JSON",
        help="how the run is executed, such as ds_configs/zero2.json",
    )
    add_recipe_arguments(parser, recipe)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="made by launch/prepare_data.py; an address, or A=0.7,B=0.3 (see `python -m janus_ds explain "
        "data.path`); default: bundled corpus",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder; default: runs/NAME")
    parser.add_argument("--init", metavar="RUN", help="run or checkpoint to take the first weights from")
    parser.add_argument("--mode", metavar="MODE", help="one of the recipe's modes, such as ar or nar")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share one model"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="MINUTES", help="save and end with exit code 75 after that time"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    overrides = list(given.overrides)
    overrides += [f"data.path={given.data}"] if given.data else []
    overrides += [f"init={given.init}"] if given.init else []
    overrides += [] if given.time_limit is None else [f"train.time_limit={given.time_limit}"]
    return TrainOptions(
        deepspeed_config=given.deepspeed_config,
        recipe=given.recipe,
        overrides=tuple(overrides),
        output=given.output,
        tensor_parallel=given.tensor_parallel,
        mode=given.mode,
    )


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
            time.sleep(_FOLLOWER_DELAY)
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
