"""`janus-ds COMMAND`, or `python -m janus_ds COMMAND`: every command of the package, from one table.

Commands are imported on demand, so that help and a misspelt name cost nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from janus_ds import __version__
from janus_ds.errors import UsageError, exit_on_error


class Command(NamedTuple):
    """A command: where its function stands, and one line of help."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "init": Command("recipes", "copy_files", "copy the package's recipes and DeepSpeed files into a folder"),
    "prepare": Command("prepare", "prepare_data", "make a data directory: tokenizer, shards, index"),
    "prepare glge": Command("prepare", "prepare_glge", "make a data directory of a task of GLGE"),
    "pretrain": Command("train", "pretrain", "pretrain a model, or go on with a run"),
    "finetune": Command("train", "finetune", "train on pairs, from scratch or from another run"),
    "decode": Command("decode", "main", "decode text with a run, AR and NAR"),
    "demo": Command("demo", "main", "a page on this machine: AR, NAR and AUX side by side, pass by pass"),
    "eval nmt": Command("evaluate", "evaluate_nmt", "decode and score translations"),
    "eval glge": Command("evaluate", "evaluate_glge", "decode and score tasks of GLGE"),
    "blanks": Command(
        "blanks", "main", "how well a pretrained run fills blanks, before and after, with passages"
    ),
    "report": Command("report", "main", "one page about several runs: tables, curves, samples"),
    "plan": Command("plan", "main", "parameters, memory, messages, checkpoint size and length of a run"),
    "check": Command("check", "main", "all faults of recipe and DeepSpeed file at once, then a dry batch"),
    "explain": Command(
        "recipes", "print_explanation", "what a field of the recipe means, its type and default"
    ),
    "inspect": Command("inspect", "main", "a sample as the model sees it: masked views, rows, visibility"),
    "verify": Command("verify", "main", "every damaged shard and member of a data directory"),
    "convert": Command("convert", "main", "models of Hugging Face and fairseq into runs, and back"),
    "bench": Command("bench", "main", "measured ratios, in a checkout"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Raises:
        UsageError: there is no such command.
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
    function = getattr(import_module(f"janus_ds.cli.{command.module}"), command.function)
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
