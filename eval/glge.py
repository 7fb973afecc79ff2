"""Decode and score tasks of GLGE; see `janus_ds/cli/eval_glge.py`."""

from janus_ds.cli.eval_glge import main
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(main)
