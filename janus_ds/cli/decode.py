"""Decode text with a checkpoint, autoregressively, non-autoregressively, or both.

    janus-ds decode --checkpoint RUN --mode nar --iterations 4 < sources.txt > outputs.txt
    janus-ds decode --checkpoint RUN --mode ar,nar --heldout 3
    janus-ds decode --checkpoint RUN --mode ar,nar --mask-share 0.3 --input passages.txt
    janus-ds decode --demo                         the model of the package: German to English
    janus-ds decode --demo --mode aux --target with_blanks.txt --input sources.txt

Lines in, lines out, in order, as they come: each line is written when it is decoded (--output FILE: to
FILE.part, which becomes FILE at the end). An input that is too long for the model is cut, and their number
told at the end (--on-long). With several modes, `--show-source` or `--heldout`, each output comes as a block:
source, reference where there is one, and what each mode made of it. --demo without input translates a few
sentences of its own. --target gives a text with blanks, `___` or
`<mask>`, for each input; they are filled, and all other text is kept to the letter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ds.cli.arguments import (
    BOTH_WAYS,
    DTYPES,
    add_decode_arguments,
    add_inference_arguments,
    add_long_argument,
    given_options,
    inference_options,
    program_parser,
)
from janus_ds.cli.decode_lines import (
    STDIN,
    DecodeProgress,
    Found,
    LongInputs,
    Output,
    Passage,
    as_blocks,
    as_json,
    as_lines,
    as_nbest,
    heldout_passages,
    line_passages,
    line_windows,
    with_targets,
)
from janus_ds.config.locations import DEMO, packaged_model, user_path
from janus_ds.config.modes import MODES, NAMES, refuse_unused, with_decode
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import is_lower_cased
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import Target
from janus_ds.decode.load import LoadedRun, load_run, prepare_for_inference
from janus_ds.decode.text import TextCodec
from janus_ds.errors import DataError, UsageError, suggestion
from janus_ds.io import is_stream

DEMO_SENTENCES = (
    "Guten Morgen! Wie geht es dir?",
    "Ich habe heute keine Zeit, weil ich arbeiten muss.",
    "Meine Schwester wohnt seit drei Jahren in Berlin.",
    "Kannst du mir bitte das Fenster öffnen?",
    "Er fragte mich, ob ich morgen ins Kino gehen möchte.",
    "Das Wetter war so schön, dass wir den ganzen Tag draußen blieben.",
)
DECODE_OPTIONS = {
    "iterations": (int, "NAR: refinements after the first pass"),
    "length_beam": (int, "NAR and aux: length candidates"),
    "nar_score": (str, "NAR (of aux: the lengths alone): paper or released"),
    "prefix": (str, "AR: text that every output begins with"),
    "beam": (int, "AR: beam; 1 is greedy"),
    "beam_stop": (str, "AR: fairseq, transformers or never"),
    "length_penalty": (float, "AR: exponent of the length"),
    "max_length": (int, "longest output in tokens"),
    "min_length": (int, "AR: shortest output in tokens"),
    "no_repeat_ngram_size": (int, "AR: a sequence of so many tokens occurs once"),
    "repetition_penalty": (float, "AR: factor against tokens that occurred already"),
    "forbid": (str, "AR: tokens never written: specials, none, or ids"),
    "threshold": (float, "NAR: settle every token likelier than this in a pass, instead of a fixed schedule"),
    **BOTH_WAYS,
    "aux_order": (str, "aux: left_to_right, or certain (of a model that was trained for any order)"),
    "top_k": (int, "sampled: draw from so many of the likeliest tokens"),
    "top_p": (float, "sampled: draw from the likeliest tokens that have this probability together"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode what was asked for; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    if parsed.demo:
        both = "ar,nar" if parsed.target is None else "nar,aux"
        parsed.checkpoint, parsed.mode = packaged_model(DEMO), both if parsed.mode is None else parsed.mode
    modes = _modes(parsed.mode)
    # --seed says which words are hidden, and how tokens are drawn.
    given = {name: getattr(parsed, name) for name in (*DECODE_OPTIONS, "early_stopping", "seed")}
    options = {name: value for name, value in given.items() if value is not None}
    if modes:
        # Each generator has its own mode; that of the recipe may know less than what is asked for.
        options["mode"] = "ar"
    run = load_run(parsed.checkpoint, options, parsed.device)
    modes = modes or (run.config.decode.mode,)
    _check_used(parsed, modes, run.config)
    prepare_for_inference(run.model, inference_options(parsed).of_modes(modes))
    text = run.codec(parsed.ids)
    # All generators first: a mode that was not trained is refused before anything is decoded.
    generators = {mode: _generator(run, text, mode, parsed) for mode in modes}
    targets = _targets(parsed, list(generators.values()))
    long = LongInputs(run.config.model.max_source_positions, parsed.on_long)
    on_terminal = parsed.output is None and sys.stdout is not None and sys.stdout.isatty()
    progress = DecodeProgress(parsed.progress_seconds, not on_terminal)
    output = Output(parsed.output)
    try:
        for passages in _windows(parsed, run, text):
            first = long.total
            passages = long.fit(passages)
            if targets is not None:
                passages = with_targets(passages, targets, str(parsed.target))
            found = _found(passages, first, generators, progress)
            if parsed.jsonl or parsed.nbest:
                form = as_json if parsed.jsonl else as_nbest
                output.write(form(passages, first, found, parsed.nbest or 1))
            elif parsed.show_source or parsed.heldout or len(found) > 1:
                output.write(as_blocks(passages, first + 1, found))
            else:
                output.write(as_lines(found))
            if long.fault is not None:
                raise long.fault
        if targets is not None and next(targets, None) is not None:
            raise DataError(
                "there are more targets than inputs", str(parsed.target), "give one line for each"
            )
        output.finish()
    finally:
        output.close()
        progress.end(long.total)
        long.warn()
    return 0


def _windows(parsed: argparse.Namespace, run: LoadedRun, text: TextCodec) -> Iterator[list[Passage]]:
    """The inputs, as many at a time as have come."""
    if parsed.heldout:
        yield heldout_passages(run, text, parsed.heldout, parsed.data)
        return
    shown = parsed.demo and _no_input(parsed.input)
    # Sentences of like lengths are decoded together: a window has several batches to choose from.
    largest = max(256, (parsed.batch_tokens or 0) // 16)
    first, capitals = 0, Capitals(run)
    for lines in [list(DEMO_SENTENCES)] if shown else line_windows(parsed.input, largest):
        capitals.look(lines)
        yield line_passages(lines, text, parsed.mask_share, run.config.decode.seed, first)
        first += len(lines)


class Capitals:
    """Says once, on standard error, that a text has capitals where the run has learnt from lower-cased text,
    which its data's manifest tells, if it is at hand."""

    def __init__(self, run: LoadedRun) -> None:
        self._odd = is_lower_cased(run.config.data.path)

    def look(self, lines: Sequence[str]) -> None:
        """The next texts."""
        if self._odd and any(line != line.lower() for line in lines):
            self._odd = False
            what = "the model was trained on lower-cased text: give it lower-cased input"
            print(f"warning: {what}", file=sys.stderr, flush=True)


