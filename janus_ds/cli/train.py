"""The training commands: `launch/pretrain.py` and `launch/finetune.py` are doors to the two functions here.

Under `deepspeed`, `torchrun`, `srun`, or as a plain program on one device. The same command started again
resumes from the last complete checkpoint, and ends at once when the run is complete. Exit codes stand in
janus_ds/errors.py; 75 means: asked to stop, saved, start me again.

Light to import: signals are remembered, and a misspelt option is refused, before torch is imported.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.config.locations import packaged_folder
from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, PlainFormatter
from janus_ds.train.options import FOLLOWER_DELAY, TrainOptions, parse_options, refuse_faults
from janus_ds.train.signals import StopSignals

if TYPE_CHECKING:
    from janus_ds.train.trainer import Outcome

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
    given = parse_options(sys.argv[1:] if argv is None else argv, recipe, program)
    options = replace(given, stages=stages)
    refuse_faults(options)
    return train_and_exit(options, signals)


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
        if error.speaker if isinstance(error, LostRankError) else error.local or _is_first_rank():
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
        else:
            time.sleep(FOLLOWER_DELAY)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped from the keyboard\n")
        return 130


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
