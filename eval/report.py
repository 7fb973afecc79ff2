"""Write one page about several runs; see `janus_ds/cli/evaluate.py`."""

from janus_ds.cli.evaluate import report
from janus_ds.errors import exit_on_error

if __name__ == "__main__":
    exit_on_error(report)