def _targets(parsed: argparse.Namespace, generators: Sequence[Generator]) -> Iterator[Target] | None:
    """The given targets, all read before anything is decoded."""
    if parsed.target is None:
        return None
    lines = [line for window in line_windows(str(parsed.target)) for line in window]
    words = (parsed.blank_lengths or "1").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UsageError(f"{parsed.blank_lengths!r} are no lengths", "--blank-lengths", "give numbers: 1,2,3")
    lengths = [int(word) for word in words]
    if parsed.input != STDIN and not is_stream(Path(parsed.input)):
        # Before hours of decoding; of what comes through a pipe it is seen at the end.
        inputs = sum(map(len, line_windows(parsed.input)))
        if inputs != len(lines):
            what = f"there are {'fewer' if len(lines) < inputs else 'more'} targets than inputs"
            raise DataError(
                f"{what}: {len(lines):,} and {inputs:,}", str(parsed.target), "give one line for each"
            )
    found, *_ = [made.targets(lines, lengths) for made in generators]
    whole = [str(number) for number, target in enumerate(found, 1) if not target.has_blank]
    if whole:
        which = ", ".join(whole[:5]) + ", ..." * (len(whole) > 5)
        what = f"{len(whole):,} of {len(found):,} targets without a blank: kept as given (line {which})"
        print(f"warning: {what}", file=sys.stderr, flush=True)
    return iter(found)


