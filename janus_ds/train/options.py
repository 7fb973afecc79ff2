"""The options of a training program, and the faults in them that can be said before anything heavy.

Light to import: a misspelt key is refused in a second, on a machine of any size.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.config.deepspeed import read_setup
from janus_ds.config.load import add_deepspeed_argument, add_recipe_arguments, given_overrides
from janus_ds.config.locations import user_path
from janus_ds.errors import JanusError

FOLLOWER_DELAY = 2.0
"""Seconds that a rank waits for the one that prints the fault of all: launchers end all when one is gone."""


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
    """One of the recipe's `modes`; `overrides` win over its fields."""
    stages: Sequence[Any] = ()
    """Of the data pipeline (`janus_ds.data.stream.pipeline`), such as `webdataset.map(function)`."""


def parse_options(argv: Sequence[str], recipe: Path, program: str) -> TrainOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=program, allow_abbrev=False)
    add_deepspeed_argument(parser)
    add_recipe_arguments(parser, recipe)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="made by `janus-ds prepare`; an address, or A=0.7,B=0.3 (see `janus-ds explain "
        "data.path`); default: the bundled corpus (pretraining alone)",
    )
    parser.add_argument("--output", type=user_path, metavar="DIR", help="run folder; default: runs/NAME")
    parser.add_argument(
        "--init", metavar="RUN", help="run or checkpoint to take the first weights from; none: random weights"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share one model"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="MINUTES", help="save and end with exit code 75 after that time"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    overrides = given_overrides(given)
    overrides += [f"init={'null' if given.init == 'none' else given.init}"] if given.init else []
    overrides += [] if given.time_limit is None else [f"train.time_limit={given.time_limit}"]
    return TrainOptions(
        deepspeed_config=given.deepspeed_config,
        recipe=given.recipe,
        overrides=tuple(overrides),
        output=given.output,
        tensor_parallel=given.tensor_parallel,
        mode=given.mode,
    )


def refuse_faults(options: TrainOptions) -> None:
    """Leave with the faults of recipe, overrides and DeepSpeed file, if there are any.

    Every rank judges for itself; the first one of each host prints. Values that only DeepSpeed can
    judge, and the device, come later, as does a number of ranks that cannot be.
    """
    data_size = _data_size(os.environ, options.tensor_parallel)
    if data_size is None:
        return
    try:
        setup = (options.recipe, options.overrides, options.deepspeed_config)
        read_setup(*setup, data_size, options.tensor_parallel, options.mode)
    except JanusError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
        else:
            time.sleep(FOLLOWER_DELAY)
        sys.exit(error.exit_code)


def _data_size(environ: Mapping[str, str], tensor_size: int) -> int | None:
    """Data-parallel ranks, as launchers say; None where the ranks do not divide."""
    world_size = environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if not world_size.isdecimal() or tensor_size < 1 or int(world_size) % tensor_size:
        return None
    return int(world_size) // tensor_size or None
