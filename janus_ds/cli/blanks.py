"""How well a pretrained run fills blanks: accuracy before and after on held-out text, and passages.

    janus-ds blanks runs/quickstart

Before: the weights that the run started from (`init`), if it did not start from random ones. The passages
shown have two words of one token each hidden, which each mode fills with what it knows of them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.checkpoint.manifest import step_of
from janus_ds.checkpoint.tensors import find_weights, read_weights
from janus_ds.cli.arguments import at_least, program_parser
from janus_ds.cli.decode_lines import Found, Passage, as_blocks, heldout_passages, valid_split
from janus_ds.config.locations import user_path
from janus_ds.config.modes import trained_modes, with_decode
from janus_ds.config.presets import record_of, with_conventions
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.loader import validation_batches
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import word_beginnings
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.decode.mask_predict import most_rows, plain_settings, ruled
from janus_ds.decode.rescore import ArScorer
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import TextCodec, one_line
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.io import write_atomic
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.progress import table

WAYS = {
    "ar": "AR: one after another, from the left",
    "nar": "NAR: all at once, from both sides",
    "aux": "AUX: one after another, from both sides",
}
"""What each mode knows of a blank when it fills it."""
_BATCH = 32
_COMMONEST = 10
_DRAWN = 40
_WHOLE = re.compile(r"""["']?[A-Z].{40,}[.!?]["']?$""")
_HIDDEN = 2
_SEED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, decode and print; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    run = load_run(parsed.run, None, parsed.device)
    _check(run)
    batches = blank_batches(run, parsed.samples, parsed.data)
    found = {}
    if run.config.init is not None:
        try:
            begun, recipe = _before(run, run.config.init), record_of(Path(run.config.init)).get("recipe")
            # A plain AR model, such as BART, has never learnt query rows.
            as_begun = replace(run, config=with_conventions(run.config, recipe, ["ar_stream"]))
            found[f"before ({run.config.init})"] = fill_blanks(
                begun, blank_batches(as_begun, parsed.samples, parsed.data)
            )
        except CheckpointError as error:
            print(f"What the run began with is not measured: {error.what} ({error.where}).")
    found["after"] = fill_blanks(run.model, batches)
    passages = sum(batch.counts.samples for batch in batches)
    print(f"{passages} passages of {valid_split(run, parsed.data)}, which no update has seen.")
    print(_figures(found), end="\n\n")
    shown, lines = _decoded(run, parsed.show, parsed.data)
    print("\n".join(lines))
    if parsed.json is not None:
        figures: dict[str, Any] = {"step": step_of(run.weights.parent), "steps": run.config.train.max_steps}
        figures |= {"passages": passages, "tokens": found["after"].tokens, "shown": shown}
        figures |= {name.split()[0]: item.shares for name, item in found.items()} | {
            "rare": found["after"].rare
        }
        write_atomic(parsed.json, (json.dumps(figures, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"The run lies in {run.folder}. Next, give it a sentence with some words hidden:\n")
    print('  echo "The old man opened the <mask> and looked <mask> the street." > blanks.txt')
    command = f"janus-ds decode --checkpoint {shlex.quote(str(run.folder))} --input blanks.txt"
    print(f"  {command} --target blanks.txt --mode nar,aux")
    return 0


@dataclass(frozen=True)
class Blanks:
    """Tokens hidden from the encoder, and the shares of them whose likeliest token is the original."""

    tokens: int
    shares: dict[str, float]
    """By mode. ar: each given the source and all of the original to its left. nar: all at once, given the
    source and what the original has around the blanks. aux: as nar, and given the blanks to the left, too."""
    rare: dict[str, float]
    """The same without the ten commonest of the hidden tokens."""


def blank_batches(run: LoadedRun, samples: int, data: Path | None = None) -> list[TwoStreamBatch]:
    """The first samples of a run's validation split (at most all), masked where the encoder does not see."""
    masking = replace(run.config.masking, target_share=run.config.masking.source_share)
    config: RunConfig = replace(run.config, masking=masking, objective=run.config.objective.one_draw)
    maker = BatchMaker(valid_split(run, data), config, run.special)
    share = RankShare(rank=0, size=1, micro_batch=_BATCH)
    return [item.batch for item in validation_batches(maker, share, samples)]


@torch.no_grad()
def fill_blanks(model: JanusModel, batches: list[TwoStreamBatch]) -> Blanks:
    """Predict all masked tokens, in one pass of the decoder a batch; the model is in evaluation mode."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    symbols = model.special.vocab_size
    for batch in batches:
        batch = batch.to(model.output_weight.device)
        rows = model(batch)
        target_T = batch.masked_target_BM.flatten()[batch.masked_T]
        found["hidden"].append(target_T)
        streams = {"ar": (rows.ar_BAD, batch.ar_masked_T), "nar": (rows.nar_BMD, batch.masked_T)}
        streams |= {"aux": (rows.aux_BMD, batch.masked_T)} if rows.aux_BMD is not None else {}
        for name, (hidden, index_T) in streams.items():
            logits_TV = hidden.flatten(0, 1)[index_T] @ model.output_weight[:symbols].T
            found[name].append(logits_TV.argmax(1))
    hidden_N, *tokens = (torch.cat(parts) for parts in found.values())
    common = hidden_N.bincount(minlength=symbols).topk(min(_COMMONEST, symbols)).indices
    rare_N = ~torch.isin(hidden_N, common)
    right = {name: (token_N == hidden_N).double() for name, token_N in zip(streams, tokens, strict=True)}
    shares = {name: float(right_N.mean()) for name, right_N in right.items()}
    rare = {name: float(right_N[rare_N].mean()) if rare_N.any() else 0.0 for name, right_N in right.items()}
    return Blanks(len(hidden_N), shares, rare)


def _before(run: LoadedRun, init: str) -> JanusModel:
    """The run's model with the weights that it began with, as training reads them; the length head, which
    fills no blanks, is the run's own."""
    weights = read_weights(find_weights(Path(init)))
    weights["length_head.weight"] = run.model.state_dict()["length_head.weight"]
    model = JanusModel(run.config.model, run.special, ParallelLayers())
    load_weights(model, weights, init)
    return model.to(run.model.output_weight.device).eval()


def _check(run: LoadedRun) -> None:
    if run.config.data.task != "denoise" or not {"ar", "nar"} <= set(trained_modes(run.config.objective)):
        raise UsageError(
            "the run was not pretrained both ways",
            str(run.folder),
            "give a run of `janus-ds pretrain` with objective.preset paper",
        )
    run.codec()


def _figures(found: dict[str, Blanks]) -> str:
    """Blanks filled rightly, as a table and in words."""
    after = found["after"]
    rows = [
        [f"blanks ({after.tokens:,} tokens) filled with the original token", *found],
        *(
            [WAYS[mode], *(f"{100 * blanks.shares[mode]:.1f} %" for blanks in found.values())]
            for mode in after.shares
        ),
    ]
    before = next(iter(found.values()))
    if before is after:
        return table(rows)
    kept = "kept" if after.shares["ar"] >= before.shares["ar"] - 0.01 else "lost some of"
    words = (
        f"Of 100 hidden tokens, NAR finds {100 * after.shares['nar']:.0f} at once; before this run it found "
        f"{100 * before.shares['nar']:.0f}. AR has {kept} what it knew.\n{rare_words(after.rare)}"
    )
    return f"{table(rows)}\n{words}"


def rare_words(rare: dict[str, float]) -> str:
    """What a short training does not teach, in words."""
    shares = ", ".join(f"{mode.upper()} {100 * share:.0f}" for mode, share in rare.items())
    return (
        "Commas and small words are learned first: of 100 hidden tokens that are not among the "
        f"{_COMMONEST} commonest, {shares} are found."
    )


def _decoded(run: LoadedRun, count: int, data: Path | None) -> tuple[list[dict[str, str]], list[str]]:
    """Held-out passages with words hidden, and what each mode makes of them: as texts, as lines to print."""
    if count < 1:
        return [], []
    text = run.codec()
    drawn = heldout_passages(run, text, _DRAWN * count, data)
    lines = [one_line(passage.reference or "") for passage in drawn]
    most = min(run.config.model.max_source_positions, most_rows(run.config)) - 2
    # Most blocks begin or end within a sentence; a tiny vocabulary may have no word of one token.
    for chosen, longest in (([line for line in lines if _WHOLE.match(line)], 1), (lines, most)):
        hidden = {line: source for line in chosen if (source := _with_blanks(line, text, longest))}
        passages = [Passage(text.encode(source), source, line) for line, source in hidden.items()]
        passages = [item for item in passages if len(item.ids) <= most]
        if len(passages) >= count:
            break
    begins_V = word_beginnings(text, run.special.vocab_size)
    found: Found = {}
    for mode in run.config.objective.streams[1:]:
        generator = Generator(run.model, text, with_decode(run.config, {"mode": mode}))
        targets = generator.targets([item.source for item in passages], (1,))
        passages = [replace(item, target=target) for item, target in zip(passages, targets, strict=True)]
        groups = generator.generate_ids([item.ids for item in passages], targets=targets)
        found = {**found, mode: generator.with_text(groups, targets)}
    by_ar = generator.with_text([[_from_left(run, item, begins_V)] for item in passages], targets)
    found = {"ar": by_ar, **found}
    # Sure is not right: the scores know nothing of the hidden words.
    sure = [sum(items[i][0].score for items in found.values()) for i in range(len(passages))]
    surest = sorted(range(len(passages)), key=lambda i: -sure[i])[:count]
    told = f"The {len(surest)} of {len(passages)} such sentences that the modes together are surest of:"
    passages = [passages[i] for i in surest]
    best: Found = {mode: [items[i] for i in surest] for mode, items in found.items()}
    shown = [
        {"source": one_line(passage.source), "reference": passage.reference or ""}
        | {mode: one_line(items[number][0].text) for mode, items in best.items()}
        for number, passage in enumerate(passages)
    ]
    return shown, [told, "", *as_blocks(passages, 1, best)]


@torch.inference_mode()
def _from_left(run: LoadedRun, passage: Passage, begins_V: Tensor | None) -> Hypothesis:
    """AR's fills: each blank's likeliest token, given the source and what stands to the left of it alone."""
    model, config, special = run.model, run.config, run.special
    device = model.output_weight.device
    forbidden = torch.tensor(plain_settings(config, special).forbidden, device=device)
    scorer = ArScorer(model, config)
    source_1S = torch.tensor([[special.bos, *passage.ids, special.eos]], device=device)
    memory = model.encode(source_1S, torch.tensor([source_1S.shape[1]], device=device))
    row, gains = list(passage.target.ids if passage.target else ()), []
    places = [place for place, id_ in enumerate(row) if id_ < 0]
    for place in places:
        ((logits_TV,),) = scorer.logits(memory, [[[max(id_, 0) for id_ in row]]])
        score_V = logits_TV[place - len(row) - 1].log_softmax(0)
        allowed_V = score_V.index_fill(0, forbidden, -torch.inf)
        if begins_V is not None:
            wanted = torch.tensor([row[place]], device=device)
            (allowed_V,) = ruled(allowed_V[None], wanted, begins_V.to(device))
        row[place] = int(allowed_V.argmax())
        gains.append(float(score_V[row[place]]))
    return Hypothesis(tuple(row), sum(gains) / len(gains), len(places), filled=tuple(places))


def _with_blanks(line: str, text: TextCodec, longest: int) -> str | None:
    """A line with two inner words hidden that have so many tokens at most; None: it has not two."""
    words, draw = line.split(), random.Random(f"{_SEED}:{line}")
    short = [i for i, word in enumerate(words) if word.isalpha() and len(text.encode(word)) <= longest][1:-1]
    if len(short) < _HIDDEN:
        return None
    for place in draw.sample(short, _HIDDEN):
        words[place] = MASK_TEXT
    source = " ".join(words)
    return None if f"{MASK_TEXT} {MASK_TEXT}" in source else source


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="a run folder of pretraining, or one of its checkpoints")
    add("--samples", type=at_least(1), default=512, metavar="N", help="passages measured [%(default)s]")
    add("--show", type=at_least(0), default=3, metavar="N", help="passages shown [%(default)s]")
    add("--data", type=user_path, metavar="DIR", help="data directory (default: where it lay in training)")
    add("--json", type=user_path, metavar="FILE", help="write figures and passages as JSON, too")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    return parser
