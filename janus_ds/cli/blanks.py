"""How well a pretrained run fills blanks: accuracy before and after on held-out text, and passages.

    janus-ds blanks runs/quickstart

Before: the weights that the run started from (`init`), if it did not start from random ones.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from janus_ds.batch import TwoStreamBatch
from janus_ds.checkpoint.manifest import step_of
from janus_ds.cli.arguments import program_parser
from janus_ds.cli.decode_lines import FoundBy, as_blocks, saying
from janus_ds.config.packaged import user_path
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.loader import validation_batches
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.step_plan import RankShare
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run, trained_modes, with_decode
from janus_ds.decode.text import one_line
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.evaluate.passages import heldout_passages, valid_split
from janus_ds.io import write_atomic
from janus_ds.model.janus import JanusModel
from janus_ds.observe.progress import table

_BATCH = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, decode and print; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    run = load_run(parsed.run, None, parsed.device)
    _check(run)
    batches = blank_batches(run, parsed.samples, parsed.data)
    found = {}
    if run.config.init is not None:
        found[f"before ({run.config.init})"] = fill_blanks(load_run(run.config.init).model, batches)
    found["after"] = fill_blanks(run.model, batches)
    passages = sum(batch.counts.samples for batch in batches)
    print(f"{passages} passages of {valid_split(run.config, parsed.data)}, which no update has seen.")
    print(_figures(found), end="\n\n")
    shown, lines = _decoded(run, parsed.show, parsed.data)
    print("\n".join(lines))
    if parsed.json is not None:
        figures: dict[str, Any] = {"step": step_of(run.weights.parent), "steps": run.config.train.max_steps}
        figures |= {"passages": passages, "tokens": found["after"].tokens, "shown": shown}
        figures |= {name.split()[0]: {"ar": item.ar, "nar": item.nar} for name, item in found.items()}
        write_atomic(parsed.json, (json.dumps(figures, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"The run lies in {run.folder}. Next, give it a sentence with some words hidden:\n")
    command = f"janus-ds decode --checkpoint {shlex.quote(str(run.folder))} --mode ar,nar --show-source"
    print(f'  echo "The old man opened the <mask> and looked <mask> the street." | {command}')
    return 0


@dataclass(frozen=True)
class Blanks:
    """Tokens hidden from the encoder, and the shares of them whose likeliest token is the original."""

    tokens: int
    ar: float
    """Each given the source and all of the original to its left."""
    nar: float
    """All at once, given the source and what the original has around the blanks."""


def blank_batches(run: LoadedRun, samples: int, data: Path | None = None) -> list[TwoStreamBatch]:
    """The first samples of a run's validation split (at most all), masked where the encoder does not see."""
    masking = replace(run.config.masking, target_share=run.config.masking.source_share)
    config: RunConfig = replace(run.config, masking=masking)
    maker = BatchMaker(valid_split(config, data), config, run.special)
    share = RankShare(rank=0, size=1, micro_batch=_BATCH)
    return [item.batch for item in validation_batches(maker, share, samples)]


@torch.no_grad()
def fill_blanks(model: JanusModel, batches: list[TwoStreamBatch]) -> Blanks:
    """Predict all masked tokens, in one pass of the decoder a batch; the model is in evaluation mode."""
    tokens, right = 0, {"ar": 0, "nar": 0}
    symbols = model.special.vocab_size
    for batch in batches:
        batch = batch.to(model.output_weight.device)
        rows = model(batch)
        target_T = batch.masked_target_BM.flatten()[batch.masked_T]
        tokens += len(target_T)
        streams = {"ar": (rows.ar_BAD, batch.ar_masked_T), "nar": (rows.nar_BMD, batch.masked_T)}
        for name, (hidden, index_T) in streams.items():
            logits_TV = hidden.flatten(0, 1)[index_T] @ model.output_weight[:symbols].T
            right[name] += int((logits_TV.argmax(1) == target_T).sum())
    return Blanks(tokens, right["ar"] / max(1, tokens), right["nar"] / max(1, tokens))


def _check(run: LoadedRun) -> None:
    if run.config.data.task != "denoise" or not {"ar", "nar"} <= set(trained_modes(run.config.objective)):
        raise UsageError(
            "the run was not pretrained both ways",
            str(run.folder),
            "give a run of `janus-ds pretrain` with objective.preset paper",
        )
    if run.text is None:
        raise CheckpointError("the run has no tokenizer", str(run.folder), "give a run that has one")


def _figures(found: dict[str, Blanks]) -> str:
    """Blanks filled rightly, as a table and in words."""
    after = found["after"]
    rows = [
        [f"blanks ({after.tokens:,} tokens) filled with the original token", *found],
        ["NAR: all at once, from both sides", *(f"{100 * blanks.nar:.1f} %" for blanks in found.values())],
        ["AR: one after another, from the left", *(f"{100 * blanks.ar:.1f} %" for blanks in found.values())],
    ]
    before = next(iter(found.values()))
    if before is after:
        return table(rows)
    kept = "kept" if after.ar >= before.ar - 0.01 else "lost some of"
    words = (
        f"Of 100 hidden tokens, NAR finds {100 * after.nar:.0f} at once; before this run it found "
        f"{100 * before.nar:.0f}. AR has {kept} what it knew."
    )
    return f"{table(rows)}\n{words}"


def _decoded(run: LoadedRun, count: int, data: Path | None) -> tuple[list[dict[str, str]], list[str]]:
    """Held-out passages and what AR and NAR make of their sources: as texts, and as lines to print."""
    text = run.text
    if text is None or count < 1:
        return [], []
    passages = heldout_passages(run.config, run.special, text, count, data)
    sources = [passage.ids for passage in passages]
    found = {}
    for mode in ("ar", "nar"):
        generator = Generator(run.model, text, run.special, with_decode(run.config, {"mode": mode}))
        found[mode] = FoundBy(generator.generate_ids(sources), 0.0)
    shown = [
        {"source": one_line(passage.source), "reference": one_line(passage.reference or "")}
        | {mode: one_line(text.decode(by.items[number][0].tokens)) for mode, by in found.items()}
        for number, passage in enumerate(passages)
    ]
    return shown, as_blocks(passages, 1, found, saying(passages, text))


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="a run folder of pretraining, or one of its checkpoints")
    add("--samples", type=int, default=512, metavar="N", help="held-out passages measured [%(default)s]")
    add("--show", type=int, default=3, metavar="N", help="held-out passages shown [%(default)s]")
    add("--data", type=Path, metavar="DIR", help="the data directory (default: where it lay in training)")
    add("--json", type=Path, metavar="FILE", help="write figures and passages as JSON, too")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    return parser
