"""Settings of drafts and of rescoring, chosen on validation sentences: test sentences only judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from janus_ds.tools.bench_common import interleave, summary

__all__ = ["CHOSEN_DRAFT", "CHOSEN_RESCORED", "Decode", "choose", "drafts_to_try", "rescorings_to_try"]

CHOSEN_DRAFT = "draft-chosen"
CHOSEN_RESCORED = "nar-4-rescored-chosen"
"""Names of the chosen settings among the systems."""

Decode = dict[str, Any]


def drafts_to_try() -> list[Decode]:
    """Numbers of drafts that are checked at once."""
    return [{"mode": "draft", "draft_width": width} for width in (1, 2, 3, 4)]


def rescorings_to_try() -> list[Decode]:
    """Numbers of lengths, AR's weight, and samples at uncertain positions, at 4 iterations."""
    nar = {"mode": "nar", "iterations": 4, "rescore": "ar"}
    return [
        {**nar, "length_beam": lengths, "rescore_weight": weight, "rescore_samples": samples}
        for lengths, weight, samples in (
            (3, 1.0, 0),
            (5, 1.0, 0),
            (5, 0.7, 0),
            (7, 1.0, 0),
            (9, 1.0, 0),
            (5, 1.0, 2),
        )
    ]


def choose(
    once: Callable[[Decode], Callable[[], object]],
    sentences: int,
    rounds: int,
    bleu: Callable[[Decode], float],
) -> dict[str, dict[str, Any]]:
    """The draft that took the least time sentence by sentence, and the rescoring with the best BLEU.

    Args:
        once: a job that decodes validation sentences one by one.
        sentences: how many these are.
        rounds: how often times are taken, in turns.
        bleu: of validation sentences.

    Returns:
        For each name the settings that were chosen, and what all of them gave (milliseconds a sentence).
    """
    drafts, rescorings = drafts_to_try(), rescorings_to_try()
    seconds = interleave({str(i): once(decode) for i, decode in enumerate(drafts)}, rounds)
    taken = [1000 * summary(seconds[str(i)])["median"] / sentences for i in range(len(drafts))]
    scores = [bleu(decode) for decode in rescorings]
    return {
        CHOSEN_DRAFT: _chosen(drafts, "milliseconds", taken, min(taken)),
        CHOSEN_RESCORED: _chosen(rescorings, "sacrebleu", scores, max(scores)),
    }


def _chosen(
    tried: Sequence[Mapping[str, Any]], figure: str, values: Sequence[float], best: float
) -> dict[str, Any]:
    table = [{"decode": decode, figure: value} for decode, value in zip(tried, values, strict=True)]
    return {"decode": tried[values.index(best)], "tried": table}
