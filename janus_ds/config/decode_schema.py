"""How text is generated, field by field: the `decode` section of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DecodeConfig"]


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated (section 4 of the method, section 3.4 of the paper)."""

    mode: str = "nar"
    """ar, nar, or draft: NAR drafts and AR checks, the output is that of AR with beam 1 (needs both)."""
    beam: int = 5
    """AR beam; 1 is greedy. Mode draft knows no other."""
    beam_stop: str = "fairseq"
    """fairseq or transformers: when the search ends and how scores are normalised."""
    early_stopping: bool = False
    """beam_stop transformers only: end a search as soon as `beam` hypotheses are finished."""
    length_penalty: float = 1.0
    """Exponent of the length in the AR score."""
    max_length: int = 0
    """Longest output in tokens; 0: as the position table allows."""
    iterations: int | None = 4
    """NAR refinement iterations; decoder passes are one more. None, with `threshold` only: no limit."""
    length_beam: int = 5
    """NAR length candidates."""
    threshold: float | None = None
    """NAR: a pass settles every token of a higher probability, and at least one, until none is masked.

    Takes the place of mask-predict's schedule; `iterations` then limits the passes. None: the schedule.
    """
    nar_score: str | None = None
    """NAR candidates and their score; None: as the objective's preset says.

    paper (the likeliest lengths, mean over inner tokens, special symbols forbidden) or released
    (neighbours of the likeliest length, sum divided by the length with b and e, nothing forbidden).
    """
    rescore: str | None = None
    """NAR: `ar` lets AR score the candidates of mask-predict, in one pass of the same weights."""
    rescore_weight: float = 1.0
    """Weight of AR's score among candidates; the rest goes to NAR's."""
    rescore_samples: int = 0
    """Further candidates for AR to score: samples of each one at the positions NAR is not sure of."""
    draft_width: int = 3
    """Mode draft: drafts of a sentence that AR checks at once (lengths, or ways to go on)."""
    temperature: float = 0.0
    """Mode draft: above 0, exact samples of AR's distribution at this temperature (rejection sampling)."""
    seed: int = 1
    """Of the samples."""
