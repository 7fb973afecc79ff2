"""What the commands share: parsers; options of recipes and ranks, and of programs that decode and score."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from janus_ds.config.locations import deepspeed_file, packaged_folder, recipe_file, user_path
from janus_ds.errors import MissingDependencyError, UsageError
from janus_ds.progress import Progress

if TYPE_CHECKING:
    from janus_ds.decode.load import InferenceOptions
    from janus_ds.evaluate.evaluation import EvalRequest


def new_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The argument parser of one command."""
    return argparse.ArgumentParser(prog=f"janus-ds {command}", description=description)


def program_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a command that is a program of launch/ or eval/ too; its description stays as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


_MOST = 2**31 - 1
"""Largest number that such options take: tensors and system calls know no larger ones."""


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on: give one")
        if int(text) > _MOST:
            raise argparse.ArgumentTypeError(f"{text} is too large: give a number up to {_MOST}")
        return int(text)

    return read


def not_empty(text: str) -> str:
    """The type of an option that means something else where it is left out than where its text is empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, as where a variable of the shell is not set")
    return text


def add_recipe_arguments(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """`--recipe` (default: the quickstart's), `--mode` and `--set` (as `overrides`)."""
    default = default or packaged_folder("recipes") / "quickstart.yaml"
    help_line = f"what is trained: a file, or a name such as iwslt (default: launch/recipes/{default.name})"
    parser.add_argument("--recipe", type=recipe_file, default=default, metavar="YAML", help=help_line)
    parser.add_argument("--mode", metavar="MODE", help="one of the recipe's modes, such as ar or nar")
    add_override_argument(parser, "override fields of the recipe, such as train.max_steps=20")


def given_overrides(parsed: argparse.Namespace) -> list[str]:
    """What `--set` and `--data` say."""
    return [*parsed.overrides, *([f"data.path={parsed.data}"] if parsed.data else [])]


def add_deepspeed_argument(parser: argparse.ArgumentParser) -> None:
    """`--deepspeed_config`, which every run needs."""
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=deepspeed_file,
        required=True,
        metavar="JSON",
        help="how the run is executed, such as ds_configs/zero2.json, or a name, such as zero2",
    )


def add_override_argument(parser: argparse.ArgumentParser, help_line: str) -> None:
    """`--set KEY=VALUE ...`, as `overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=help_line,
    )


def add_ranks_arguments(parser: argparse.ArgumentParser, ranks: int) -> None:
    """Add `--ranks` and `--tensor-parallel`."""
    add = parser.add_argument
    add("--ranks", type=int, default=ranks, help="processes of the run (default: %(default)s)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share one model (default: 1)")


def data_ranks(parsed: argparse.Namespace) -> int:
    """Data-parallel ranks.

    Raises:
        UsageError: the ranks do not divide into tensor-parallel groups.
    """
    ranks, tensor_size = parsed.ranks, parsed.tensor_parallel
    if min(ranks, tensor_size) < 1 or ranks % tensor_size:
        what = f"{ranks} ranks do not divide into tensor-parallel groups of {tensor_size}"
        fix = "give a number of ranks above 0 that is a multiple of the tensor-parallel size"
        raise UsageError(what, "--ranks, --tensor-parallel", fix)
    return int(ranks // tensor_size)


_Number = TypeVar("_Number", int, float)
DTYPES = ("fp32", "bf16", "float64")
"""Precisions of scores: of `janus-ds decode` further "auto", which depends on the machine."""


def add_inference_arguments(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, dtypes: tuple[str, ...] = DTYPES
) -> None:
    """Add `--dtype`, with these choices and the first as default, `--int8` and `--compile`."""
    add = parser.add_argument
    auto = "; auto: bf16 where the device has products of it, fp32 for drafts" if "auto" in dtypes else ""
    add("--dtype", choices=dtypes, default=dtypes[0], help=f"precision (default: {dtypes[0]}{auto})")
    add("--int8", action="store_true", help="int8 weights and activations in linear layers (CPU)")
    add("--compile", action="store_true", help="layers by torch.compile (for GPUs; a CPU is faster without)")


BOTH_WAYS: dict[str, tuple[type, str]] = {
    "rescore": (str, "NAR: ar lets AR score the candidates with the same weights"),
    "temperature": (float, "above 0, exact samples of AR's distribution, in mode aux of AUX's"),
}
"""Options of decoding both ways at once: fields of `DecodeConfig`, their type and help."""


def given_options(parsed: argparse.Namespace) -> frozenset[str]:
    """The names of all options that have a value."""
    return frozenset(name for name, value in vars(parsed).items() if value is not None)


def refuse_given(group: argparse._ArgumentGroup, parsed: argparse.Namespace, why: str, fix: str) -> None:
    """Refuse, by name, an option of a group that is given though nothing would come of it.

    Raises:
        UsageError: there is one.
    """
    for action in group._group_actions:
        if getattr(parsed, action.dest) != action.default:
            option = action.option_strings[0]
            raise UsageError(f"{why} does not use {option}", option, f"leave it out, or {fix}")


def add_decode_arguments(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, options: Mapping[str, tuple[type, str]]
) -> None:
    """Add an option for each of these fields of `DecodeConfig`, with its type and help."""
    for name, (kind, text) in options.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, help=f"{text} (default: as the run's recipe says)")


def add_long_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--on-long`."""
    text = "inputs that are too long for the model: cut them, skip them (an empty output), or stop there"
    parser.add_argument(
        "--on-long", choices=("cut", "skip", "stop"), default="cut", help=f"{text} (default: cut)"
    )


