"""Pretrain a model; see `janus_ds/cli/train.py`."""

from janus_ds.cli.train import pretrain

if __name__ == "__main__":
    raise SystemExit(pretrain())
