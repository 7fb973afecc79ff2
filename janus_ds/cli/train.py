"""The training commands: `launch/pretrain.py` and `launch/finetune.py` are doors to the two functions here.

Under `deepspeed`, `torchrun`, `srun`, or as a plain program on one device. The same command started again
resumes from the last complete checkpoint, and ends at once when the run is complete. Exit codes stand in
janus_ds/errors.py; 75 means: asked to stop, saved, start me again.

Light to import: signals are remembered, and a misspelt option is refused, before torch is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.cli.arguments import add_deepspeed_argument, add_recipe_arguments, given_overrides, not_empty
from janus_ds.config.deepspeed import TrainOptions, read_setup
from janus_ds.config.locations import packaged_folder, user_path
from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, PlainFormatter, outlive_standard_error
from janus_ds.train.signals import StopSignals

if TYPE_CHECKING:
    from janus_ds.train.trainer import Outcome

_FOLLOWER_DELAY = 2.0
"""Seconds that a rank waits for the one that prints the fault of all: launchers end all when one is gone."""
_NEWS_SECONDS = 3.0
"""Time for the news of a lost rank to come after a collective has failed."""


def pretrain(argv: Sequence[str] | None = None, stages: Sequence[Any] = ()) -> int:
    """Pretrain a model: `deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`.

    Args:
        stages: of the user, for the data pipeline (`janus_ds/data/stream/pipeline.py`).
    """
    return _main(argv, packaged_folder("recipes") / "quickstart.yaml", "Pretrain a JANUS model.", stages)


def finetune(argv: Sequence[str] | None = None, stages: Sequence[Any] = ()) -> int:
    """Train on pairs, from scratch or from another run's weights.

    deepspeed launch/finetune.py --recipe launch/recipes/nmt_iwslt.yaml --data data/de-en \\
        --deepspeed_config ds_configs/zero1.json [--init RUN] [--set objective.preset=ar ...]
    """
    recipe = packaged_folder("recipes") / "nmt_multi30k.yaml"
    return _main(argv, recipe, "Train a JANUS model on pairs, such as translations.", stages)


def _main(argv: Sequence[str] | None, recipe: Path, program: str, stages: Sequence[Any]) -> int:
    signals = StopSignals()
    signals.install()
    signals.watch()
    outlive_standard_error()
    with refusing_faults():
        options = replace(parse_options(argv, recipe, program), stages=stages)
        check_faults(options)
    return train_and_exit(options, signals)


def parse_options(argv: Sequence[str] | None, recipe: Path, program: str) -> TrainOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=program, allow_abbrev=False)
    add_deepspeed_argument(parser)
    add_recipe_arguments(parser, recipe)
    parser.add_argument(
        "--data",
        type=not_empty,
        metavar="DIR",
        help="made by `janus-ds prepare`; an address, or A=0.7,B=0.3 (see `janus-ds explain "
        "data.path`); default: the bundled corpus (pretraining alone)",
    )
    parser.add_argument("--output", type=user_path, metavar="DIR", help="run folder; default: runs/NAME")
    parser.add_argument(
        "--init",
        type=not_empty,
        metavar="RUN",
        help="run or checkpoint to take the first weights from; none: random weights",
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


@contextmanager
def refusing_faults() -> Iterator[None]:
    """Leave with a fault of the command line, if there is one.

    Every rank finds it for itself; the first one of each host prints it.
    """
    try:
        yield
    except JanusError as error:
        speaks = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
        sys.exit(_told(error, speaks))


def check_faults(options: TrainOptions) -> None:
    """Look for faults of recipe, overrides and DeepSpeed file.

    Values that only DeepSpeed can judge, the device, and a number of ranks that cannot be come later.

    Raises:
        JanusError: there are faults.
    """
    data_size = _data_size(os.environ, options.tensor_parallel)
    if data_size is not None:
        setup = (options.recipe, options.overrides, options.deepspeed_config)
        read_setup(*setup, data_size, options.tensor_parallel, options.mode)


def _data_size(environ: Mapping[str, str], tensor_size: int) -> int | None:
    """Data-parallel ranks, as launchers say; None where the ranks do not divide."""
    world_size = environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or "1"
    if not world_size.isdecimal() or tensor_size < 1 or int(world_size) % tensor_size:
        return None
    return int(world_size) // tensor_size or None


def train_and_exit(options: TrainOptions, signals: StopSignals) -> int:
    """Train, print the fault if this rank is the one to do so, and return the exit code.

    User faults are raised on all ranks together; the first rank prints them (of a lost rank, one rank
    a host; of a fault that one rank alone has, that rank), the others only wait until it has, since
    launchers end all ranks when one is gone.
    """
    from janus_ds.parallel.liveness import LostRankError
    from janus_ds.train.trainer import Outcome

    _log_to_stderr()
    try:
        return PREEMPTED_EXIT_CODE if _train(options, signals) is Outcome.STOPPED else 0
    except JanusError as error:
        speaks = error.speaker if isinstance(error, LostRankError) else error.local or _is_first_rank()
        return _told(error, speaks)
    except KeyboardInterrupt:
        sys.stderr.write("stopped from the keyboard\n")
        return 130


def _told(error: JanusError, speaks: bool) -> int:
    """Print a fault if this rank is the one to do so, or else wait until it is printed; the exit code."""
    if speaks:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
    else:
        time.sleep(_FOLLOWER_DELAY)
    return error.exit_code


def _train(options: TrainOptions, signals: StopSignals) -> Outcome:
    """Find this process's place among the ranks, then train.

    Raises:
        JanusError: on all ranks together; LostRankError on those that are left.
    """
    from janus_ds.parallel.liveness import Liveness
    from janus_ds.parallel.topology import close_topology, init_topology
    from janus_ds.train.build_run import run

    topology = init_topology(options.tensor_parallel, process_group=True, asked=signals.asked)
    liveness = Liveness(topology, signals.hear)
    signals.tell(liveness.ask_to_stop)
    orderly, alone = False, False
    try:
        outcome = run(topology, options, signals, liveness)
        orderly = True
        return outcome
    except JanusError as error:
        alone = error.local
        orderly = not alone
        raise
    except RuntimeError as error:
        lost = liveness.lost(_NEWS_SECONDS)
        orderly = lost is not None
        raise lost or error from error
    finally:
        liveness.close(orderly=orderly)
        if liveness.complete and not alone:
            close_topology()


def _log_to_stderr() -> None:
    """Our own notes and warnings; DeepSpeed and torch keep their handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger("janus_ds")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
