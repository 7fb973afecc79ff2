"""What the searches need to know, from a run's recipe and its special symbols."""

from __future__ import annotations

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.decode.beam_search import SearchSettings
from janus_ds.decode.mask_predict import MaskPredictSettings

__all__ = ["mask_predict_settings", "most_rows", "search_settings"]


def search_settings(config: RunConfig, special: SpecialTokens) -> SearchSettings:
    """For AR: beam search, and the checks of a draft."""
    decode, bart = config.decode, config.objective.decoder_start == "eos_bos"
    # Content rows stand at positions 0 .. T - 1; without bos among them, the last position is eos's.
    steps = config.model.max_target_positions - (0 if bart else 1)
    if decode.max_length:
        steps = min(steps, decode.max_length + (2 if bart else 1))
    return SearchSettings(
        beam=decode.beam,
        max_steps=steps,
        start=special.eos if bart else special.bos,
        eos=special.eos,
        forbidden=tuple({special.bos, special.pad, special.unk, special.mask}),
        forced_first=special.bos if bart else None,
        stop=decode.beam_stop,
        early_stopping=decode.early_stopping,
        length_penalty=decode.length_penalty,
    )


def mask_predict_settings(config: RunConfig, special: SpecialTokens) -> MaskPredictSettings:
    """For NAR, as the recipe says."""
    decode, rule = config.decode, config.decode.nar_score or "paper"
    specials = (special.bos, special.pad, special.eos, special.unk, special.mask)
    return MaskPredictSettings(
        iterations=decode.iterations,
        bos=special.bos,
        eos=special.eos,
        pad=special.pad,
        mask=special.unk if config.objective.mask_symbol == "unk" else special.mask,
        forbidden=() if rule == "released" else tuple(set(specials)),
        score=rule,
        threshold=decode.threshold,
    )


def most_rows(config: RunConfig) -> int:
    """Most NAR rows of a sentence, bos and eos included."""
    rows, longest = config.model.max_target_positions, config.decode.max_length
    return min(rows, longest + 2) if longest else rows
