"""Make a data directory of text or of parallel text; see `janus_ds/cli/prepare.py`."""

from janus_ds.cli.prepare import prepare_data
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(prepare_data)
