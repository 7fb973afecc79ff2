"""Measures what one set of weights with two decoders can do: drafts, rescored NAR, the dial.

All systems of a run decode the same sentences of its test split in one process; times are CPU time, taken in
turns. What is measured is plain data for JSON; `both_ways_page.py` writes it down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from janus_ds.data.pair_text import held_out_text
from janus_ds.decode.draft import DraftedTokens
from janus_ds.decode.generator import Generator, trained_modes
from janus_ds.decode.hypothesis import ScoredTokens
from janus_ds.decode.load import LoadedRun, with_decode
from janus_ds.decode.rescore import ArScorer
from janus_ds.decode.settings import search_settings
from janus_ds.metrics.files import TextLines
from janus_ds.metrics.translation import score_translations
from janus_ds.model.incremental import ArStream
from janus_ds.model.inference import InferenceOptions
from janus_ds.tools.bench_common import interleave, ratio_summary, summary
from janus_ds.tools.both_ways_choice import Decode, choose
from janus_ds.tools.checkpoint_eval import EvalRequest, codec_of, load_checkpoint

__all__ = ["GREEDY", "SYSTEMS", "BothWaysRequest", "acceptance", "differences", "measure_run"]

GREEDY = "ar-greedy"
_NAR: Decode = {"mode": "nar"}
_DRAFT: Decode = {"mode": "draft"}
SYSTEMS: dict[str, Decode] = {
    "ar": {"mode": "ar", "beam": 5},
    GREEDY: {"mode": "ar", "beam": 1},
    **{f"nar-{n}": {**_NAR, "iterations": n, "length_beam": 3} for n in (0, 1, 4, 10)},
    "nar-4-5-lengths": {**_NAR, "iterations": 4, "length_beam": 5},
    **{
        f"nar-{n}-rescored": {**_NAR, "iterations": n, "length_beam": 5, "rescore": "ar"}
        for n in (0, 1, 4, 10)
    },
    **{
        f"nar-t{p:g}": {**_NAR, "iterations": None, "length_beam": 3, "threshold": p}
        for p in (0.5, 0.7, 0.9, 0.99)
    },
    "draft": {**_DRAFT},
    "draft-1-wide": {**_DRAFT, "draft_width": 1},
    "draft-8-wide": {**_DRAFT, "draft_width": 8},
}
"""What is compared, by name; `draft` is the mode as it is without options."""
_UNTIMED = "refined"
_DIFFERENCES = (("float64", False), ("fp32", False), ("bf16", False), ("fp32", True))
_CLOSE = 1e-4
_POSITIONS = 20


@dataclass(frozen=True)
class BothWaysRequest:
    """What is measured.

    Attributes:
        limit: sentences of the test split, from the first; 0: all.
        timed: sentences that times are taken of.
        rounds: how often.
        valid: validation sentences that settings are chosen on (times: `timed` of them).
        average: checkpoints whose weights are averaged.
    """

    limit: int = 250
    timed: int = 32
    rounds: int = 3
    valid: int = 250
    average: int = 1


Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Split:
    ids: list[list[int]]
    references: TextLines


def measure_run(folder: Path, request: BothWaysRequest, told: Progress = lambda _: None) -> dict[str, Any]:
    """All figures of one run.

    Raises:
        CheckpointError: no such run; ConfigError: it was not trained for both ways.
    """
    run = _load(folder, request.average, InferenceOptions())
    split = _split(run, "test", request.limit)
    told(f"{folder.name}: settings chosen on validation sentences")
    chosen = _choose(run, request)
    every = {**SYSTEMS, **{name: part["decode"] for name, part in chosen.items()}}
    greedy: list[ScoredTokens] = []
    systems = {}
    for name, decode in every.items():
        told(f"{folder.name}: {name}")
        found = _decode(_generator(run, decode), split.ids)
        greedy = found if name == GREEDY else greedy
        systems[name] = {**_figures(run, split, found), "decode": decode}
        if decode["mode"] == "draft":
            outputs = [item.tokens for item in found]
            systems[name]["differences_in_batches"] = _unequal(outputs, [item.tokens for item in greedy])
            systems[name]["acceptance"] = acceptance(found)
    told(f"{folder.name}: times")
    return {
        "run": run.config.name,
        "objective": run.config.objective.preset,
        "trained": list(trained_modes(run.config.objective)),
        "kl_weights": _kl_weights(run),
        "checkpoint": run.weights.parent.name,
        "averaged": request.average,
        "chosen": chosen,
        "sentences": len(split.ids),
        "mean_tokens": sum(len(item.tokens) for item in greedy) / max(1, len(greedy)),
        "systems": systems,
        "times": {str(batch): _times(run, split, request, every, batch) for batch in (1, 32)},
        "lossless": [_lossless(folder, split, request, form, told) for form in _DIFFERENCES],
    }


def _load(folder: Path, average: int, inference: InferenceOptions) -> LoadedRun:
    return load_checkpoint(EvalRequest(folder, average, inference=inference))


def _choose(run: LoadedRun, request: BothWaysRequest) -> dict[str, dict[str, Any]]:
    """Settings of drafts and of rescoring, from validation sentences."""
    split = _split(run, "valid", request.valid)
    some = _some(split, request.timed)

    def bleu(decode: Decode) -> float:
        found = _decode(_generator(run, decode), split.ids)
        score: float = _figures(run, split, found)["metrics"]["sacrebleu"]
        return score

    return choose(lambda decode: _job(_generator(run, decode, 1), some, 1), len(some), request.rounds, bleu)


def _some(split: _Split, count: int) -> list[list[int]]:
    """So many sentences, from all over the split."""
    return split.ids[:: max(1, len(split.ids) // count)][:count]


def _split(run: LoadedRun, name: str, limit: int) -> _Split:
    text, codec = held_out_text(Path(run.config.data.path or "."), name), codec_of(run)
    count = limit or len(text.sources)
    sources, references = text.sources[:count], text.references[:count]
    return _Split([codec.encode(line) for line in sources], TextLines(text.names[1], references))


def _generator(run: LoadedRun, decode: Mapping[str, Any], batch: int = 32) -> Generator:
    return Generator(run.model, run.text, run.special, with_decode(run.config, decode), batch)


def _decode(generator: Generator, ids: Sequence[Sequence[int]]) -> list[ScoredTokens]:
    return [candidates[0] for candidates in generator.generate_ids(ids)]


def _figures(run: LoadedRun, split: _Split, found: Sequence[ScoredTokens]) -> dict[str, Any]:
    lines = TextLines("outputs", [codec_of(run).decode(item.tokens) for item in found])
    scores = score_translations(lines, split.references, "test", [item.tokens for item in found])
    # A search with one beam takes a step for each token and one for eos.
    passes = [item.passes or len(item.tokens) + 1 for item in found]
    return {
        "metrics": scores.metrics,
        "signature": scores.signatures["sacrebleu"],
        "passes": sum(passes) / max(1, len(passes)),
    }


def acceptance(found: Iterable[ScoredTokens]) -> dict[str, Any]:
    """Of the drafted tokens that AR looked at, the share that it accepted, by position and in all.

    A token behind the first rejected one of its draft was not looked at. Position 1 is the first token.
    """
    looked: Counter[int] = Counter()
    stood: Counter[int] = Counter()
    firsts: list[int] = []
    rounds = 0
    for item in found:
        turns = item.rounds if isinstance(item, DraftedTokens) else ()
        rounds += len(turns)
        firsts += [turn.accepted for turn in turns[:1]]
        for turn in turns:
            stood.update(range(turn.prefix + 1, turn.prefix + turn.accepted + 1))
            seen = min(turn.accepted + 1, turn.drafted)
            looked.update(range(turn.prefix + 1, turn.prefix + seen + 1))
    total = sum(looked.values())
    return {
        "rate": sum(stood.values()) / total if total else 0.0,
        "by_position": [stood[p] / looked[p] if looked[p] else None for p in range(1, _POSITIONS + 1)],
        "looked_at": [looked[p] for p in range(1, _POSITIONS + 1)],
        "first_draft": sum(firsts) / len(firsts) if firsts else 0.0,
        "rounds": rounds / len(firsts) if firsts else 0.0,
    }


def _times(
    run: LoadedRun, split: _Split, request: BothWaysRequest, systems: Mapping[str, Decode], batch: int
) -> dict[str, Any]:
    """ms a sentence, and times of AR greedy in the times of each system."""
    ids = _some(split, max(batch, request.timed))
    timed = {name: decode for name, decode in systems.items() if _UNTIMED not in name}
    jobs = {name: _job(_generator(run, decode, batch), ids, batch) for name, decode in timed.items()}
    seconds = interleave(jobs, request.rounds)
    per_sentence = {name: [1000 * s / len(ids) for s in values] for name, values in seconds.items()}
    return {
        "sentences": len(ids),
        "rounds": request.rounds,
        "milliseconds": {name: summary(values) for name, values in per_sentence.items()},
        "faster_than_greedy": {
            name: ratio_summary(seconds[GREEDY], values) for name, values in seconds.items()
        },
    }


def _job(generator: Generator, ids: Sequence[Sequence[int]], batch: int) -> Callable[[], object]:
    if batch > 1:
        return lambda: generator.generate_ids(ids)
    return lambda: [generator.generate_ids([row]) for row in ids]


def _lossless(
    folder: Path, split: _Split, request: BothWaysRequest, form: tuple[str, bool], told: Progress
) -> dict[str, Any]:
    dtype, int8 = form
    told(f"{folder.name}: differences in {dtype}{' int8' if int8 else ''}")
    run = _load(folder, request.average, InferenceOptions(dtype, int8))
    greedy = _decode(_generator(run, SYSTEMS[GREEDY]), split.ids)
    found = _decode(_generator(run, SYSTEMS["draft"]), split.ids)
    listed = differences(run, split.ids, greedy, found)
    return {
        "precision": f"{dtype} int8" if int8 else dtype,
        "sentences": len(greedy),
        "different": len(listed),
        "not_close": sum(item["margin"] > _CLOSE for item in listed),
        "list": listed,
    }


def differences(
    run: LoadedRun,
    sources: Sequence[Sequence[int]],
    expected: Sequence[ScoredTokens],
    found: Sequence[ScoredTokens],
) -> list[dict[str, Any]]:
    """Where two searches part: sentence, position, and how far apart AR's two best tokens are there.

    The margin is a difference of logits, of a pass over the tokens that both have in common.
    """
    listed = []
    config = with_decode(run.config, SYSTEMS[GREEDY])
    search = search_settings(config, run.special)
    scorer = ArScorer(run.model, ArStream.of(config.objective, run.special), search)
    for number in _unequal([x.tokens for x in found], [x.tokens for x in expected]):
        one, two = (*expected[number].tokens, -1), (*found[number].tokens, -1)
        place = next(i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1])
        source = [run.special.bos, *sources[number], run.special.eos]
        with torch.no_grad():
            memory = run.model.encode(torch.tensor([source]), torch.tensor([len(source)]))
            (rows,) = scorer.logits(memory, [[one[:place]]])
        logits_V = rows[0][place]
        logits_V[list(search.forbidden)] = float("-inf")
        best = logits_V.topk(2).values
        margin = float(best[0] - best[1])
        listed.append({"sentence": number + 1, "position": place + 1, "margin": margin})
    return listed


def _unequal(one: Sequence[tuple[int, ...]], two: Sequence[tuple[int, ...]]) -> list[int]:
    return [number for number, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def _kl_weights(run: LoadedRun) -> dict[str, float | None]:
    objective = run.config.objective
    return {
        "ar_nar": objective.weight_kl_ar_nar,
        "ar_aux": objective.weight_kl_ar_aux,
        "nar_aux": objective.weight_kl_nar_aux,
    }
