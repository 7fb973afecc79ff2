"""The program, halted by SIGSTOP where a test acts on it: `halted.py POINTS SCRIPT ARGUMENTS`.

POINTS is JSON: the steps behind whose line of metrics.jsonl it halts, and before which file of tensors (from
1; 0: none). A test that looks for the moment by itself comes too late on a machine that is busy.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from janus_ds.checkpoint import tensors
from janus_ds.observe import MetricsWriter


def main(steps: list[int], file: int) -> None:
    """Run the script that is in `sys.argv`."""
    write, write_tensors, files = MetricsWriter.write, tensors.write_tensors, 0

    def halt() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def written(self: MetricsWriter, step: int, values: Any) -> None:
        write(self, step, values)
        if step in steps:
            halt()

    def tensors_written(path: Path, values: Any) -> None:
        nonlocal files
        files += 1
        if files == file:
            halt()
        write_tensors(path, values)

    MetricsWriter.write = written  # type: ignore[method-assign]
    tensors.write_tensors = tensors_written
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    # DeepSpeed's launcher puts its --local_rank before all else.
    launched = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    points, script, *words = (word for word in sys.argv[1:] if word not in launched)
    sys.argv = [script, *launched, *words]
    main(*json.loads(points))
