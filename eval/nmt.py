"""Decode and score translations; see `janus_ds/cli/eval_nmt.py`."""

from janus_ds.cli.eval_nmt import main
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(main)
