"""`janus-ds COMMAND`, or `python -m janus_ds COMMAND`: every command of the table in `cli/commands.py`.

Commands are imported on demand, so that help and a misspelt name cost nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from janus_ds import __version__
from janus_ds.cli.commands import COMMANDS
from janus_ds.errors import MissingDependencyError, UsageError, exit_on_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Raises:
        UsageError: there is no such command.
        MissingDependencyError: this Python lacks a package that the command needs.
    """
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="janus-ds",
        description="Pretrain, fine-tune and decode sequence-to-sequence models, AR and NAR.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
        + "\n\n`janus-ds COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"janus_ds {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own")
    parsed = parser.parse_args(arguments)
    name, rest = parsed.command, [_at_home(word) for word in parsed.arguments]
    if f"{name} {rest[0] if rest else ''}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        # difflib is imported by this alone.
        from janus_ds.config.faults import suggestion

        given = f"{name} {rest[0]}" if name in ("eval", "prepare") and rest else name
        fix = suggestion(given, COMMANDS, f"use one of {', '.join(COMMANDS)}")
        raise UsageError(f"there is no command {given!r}", "the command line", fix)
    command = COMMANDS[name]
    # Imports leave nothing behind to be collected; looking for it takes a tenth of the start.
    gc.disable()
    try:
        function = getattr(import_module(f"janus_ds.cli.{command.module}"), command.function)
    except ModuleNotFoundError as error:
        if (error.name or "janus_ds").startswith("janus_ds"):
            raise
        raise MissingDependencyError(
            f"the package {error.name} is not installed",
            sys.executable,
            "use the Python that janus_ds was installed into (`. .venv/bin/activate` after `make install`)",
        ) from error
    gc.freeze()
    gc.enable()
    before = sys.argv
    # What the command's own help says, and what a run records of how it was started.
    sys.argv = [f"janus-ds {name}", *rest]
    try:
        return int(function(rest) or 0)
    finally:
        sys.argv = before


def _at_home(word: str) -> str:
    """`--option=~/path` with the user's home in it: shells replace ~ at the start of a word only."""
    option, equals, value = word.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") else word


def console() -> None:
    """The console script `janus-ds`."""
    exit_on_error(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    console()
