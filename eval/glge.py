"""Decode and score tasks of GLGE; see `janus_ds/cli/evaluate.py`."""

from janus_ds.cli.evaluate import evaluate_glge
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(evaluate_glge)
