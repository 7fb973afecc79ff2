"""What both kinds of conversion write beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from janus_ds.errors import UsageError
from janus_ds.io import write_atomic
from janus_ds.model.bart_names import ConversionReport
from janus_ds.observe.run_record import RUN_FILE

__all__ = ["REPORT_FILE", "refuse_run", "write_report"]

REPORT_FILE = "conversion.json"


def refuse_run(folder: Path) -> None:
    """Keep a run from being written over.

    Raises:
        UsageError: the folder holds a run.
    """
    if (folder / RUN_FILE).exists():
        raise UsageError("the folder holds a run already", str(folder), "give another folder")


def write_report(folder: Path, report: ConversionReport) -> None:
    """Write what became of every name into `conversion.json`."""
    write_atomic(folder / REPORT_FILE, (json.dumps(asdict(report), indent=1) + "\n").encode())
