"""Train on pairs: translation from scratch, or on from another run's weights.

    deepspeed launch/finetune.py --recipe launch/recipes/nmt_iwslt.yaml --data data/de-en \\
        --deepspeed_config ds_configs/zero1.json [--init RUN] [--set objective.preset=ar ...]

Also under torchrun and srun, and as a plain program on one device. The same command started again
resumes from the last whole checkpoint, and ends at once when the run is complete. Exit codes stand
in janus_ds/errors.py; 75 means: asked to stop, saved, start me again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from janus_ds.train.safety.signals import StopSignals

RECIPE = Path(__file__).parent / "recipes" / "nmt_multi30k.yaml"


def main() -> None:
    """Parse, train, leave with the exit code."""
    signals = StopSignals()
    signals.install()
    signals.watch()
    from janus_ds.train.options import parse_options, refuse_faults

    options = parse_options(sys.argv[1:], RECIPE, "Train a JANUS model on pairs, such as translations.")
    refuse_faults(options)
    # Slow to import: a signal in that time is remembered already.
    from janus_ds.cli.train import run_program
    from janus_ds.train.loop.build_run import pretrain

    run_program(lambda: pretrain(options, signals))


if __name__ == "__main__":
    main()
