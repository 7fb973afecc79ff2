"""Decode text with a checkpoint, autoregressively, non-autoregressively, or both.

    python eval/decode.py --checkpoint RUN --mode nar --iterations 4 < sources.txt > outputs.txt
    python eval/decode.py --checkpoint RUN --mode ar,nar --heldout 3
    python eval/decode.py --checkpoint RUN --mode ar,nar --mask-share 0.3 --input passages.txt
    python eval/decode.py --demo                         the model of the package: German to English

Lines in, lines out, in order. With several modes, `--show-source` or `--heldout`, each output comes as a
block: source, reference where there is one, and what each mode made of it. --demo without input translates
a few sentences of its own.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from janus_ds.cli.arguments import BOTH_WAYS, add_inference_arguments, inference_options
from janus_ds.config.faults import suggestion
from janus_ds.decode.generator import Generator
from janus_ds.decode.hypothesis import ScoredTokens
from janus_ds.decode.load import DEMO, LoadedRun, load_run, with_decode
from janus_ds.decode.text import IdText, TextCodec, one_line
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.evaluate.passages import Passage, heldout_passages, line_passages, read_lines
from janus_ds.io import disk_faults
from janus_ds.model.decoding.inference import prepare_for_inference

MODES = ("ar", "nar", "draft")
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
    "length_beam": (int, "NAR: length candidates"),
    "nar_score": (str, "NAR: paper or released"),
    "beam": (int, "AR: beam; 1 is greedy"),
    "beam_stop": (str, "AR: fairseq or transformers"),
    "length_penalty": (float, "AR: exponent of the length"),
    "max_length": (int, "longest output in tokens"),
    "threshold": (float, "NAR: settle every token likelier than this in a pass, instead of a fixed schedule"),
    **BOTH_WAYS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode what was asked for; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    _check(parsed)
    if parsed.demo:
        parsed.checkpoint, parsed.mode = Path(DEMO), parsed.mode or "ar,nar"
    modes = _modes(parsed.mode)
    given = {name: getattr(parsed, name) for name in (*DECODE_OPTIONS, "early_stopping")}
    options = {name: value for name, value in given.items() if value is not None}
    # --seed says which words are hidden, and how tokens are drawn.
    options["seed"] = parsed.seed
    _check_beam(modes, parsed.beam)
    device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(parsed.checkpoint, options, device)
    prepare_for_inference(run.model, inference_options(parsed))
    text = _text(run, parsed.ids)
    # All generators first: a mode that was not trained is refused before anything is decoded.
    generators = {mode: _generator(run, text, mode) for mode in modes or (run.config.decode.mode,)}
    if parsed.heldout:
        passages = heldout_passages(run.config, run.special, text, parsed.heldout, parsed.data)
    else:
        lines = list(DEMO_SENTENCES) if parsed.demo and _no_input(parsed.input) else read_lines(parsed.input)
        passages = line_passages(lines, text, parsed.mask_share, parsed.seed)
    found = {mode: _best(generator, passages) for mode, generator in generators.items()}
    blocks = parsed.show_source or parsed.heldout or len(found) > 1
    _write(parsed.output, _as_blocks(passages, found, text) if blocks else _as_lines(found, text))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run folder, one of its checkpoints, or demo")
    add("--demo", action="store_true", help="the model of the package, German to English, in both modes")
    add("--mode", help="ar, nar, draft, or several, as ar,nar (default: as the run's recipe says)")
    add("--input", default="-", help="text file, one input a line (default: standard input)")
    add("--output", type=Path, help="file to write (default: standard output)")
    add("--show-source", action="store_true", help="print the sources beside the outputs")
    add("--heldout", type=int, default=0, metavar="N", help="decode N samples of the run's validation split")
    add("--data", type=Path, help="data directory for --heldout (default: where it lay in training)")
    add("--mask-share", type=float, default=0.0, metavar="S", help="hide this share of each line's words")
    add("--seed", type=int, default=1, help="which words --mask-share hides; draws of samples")
    add("--ids", action="store_true", help="inputs and outputs are token ids")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    add_inference_arguments(parser)
    for name, (kind, text) in DECODE_OPTIONS.items():
        add("--" + name.replace("_", "-"), type=kind, help=f"{text} (default: as the run's recipe says)")
    stop_early = "AR, transformers: stop at `beam` finished hypotheses (default: as the run's recipe says)"
    add("--early-stopping", action=argparse.BooleanOptionalAction, help=stop_early)
    return parser


def _modes(given: str | None) -> tuple[str, ...]:
    modes = tuple(mode.strip() for mode in given.split(",")) if given is not None else ()
    for mode in modes:
        if mode not in MODES:
            raise UsageError(
                f"there is no mode {mode!r}",
                "--mode",
                suggestion(mode, MODES, "use ar, nar, draft, or several, as ar,nar"),
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
    if parsed.output is not None and parsed.output.is_dir():
        raise UsageError("the output is a folder", str(parsed.output), "give a file to --output")


def _no_input(name: str) -> bool:
    """Whether nothing waits to be decoded: no file is named and nobody has put anything into the pipe."""
    return name == "-" and (sys.stdin is None or sys.stdin.isatty() or not sys.stdin.buffer.peek(1))  # type: ignore[union-attr]


def _check_beam(modes: Sequence[str], beam: int | None) -> None:
    if "draft" in modes and "ar" not in modes and (beam or 1) > 1:
        raise UsageError(
            f"mode draft gives the output of greedy search, but the beam is {beam}",
            "--mode draft --beam",
            "leave --beam out; for a beam use --mode ar",
        )


def _text(run: LoadedRun, ids: bool) -> TextCodec:
    if ids:
        return IdText(run.special)
    if run.text is None:
        raise CheckpointError(
            "the run has no tokenizer", str(run.folder), "give token ids and --ids, or convert it with --dict"
        )
    return run.text


def _generator(run: LoadedRun, text: TextCodec, mode: str) -> Generator:
    return Generator(run.model, text, run.special, with_decode(run.config, {"mode": mode}))


def _best(generator: Generator, passages: Sequence[Passage]) -> list[ScoredTokens]:
    return [found[0] for found in generator.generate_ids([p.ids for p in passages], _progress)]


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rdecoded {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _as_lines(found: dict[str, list[ScoredTokens]], text: TextCodec) -> list[str]:
    (only,) = found.values()
    return [one_line(text.decode(item.tokens)) for item in only]


def _as_blocks(
    passages: Sequence[Passage], found: dict[str, list[ScoredTokens]], text: TextCodec
) -> list[str]:
    lines = []
    for number, passage in enumerate(passages):
        rows: dict[str, Any] = {"source": passage.source}
        if passage.reference is not None:
            rows["reference"] = passage.reference
        for mode, items in found.items():
            item = items[number]
            rows[f"{mode.upper()} {item.score:.3f}"] = one_line(text.decode(item.tokens))
        width = max(12, *(len(name) + 2 for name in rows))
        lines += [f"[{number + 1}]", *(f"{name:<{width}}{value}" for name, value in rows.items()), ""]
    return lines


def _write(output: Path | None, lines: list[str]) -> None:
    content = "".join(f"{line}\n" for line in lines)
    if output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        print(content, end="")
        return
    with disk_faults(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(content, encoding="utf-8")
