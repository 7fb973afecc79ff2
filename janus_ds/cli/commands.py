"""Every command of the package in one table, and the shell's completion made of it."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from janus_ds.cli.arguments import new_parser
from janus_ds.config.packaged import packaged_folder
from janus_ds.errors import JanusError, UsageError


class Command(NamedTuple):
    """A command: where its function stands, and one line of help."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "init": Command("settings", "copy_files", "copy the package's recipes and DeepSpeed files into a folder"),
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
    "check": Command(
        "settings", "check", "all faults of recipe and DeepSpeed file at once, then a dry batch"
    ),
    "explain": Command(
        "settings", "print_explanation", "what a field of the recipe means, its type and default"
    ),
    "inspect": Command("inspect", "main", "a sample as the model sees it: masked views, rows, visibility"),
    "verify": Command("inspect", "verify", "every damaged shard and member of a data directory"),
    "convert": Command("convert", "main", "models of Hugging Face and fairseq into runs, and back"),
    "completion": Command("commands", "print_completion", "words for the shell's completion: bash or zsh"),
    "bench": Command("commands", "run_bench", "measured ratios, in a checkout"),
}

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
        getattr(import_module(f"janus_ds.cli.{command.module}"), command.function)(["--help"])
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