def _found(
    passages: Sequence[Passage], first: int, generators: Mapping[str, Generator], progress: DecodeProgress
) -> Found:
    """What every mode makes of some inputs."""
    sources, found = [passage.ids for passage in passages], {}
    given = [passage.target for passage in passages]
    targets = given if any(given) else None
    for number, (mode, generator) in enumerate(generators.items(), 1):
        show = (lambda done, total: progress(first + done)) if number == len(generators) else None
        start = time.perf_counter()
        groups = generator.generate_ids(sources, show, first, targets)
        seconds = (time.perf_counter() - start) / max(1, len(sources))
        told = generator.with_text(groups, given)
        found[mode] = [[replace(item, seconds=seconds) for item in group] for group in told]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=user_path, help="a run folder, one of its checkpoints, or demo")
    add("--demo", action="store_true", help="the package's German-English model (ar,nar; blanks: nar,aux)")
    add("--mode", help="ar, nar, draft, aux, or several, as ar,nar (default: as the run's recipe says)")
    given = "text file, one input a line (default: standard input)"
    add("--input", type=os.path.expanduser, default="-", help=given)
    add("--output", type=user_path, help="file to write, FILE.part until the end (default: standard output)")
    add_long_argument(parser)
    batch = "tokens of a batch, padding included (default: 4096, and 32 sentences at most)"
    add("--batch-tokens", type=int, metavar="N", help=batch)
    seconds = "seconds between two lines about progress where standard error is no terminal; 0: none"
    add("--progress-seconds", type=float, default=30.0, metavar="S", help=f"{seconds} (default: 30)")
    add("--show-source", action="store_true", help="print the sources beside the outputs")
    add("--heldout", type=int, default=0, metavar="N", help="decode N samples of the run's validation split")
    add("--data", type=user_path, help="data directory for --heldout (default: where it lay in training)")
    add("--mask-share", type=float, default=0.0, metavar="S", help="hide this share of each line's words")
    add(
        "--target",
        type=user_path,
        metavar="FILE",
        help="nar and aux: fill the blanks of these lines, ___ or <mask>",
    )
    lengths = "--target: tokens that a blank may have, as 1,2,3; the best of all combinations (default: 1)"
    add("--blank-lengths", metavar="N,...", help=lengths)
    seed = "which words --mask-share hides; draws of samples (default: 1, or as in the recipe)"
    add("--seed", type=int, help=seed)
    nbest = "AR: beams or samples, NAR and aux: lengths: N of each input, as `number ||| text ||| score`, of "
    nbest += "several modes `number ||| text ||| mode ||| score`; best first, samples as they were drawn"
    add("--nbest", type=int, metavar="N", help=nbest)
    add("--jsonl", action="store_true", help="one JSON object an output: text, score, passes, seconds, ...")
    add("--ids", action="store_true", help="inputs and outputs are token ids")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    add_inference_arguments(parser, ("auto", *DTYPES))
    add_decode_arguments(parser, DECODE_OPTIONS)
    stop_early = "AR, transformers: stop at `beam` finished hypotheses (default: as the run's recipe says)"
    add("--early-stopping", action=argparse.BooleanOptionalAction, help=stop_early)
    return parser


def _modes(given: str | None) -> tuple[str, ...]:
    modes = tuple(mode.strip() for mode in given.split(",")) if given is not None else ()
    for mode in modes:
        if mode not in NAMES:
            raise UsageError(
                f"there is no mode {mode!r}",
                "--mode",
                suggestion(mode, NAMES, "use ar, nar, draft, aux, or several, as ar,nar"),
            )
    return tuple(dict.fromkeys(modes))