def inference_options(parsed: argparse.Namespace) -> InferenceOptions:
    """What was chosen.

    Raises:
        MissingDependencyError: there is no compiler for the device.
    """
    from janus_ds.decode.load import InferenceOptions, usable_device
    from janus_ds.objective.chunk_math import compiler_is_at_hand

    chosen = usable_device(parsed.device)
    if parsed.compile and not compiler_is_at_hand(chosen):
        raise MissingDependencyError(
            f"torch.compile finds no compiler for {chosen}",
            "--compile",
            "install g++ (CPU) or triton (GPU), or leave --compile out",
        )
    return InferenceOptions(parsed.dtype, parsed.int8, parsed.compile)


def add_score_arguments(parser: argparse.ArgumentParser, predictions: str, references: str) -> None:
    """`--predictions`, `--references`, `--split` and `--output`."""
    add = parser.add_argument
    add("--predictions", type=user_path, metavar="PATH", help=predictions)
    add("--references", type=user_path, metavar="FILE", help=references)
    add("--split", default="test", help="name of the split (default: test)")
    add(
        "--output",
        type=user_path,
        metavar="PATH",
        help="write the scores as JSON, too; with --checkpoint a folder (default: RUN/eval/SPLIT)",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What is decoded, with what and how; returns the group for a program's own."""
    group = parser.add_argument_group("decode with a checkpoint")
    add = group.add_argument
    add("--checkpoint", type=user_path, metavar="RUN", help="a run folder, or one of its checkpoints")
    add("--average", type=int, default=1, metavar="N", help="mean of the run's last N checkpoints")
    add(
        "--mode",
        "--modes",
        dest="modes",
        default="",
        help="ar, ar-greedy, nar, draft, aux, or several (default: ar and nar, as the run was trained)",
    )
    threshold = "NAR: settle every token likelier than this in a pass; one system each, as 0.9,0.99"
    add("--threshold", metavar="P", help=threshold)
    add("--iterations", help="NAR refinements, one system each (default: 0,1,4,10)")
    add("--beam", type=int, help="AR: beam (default: as the run's recipe says)")
    add("--length-beam", type=int, help="NAR: length candidates (default: as the run's recipe says)")
    add_long_argument(group)
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="the first N sentences only (to RUN/eval/SPLIT-first-N)",
    )
    add(
        "--latency-samples",
        "--latency-sentences",
        dest="latency",
        type=int,
        default=50,
        metavar="N",
        help="sentences decoded one by one for ms/sentence; 0: none (default: 50)",
    )
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    add_decode_arguments(group, BOTH_WAYS)
    add_inference_arguments(group)
    return group


def checkpoint_request(parsed: argparse.Namespace) -> EvalRequest:
    """The :class:`EvalRequest` of these arguments; what is imported for it takes seconds, which scoring files
    need not pay.

    Raises:
        UsageError: the iterations are no numbers, no mode uses an option, or as the request raises it.
    """
    modes = tuple(dict.fromkeys(mode.strip() for mode in parsed.modes.split(",") if mode.strip()))
    # It imports pydantic, which help and a misspelt command need not wait for.
    from janus_ds.config.modes import MODES, refuse_unused

    given = given_options(parsed)
    if parsed.latency and hasattr(parsed, "ar_checkpoint"):
        # GLGE's latencies are compared with those of AR, whatever is decoded.
        given -= MODES["ar"].options
    refuse_unused(given, modes or ("ar", "nar"))
    asked = "0,1,4,10" if parsed.iterations is None else parsed.iterations
    iterations = _listed(asked, int, "--iterations", "0 or more, such as 0,1,4,10")
    thresholds = _listed(
        parsed.threshold or "", float, "--threshold", "shares above 0 and up to 1, such as 0.9,0.99"
    )
    from janus_ds.decode.load import usable_device
    from janus_ds.evaluate.evaluation import EvalRequest

    decode = {name: getattr(parsed, name) for name in ("beam", "length_beam", *BOTH_WAYS)}
    return EvalRequest(
        checkpoint=parsed.checkpoint,
        average=parsed.average,
        modes=modes,
        iterations=iterations,
        thresholds=thresholds,
        split=parsed.split,
        data=parsed.data,
        output=parsed.output,
        decode={name: value for name, value in decode.items() if value is not None},
        given=given,
        limit=parsed.limit,
        on_long=parsed.on_long,
        latency_sentences=parsed.latency,
        device=usable_device(parsed.device),
        inference=inference_options(parsed),
    )


def _listed(text: str, kind: type[_Number], option: str, wanted: str) -> tuple[_Number, ...]:
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",") if word.strip()))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers", option, f"give {wanted}") from None


def systems_progress() -> Callable[[str, int, int], None]:
    """What is told how many sentences of a system are done; it says so on standard error."""
    lines: dict[str, Progress] = {}

    def show(system: str, done: int, total: int) -> None:
        line = lines.setdefault(system, Progress())
        line.show(f"{system}: {done:,} of {total:,} sentences", now=done == total)
        if done == total:
            lines.pop(system).end()

    return show
