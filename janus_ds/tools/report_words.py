"""Names for readers: metrics and modes, and which direction of a metric is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.tools.report_data import iterations_of

__all__ = ["closeness", "metric_title", "mode_title", "objective_text"]

_TITLES = {
    "sacrebleu": "BLEU",
    "tokenized_bleu": "tokenised BLEU",
    "compound_bleu": "compound-split BLEU",
    "chrf": "chrF",
    "repetition": "repeated tokens, %",
    "repetition_words": "repeated words, %",
    "reference_repetition_words": "repeated words in the references, %",
    "length_ratio": "length, % of references",
    "sentences_per_second": "sentences/s, in batches",
    "ms_per_sentence_batch_1": "ms/sentence, one by one",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "distinct1": "Distinct-1",
    "distinct2": "Distinct-2",
    "f1": "F1",
    "overall": "overall",
}


def metric_title(name: str) -> str:
    """How a metric is written for readers; unknown ones as they are."""
    return _TITLES.get(name, name.replace("_", " "))


def mode_title(mode: str) -> str:
    """How a mode is written for readers: AR, NAR 4; unknown ones as they are."""
    number = iterations_of(mode)
    return f"NAR {number}" if number is not None else mode.upper() if mode in ("ar", "nar") else mode


def closeness(metric: str, value: float) -> float | None:
    """A number that is larger the better the value is; None for metrics without a better side."""
    if metric.startswith("reference_"):
        return None
    if metric == "length_ratio":
        return -abs(value - 100)
    if metric.startswith(("repetition", "ms_")):
        return -value
    return value


def objective_text(preset: str, objective: Mapping[str, Any], task: str | None) -> str:
    """The preset, and how a run's weights differ from it: "paper without AUX, K".

    Args:
        preset: its name.
        objective: the fields of the recipe.
        task: of the data, pair or denoise: `released` has a bundle for each.
    """
    weights = OBJECTIVE_PRESETS.get(preset) or OBJECTIVE_PRESETS.get(f"{preset}/{task}") or {}
    changed = {
        name.removeprefix("weight_"): objective[name]
        for name, value in weights.items()
        if name.startswith("weight_") and objective.get(name, value) != value
    }
    left_out = [_term_title(term) for term, weight in changed.items() if weight == 0]
    divergences = [term for term in weights if term.startswith("weight_kl_") and weights[term]]
    if divergences and all(objective.get(term) == 0 for term in divergences):
        left_out = [*(title for title in left_out if not title.startswith("K(")), "K"]
    others = [f"{_term_title(term)} x {weight:g}" for term, weight in changed.items() if weight]
    without = f"{preset} without {', '.join(left_out)}" if left_out else preset
    return ", ".join([without, *others])


def _term_title(term: str) -> str:
    pair = term.removeprefix("kl_").upper().replace("_", ", ")
    return f"K({pair})" if term.startswith("kl_") else term if term == "length" else term.upper()