def _check(parsed: argparse.Namespace) -> None:
    """Options that cannot be meant."""
    if (parsed.checkpoint is None) != parsed.demo:
        raise UsageError(
            "two models are named" if parsed.demo else "no model is named",
            "--checkpoint, --demo",
            "give --checkpoint RUN, or --demo for the model that the package ships",
        )
    if parsed.heldout < 0 or not 0 <= parsed.mask_share <= 1:
        raise UsageError(
            f"--heldout is {parsed.heldout}, --mask-share is {parsed.mask_share}",
            "the command line",
            "give a number of samples, and a share between 0 and 1",
        )
    if parsed.heldout and parsed.target:
        what = "held-out samples have targets of their own"
        raise UsageError(what, "--heldout, --target", "give sources with --input")
    if parsed.heldout and (parsed.input != "-" or parsed.mask_share):
        raise UsageError(
            "held-out samples and another input were asked for",
            "--heldout, --input, --mask-share",
            "give --heldout alone",
        )
    if parsed.threshold is not None and not 0 < parsed.threshold <= 1:
        raise UsageError(
            f"{parsed.threshold} is no probability that a token could pass",
            "--threshold",
            "give a number above 0 and up to 1, such as 0.9",
        )
    if parsed.ids and parsed.mask_share:
        raise UsageError(
            "words are hidden in text, not in token ids",
            "--ids, --mask-share",
            "put the mask's id into the input",
        )
    for option, size in (("--beam", parsed.beam), ("--length-beam", parsed.length_beam)):
        if None not in (size, parsed.nbest) and size < parsed.nbest:
            fix = f"give {option} {parsed.nbest} or more, or leave it out"
            raise UsageError(f"{option} {size} finds no {parsed.nbest} outputs", f"{option}, --nbest", fix)
    if parsed.show_source and parsed.nbest and not parsed.jsonl:
        what = "n-best lists have no place for the sources"
        raise UsageError(what, "--nbest, --show-source", "leave --show-source out, or add --jsonl")
    if parsed.output is not None and parsed.output.is_dir():
        raise UsageError("the output is a folder", str(parsed.output), "give a file to --output")
    files = [path for path in (parsed.output, Path(parsed.input)) if path is not None and path.is_file()]
    if len(files) == 2 and files[0].samefile(files[1]):
        raise UsageError("input and output are one file", str(parsed.output), "give another file to --output")
    if not parsed.progress_seconds >= 0:
        what = f"progress cannot be told every {parsed.progress_seconds} seconds"
        raise UsageError(what, "--progress-seconds", "give 0 or more")
    if parsed.batch_tokens is not None and parsed.batch_tokens < 1:
        what = f"a batch cannot have {parsed.batch_tokens} tokens"
        raise UsageError(what, "--batch-tokens", "give 1 or more")


def _no_input(name: str) -> bool:
    """Whether nothing waits to be decoded: no file is named and nobody has put anything into the pipe."""
    return name == "-" and (sys.stdin is None or sys.stdin.isatty() or not sys.stdin.buffer.peek(1))  # type: ignore[union-attr]


def _check_used(parsed: argparse.Namespace, modes: Sequence[str], config: RunConfig) -> None:
    """Refuse, by name, what would have no effect.

    Raises:
        UsageError: no mode that is asked for uses an option, or another option is missing for it.
    """
    refuse_unused(given_options(parsed), modes)
    sampled = config.decode.temperature
    for name in ("length_beam", "nar_score") if parsed.target is not None else ():
        if getattr(parsed, name) is not None:
            option = f"--{name.replace('_', '-')}"
            fix = "leave it out; --blank-lengths 1,2,3 tries several lengths of a blank"
            raise UsageError("a given target has the lengths of its blanks", f"{option}, --target", fix)
    if parsed.beam is not None and sampled:
        fix = "leave --beam out (--nbest N draws N), or give --temperature 0"
        raise UsageError("samples have no beam", "--beam, --temperature", fix)
    needs = {
        "top_k": ("--temperature", sampled),
        "top_p": ("--temperature", sampled),
        "blank_lengths": ("--target", parsed.target),
        "seed": ("--mask-share or --temperature", parsed.mask_share or sampled),
        "data": ("--heldout N", parsed.heldout),
        "early_stopping": ("--beam-stop transformers", config.decode.beam_stop == "transformers"),
    }
    for name, (needed, value) in needs.items():
        if getattr(parsed, name) is not None and not value:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect without {needed}", option, f"add {needed}")
    if parsed.nbest is not None and parsed.nbest < 1:
        raise UsageError(f"{parsed.nbest} outputs cannot be given", "--nbest", "give 1 or more")


def _generator(run: LoadedRun, text: TextCodec, mode: str, parsed: argparse.Namespace) -> Generator:
    asked: dict[str, Any] = {"mode": mode}
    drawn, size = run.config.decode.temperature, MODES[mode].size
    sampled = drawn and "temperature" in MODES[mode].options
    if parsed.nbest is not None and size:
        # So many are looked for at least; samples are drawn as many as are wanted.
        asked[size] = max(parsed.nbest, 1 if sampled else getattr(run.config.decode, size))
    elif size and getattr(parsed, size) is not None:
        asked[size] = getattr(parsed, size)
    config, batch_tokens = with_decode(run.config, asked), parsed.batch_tokens
    if batch_tokens is None:
        return Generator(run.model, text, config)
    return Generator(run.model, text, config, batch_tokens, batch_tokens)
