"""A command that is killed at a point of its work: `killed.py PLAN COMMAND...`, started by the fault suite.

PLAN is JSON: `folder` (what is written below it counts), `at` (the point, from 1; 0: never), `signal`,
`bytes` (a file that grows beyond is where the kernel ends the process; 0: none) and `count` (file for the
number of points). A point is a file opened for writing, a rename, a removal or a new folder. At the opening
of a file the kill comes before its first byte, else before the act.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support.programs import ROOT

_ACTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def main(plan: dict[str, Any]) -> None:
    """Run the command that is in `sys.argv`, up to the point."""
    own, seen = os.getpid(), 0
    tempfile.tempdir = None  # of TMPDIR, which is another one than when this process was forked

    def kill() -> None:
        os.kill(own, getattr(signal, plan["signal"]))

    def before_the_first_byte(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in ("write", "fsync", "close"):
            kill()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and (
            arguments[2] & (os.O_WRONLY | os.O_RDWR) or set(arguments[1] or "r") & set("wax+")
        )
        if not (writes or event in _ACTS) or os.getpid() != own:
            return
        if isinstance(arguments[0], int) or not os.fsdecode(arguments[0]).startswith(plan["folder"]):
            return
        seen += 1
        if seen == plan["at"]:
            if writes:
                sys.setprofile(before_the_first_byte)
            else:
                kill()

    if plan["bytes"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], plan["bytes"]))
    sys.addaudithook(look)
    try:
        runpy.run_path(str(ROOT / "janus_ds" / "__main__.py"), run_name="__main__")
    finally:
        if plan["count"]:
            Path(plan["count"]).write_text(str(seen))


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    sys.argv = [str(ROOT / "janus_ds" / "__main__.py"), *sys.argv[2:]]
    main(order)
