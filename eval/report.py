"""Write one page about several runs; see `janus_ds/cli/report.py`."""

from janus_ds.cli.report import main
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(main)
