"""Decode text with a checkpoint; see `janus_ds/cli/decode.py`."""

from janus_ds.cli.decode import main
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(main)
