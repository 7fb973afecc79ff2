"""The settings of `generate` that come with a published model, as our own beam search takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import DecodeConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.decoding.symbols import ANY
from janus_ds.model.formats.foreign_files import read_settings

GENERATION_FILE = "generation_config.json"
_NO_COUNTERPART = {
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "renormalize_logits": False,
    "sequence_bias": None,
}
"""Settings that change outputs and are not known here, with the value that changes nothing."""


@dataclass(frozen=True)
class HfSearch:
    """How a published model decodes.

    Attributes:
        decoder_start: as `objective.decoder_start`.
        decode: the search.
        notes: what `generate` would do otherwise.
    """

    decoder_start: str
    decode: DecodeConfig
    notes: list[str]


def read_search(folder: Path, settings: dict[str, Any], special: SpecialTokens, positions: int) -> HfSearch:
    """As transformers reads them: from `generation_config.json`, or else from `config.json`.

    Args:
        folder: the model's.
        settings: its `config.json`.
        special: its special symbols.
        positions: rows of the decoder's position table.

    Raises:
        CheckpointError: a start token or a length penalty that is not known here.
    """
    file = folder / GENERATION_FILE
    given = read_settings(file) if file.is_file() else dict(settings)
    where = str(file if file.is_file() else folder / "config.json")
    token = given.get("decoder_start_token_id", settings.get("decoder_start_token_id"))
    starts = {None: "eos_bos", special.eos: "eos_bos", special.bos: "bos"}
    if token not in starts:
        raise CheckpointError(
            f"the decoder starts from token {token}, which is neither eos nor bos",
            f"{where}: decoder_start_token_id",
            "convert a BART (model_type bart); other models have no counterpart here",
        )
    penalty = given.get("length_penalty")
    if penalty is not None and penalty < 0:
        raise CheckpointError(
            f"length_penalty is {penalty}, and below 0 there is no counterpart here",
            f"{where}: length_penalty",
            "write 0 or more there: hypotheses are ranked by their sum / length ** length_penalty",
        )
    notes = [
        f"{name} {given[name]} of the generation settings has no counterpart here"
        for name, neutral in _NO_COUNTERPART.items()
        if given.get(name) not in (None, neutral)
    ]
    return HfSearch(starts[token], _decode(given, starts[token], special, positions, notes), notes)


def _decode(
    given: dict[str, Any], start: str, special: SpecialTokens, positions: int, notes: list[str]
) -> DecodeConfig:
    """The search; what cannot be taken over is noted."""
    bart, early = start == "eos_bos", given.get("early_stopping")
    first = given.get("forced_bos_token_id")
    if first is None and given.get("force_bos_token_to_be_generated"):
        first = special.bos
    lead, last = int(first is not None), given.get("forced_eos_token_id")
    if isinstance(last, list) and len(last) == 1:
        last = last[0]
    longest = _longest(given, lead, positions - (0 if bart else 1), notes)
    # Theirs counts the start token and a forced first one, ours counts neither.
    shortest = max(_new_or_all(given, "min") - 1 - lead, 0)
    return DecodeConfig(
        mode="ar",
        beam=int(given.get("num_beams") or 1),
        beam_stop="never" if early == "never" else "transformers",
        early_stopping=early is True,
        length_penalty=float(1.0 if given.get("length_penalty") is None else given["length_penalty"]),
        max_length=longest,
        min_length=min(shortest, longest or shortest),
        no_repeat_ngram_size=given.get("no_repeat_ngram_size") or 0,
        repetition_penalty=float(given.get("repetition_penalty") or 1.0),
        forced_bos=None if first == (special.bos if bart else None) else ANY if first is None else first,
        forced_eos=None if last == special.eos else ANY if last is None else last,
        forbid=_forbidden(given, special, notes),
    )


def _new_or_all(given: dict[str, Any], end: str) -> int:
    """Tokens as theirs counts them, the start token included; 0: not said."""
    new = given.get(f"{end}_new_tokens")
    return int(given.get(f"{end}_length") or 0) if new is None else int(new) + 1


def _longest(given: dict[str, Any], lead: int, table: int, notes: list[str]) -> int:
    """`decode.max_length`; the table allows so many tokens, eos included."""
    steps = _new_or_all(given, "max") - 1
    if steps < 0:
        notes.append(
            "no max_length is given: transformers would stop after 20 tokens, this after the position table"
        )
        return 0
    if steps < table and steps <= lead + 1:
        notes.append(f"max_length {steps + 1} leaves no room for a token: 1 is taken")
    return 0 if steps >= table else max(steps - lead - 1, 1)


def _forbidden(given: dict[str, Any], special: SpecialTokens, notes: list[str]) -> str:
    """`decode.forbid`."""
    words = [word for word in given.get("bad_words_ids") or [] if word != [special.eos]]
    if any(len(word) > 1 for word in words):
        notes.append("bad_words_ids of several tokens have no counterpart here")
    ids = {word[0] for word in words if len(word) == 1} | set(given.get("suppress_tokens") or [])
    if ids == {special.bos, special.pad, special.unk, special.mask}:
        return "specials"
    return " ".join(str(id_) for id_ in sorted(ids)) or "none"
