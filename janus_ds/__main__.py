"""`python -m janus_ds COMMAND`: help around a run. Each command is a module of `janus_ds.tools`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from janus_ds.errors import UsageError, exit_on_error

COMMANDS: dict[str, str] = {
    "plan": "parameters, memory per rank, checkpoint size, steps and tokens of a run",
    "check": "all faults of recipe and DeepSpeed configuration at once, then one dry batch",
    "explain": "what a field of the recipe means, its type and default",
    "inspect": "a sample as the model sees it: tokens, masked views, rows and who sees whom",
    "verify": "read a data directory whole and name every damaged shard and member",
    "convert": "read and write checkpoints of other programs",
    "bench": "measure training steps or the data pipeline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Raises:
        UsageError: there is no such command.
    """
    # Commands are imported on demand, so that `--help` answers at once.
    parser = argparse.ArgumentParser(
        prog="python -m janus_ds",
        description="Help around a run. `python -m janus_ds COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see the command's --help")
    parsed = parser.parse_args(arguments)
    if parsed.command not in COMMANDS:
        # difflib is imported by this alone.
        from janus_ds.config.faults import suggestion

        fix = suggestion(parsed.command, COMMANDS, f"use one of {', '.join(COMMANDS)}")
        raise UsageError(f"there is no command {parsed.command!r}", "the command line", fix)
    module = import_module(f"janus_ds.tools.{parsed.command}")
    code: int | None = module.main(parsed.arguments)
    return code or 0


def _main() -> int:
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `... | head` has read enough. What is still buffered goes nowhere, without a second complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    exit_on_error(_main)
