"""`janus-ds COMMAND`, or `python -m janus_ds COMMAND`: the table of commands, and the shell's completion.

Commands are imported on demand, so that help and a misspelt name cost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from janus_ds import __version__
from janus_ds.cli.arguments import new_parser
from janus_ds.config.locations import packaged_folder
from janus_ds.errors import JanusError, MissingDependencyError, UsageError, exit_on_error, suggestion


class Command(NamedTuple):
    """A command: where its function stands, and one line of help."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "init": Command(
        "cli.settings", "copy_files", "copy the package's recipes and DeepSpeed files into a folder"
    ),
    "prepare": Command("cli.prepare", "prepare_data", "make a data directory: tokenizer, shards, index"),
    "prepare glge": Command("cli.prepare", "prepare_glge", "make a data directory of a task of GLGE"),
    "pretrain": Command("cli.train", "pretrain", "pretrain a model, or go on with a run"),
    "finetune": Command("cli.train", "finetune", "train on pairs, from scratch or from another run"),
    "decode": Command("cli.decode", "main", "decode text with a run, AR and NAR"),
    "demo": Command("cli.demo", "main", "a page on this machine: AR, NAR and AUX side by side, pass by pass"),
    "eval nmt": Command("cli.evaluate", "evaluate_nmt", "decode and score translations"),
    "eval glge": Command("cli.evaluate", "evaluate_glge", "decode and score tasks of GLGE"),
    "blanks": Command(
        "cli.blanks", "main", "how well a pretrained run fills blanks, before and after, with passages"
    ),
    "report": Command("cli.evaluate", "report", "one page about several runs: tables, curves, samples"),
    "plan": Command("cli.plan", "main", "parameters, memory, messages, checkpoint size and length of a run"),
    "check": Command(
        "cli.settings", "check", "all faults of recipe and DeepSpeed file at once, then a dry batch"
    ),
    "explain": Command(
        "cli.settings", "print_explanation", "what a field of the recipe means, its type and default"
    ),
    "inspect": Command(
        "cli.inspect", "main", "a sample as the model sees it: masked views, rows, visibility"
    ),
    "verify": Command("cli.inspect", "verify", "every damaged shard and member of a data directory"),
    "convert": Command("cli.convert", "main", "models of Hugging Face and fairseq into runs, and back"),
    "completion": Command("__main__", "print_completion", "words for the shell's completion: bash or zsh"),
    "bench": Command("__main__", "run_bench", "measured ratios, in a checkout"),
}


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
        given = f"{name} {rest[0]}" if name in ("eval", "prepare") and rest else name
        fix = suggestion(given, COMMANDS, f"use one of {', '.join(COMMANDS)}")
        raise UsageError(f"there is no command {given!r}", "the command line", fix)
    command = COMMANDS[name]
    # Imports leave nothing behind to be collected; looking for it takes a tenth of the start.
    gc.disable()
    try:
        function = getattr(import_module(f"janus_ds.{command.module}"), command.function)
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


_SCRIPT = """\
# eval "$(janus-ds completion SHELL)" in the shell's start-up file
_janus_ds() {
  local words="" cur="${COMP_WORDS[COMP_CWORD]}"
  case "${COMP_WORDS[COMP_CWORD-1]}|${COMP_WORDS[*]:1:$((COMP_CWORD-1))} " in
CASES
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _janus_ds janus-ds
"""
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit
"""


def print_completion(arguments: Sequence[str] | None = None) -> int:
    """Print a shell's completion: commands, their options, names of recipes and DeepSpeed files."""
    parser = new_parser("completion", 'Words for the shell: eval "$(janus-ds completion bash)"')
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(arguments).shell
    cases: dict[str, list[str]] = {}
    for option, kind, suffix in (("recipe", "recipes", ".yaml"), ("deepspeed_config", "ds_configs", ".json")):
        files = sorted(path.stem for path in packaged_folder(kind).iterdir() if path.suffix == suffix)
        cases[f"'--{option}|'*"] = files
    cases["*'janus-ds| '"] = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    # Longer names first: `prepare glge` is not `prepare`.
    for name in sorted(COMMANDS, key=len, reverse=True):
        cases[f"*'|{name} '*"] = _options(COMMANDS[name])
        first, _, second = name.partition(" ")
        if second:
            both = _options(COMMANDS[first]) if first in COMMANDS else []
            cases.setdefault(f"'{first}|{first} '", both).append(second)
    lines = (f"    {key}) words='{' '.join(words)}' ;;" for key, words in cases.items())
    script = _SCRIPT.replace("SHELL", shell).replace("CASES", "\n".join(lines))
    print(_ZSH * (shell == "zsh") + script, end="")
    return 0


def _options(command: Command) -> list[str]:
    """The options of a command, as its help tells them."""
    if command.function == "print_completion":
        return ["bash", "zsh"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit, JanusError):
        getattr(import_module(f"janus_ds.{command.module}"), command.function)(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said.getvalue())))


def run_bench(arguments: Sequence[str]) -> int:
    """Run one measurement.

    Raises:
        UsageError: this is no checkout.
    """
    try:
        benches = import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        raise UsageError(
            "the benches are not part of the installed package",
            "bench",
            "run `python -m benchmarks` at the root of a checkout of janus_ds",
        ) from error
    code: int = benches.main(arguments)
    return code


def console() -> None:
    """The console script `janus-ds`."""
    exit_on_error(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    console()
