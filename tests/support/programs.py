"""The programs of the repository, as modules and as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def program_environment(**more: str) -> dict[str, str]:
    """This process's environment on CPU with one thread, with the tree's modules and the tests' programs."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def python(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments at the root of the repository.

    Args:
        words: a script or options, and its arguments.
        more: variables of the environment.
    """
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=program_environment(**more), capture_output=True, text=True)


def started(*words: object, **options: Any) -> subprocess.Popen[str]:
    """The same without waiting; options are those of `subprocess.Popen`."""
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=program_environment(), text=True, **{"cwd": ROOT, **options})
