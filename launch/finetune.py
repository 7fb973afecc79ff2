"""Train on pairs, from scratch or from another run's weights; see `janus_ds/cli/train.py`."""

from janus_ds.cli.train import finetune

if __name__ == "__main__":
    raise SystemExit(finetune())
