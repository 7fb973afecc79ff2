"""Hugging Face's `BartForConditionalGeneration` in: names, shapes and settings of its files.

A folder of that layout holds `config.json`, `generation_config.json` and the weights. BART is the mode
`ar` with `decoder_start: eos_bos`: content `</s> <s> w1 .. wn` at positions 0.., as in
`transformers`' `shift_tokens_right`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.fields import shown
from janus_ds.config.schema import DecodeConfig, ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.decoding.cache import ANY
from janus_ds.model.formats.fairseq import (
    TABLE,
    ConversionReport,
    fill_up,
    our_names,
    refuse_untied,
)
from janus_ds.model.formats.foreign_files import read_settings, read_state_dict, unknown_forms
from janus_ds.model.weights import parameter_shapes, refuse_too_many_layers, weight_faults

CONFIG_FILE = "config.json"
PREFIX, SHARED, BIAS = "model.", "model.shared.weight", "final_logits_bias"
_HEAD = "lm_head"
_COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", f"{_HEAD}.weight")
"""Where the tied embedding table stands once more in some files."""
_OTHER_KIND = "convert a BART (model_type bart); other models have no counterpart here"
_SIZES = {
    **{name: name for name in ("d_model", "encoder_layers", "decoder_layers")},
    **{"ffn_dim": "encoder_ffn_dim", "heads": "encoder_attention_heads"},
    **{f"max_{side}_positions": "max_position_embeddings" for side in ("source", "target")},
}
"""Fields of ours that must be given, and theirs."""
_RATES = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.02}
"""What is taken where they are not given."""
_LAST_NORMS = tuple(f"model.{side}.layer_norm.weight" for side in ("encoder", "decoder"))
_UNSUPPORTED = ("normalize_before", "add_final_layer_norm", "static_position_embeddings", "add_bias_logits")


@dataclass(frozen=True)
class HfBart:
    """A BART under our names."""

    model: ModelConfig
    special: SpecialTokens
    decoder_start: str
    """As `objective.decoder_start`."""
    decode: DecodeConfig
    weights: dict[str, Tensor]
    report: ConversionReport


def load_hf_bart(folder: Path, tokenizer: SpecialTokens | None) -> HfBart:
    """Read a folder that `save_pretrained` wrote, or one from the hub.

    Args:
        folder: with `config.json` and weights (`model.safetensors` or `pytorch_model.bin`, also in shards).
        tokenizer: special symbols and size of the folder's tokenizer; None: ids come from `config.json`.
    """
    where, notes = str(folder / CONFIG_FILE), list[str]()
    with unknown_forms(where):
        settings = read_settings(folder / CONFIG_FILE)
        _refuse_other_kinds(settings, where)
        model = _shape(settings, where)
        raw, file = read_state_dict(folder)
        origin = {_full_name(name, raw): name for name in raw}
        state = {full: raw[name] for full, name in origin.items()}
        _refuse_pre_norm(state, str(folder / file))
        weights, used = our_names(_fairseq_names(state, str(folder / file)))
        _refuse_disagreement(weights, model, settings, f"{where} and {file}")
        special = _special(settings, tokenizer, weights["embedding.weight"].shape[0], notes, where)
        added = fill_up(weights, model, special, notes)
        start, decode = read_search(folder, settings, special, model.max_target_positions, notes)
    taken = {_table_name(state) if name == TABLE else PREFIX + name for name in used}
    known = taken | set(_COPIES) | {SHARED, BIAS}
    report = ConversionReport(
        used=tuple(name for full, name in origin.items() if full in taken),
        ignored=tuple(name for full, name in origin.items() if full not in known),
        added=tuple(added),
        notes=tuple(notes),
        missing=tuple(full for full in (*_COPIES, BIAS) if full not in state),
    )
    return HfBart(model, special, start, decode, weights, report)


def _refuse_other_kinds(settings: dict[str, Any], where: str) -> None:
    kind = settings.get("model_type")
    if kind != "bart":
        fix = "take the run that it was exported from" if kind == "janus" else _OTHER_KIND
        raise CheckpointError(f"the model is of type {kind!r}, not 'bart'", f"{where}: model_type", fix)
    given = [name for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("normalize_embedding") is False:
        given.append("normalize_embedding: false")
    if settings.get("tie_word_embeddings") is False:
        given.append("tie_word_embeddings: false")
    if given:
        raise CheckpointError(
            f"this variant of BART is not known here: {', '.join(given)}", where, _OTHER_KIND
        )


def _refuse_pre_norm(state: Mapping[str, Tensor], where: str) -> None:
    """A norm after the last layer belongs to mBART and others of its kind, whatever the settings say."""
    found = [name for name in _LAST_NORMS if name in state]
    if found:
        raise CheckpointError(
            f"the file has {found[0]}: the model is pre-norm, BART is post-norm", where, _OTHER_KIND
        )


def _shape(settings: dict[str, Any], where: str) -> ModelConfig:
    for name in ("ffn_dim", "attention_heads"):
        sides = [settings.get(f"{side}_{name}") for side in ("encoder", "decoder")]
        if sides[0] != sides[1]:
            raise CheckpointError(
                f"encoder_{name} is {sides[0]}, decoder_{name} {sides[1]}",
                where,
                "only models with equal numbers can be converted",
            )
    given: dict[str, Any] = {ours: settings.get(theirs) for ours, theirs in _SIZES.items()}
    given |= {name: settings.get(name, default) for name, default in _RATES.items()}
    given["activation"] = settings.get("activation_function", "gelu")
    given["scale_embedding"] = bool(settings.get("scale_embedding", False))
    try:
        model = ModelConfig(layernorm_embedding=True, **given)
    except ValidationError as error:
        items = error.errors(include_url=False)
        faults = "; ".join(f"{item['loc'][0]} is {shown(item['input'])}: {item['msg']}" for item in items)
        raise CheckpointError(f"the settings are no BART's ({faults})", where, _OTHER_KIND) from None
    if model.d_model % model.heads:
        raise CheckpointError(
            f"{model.heads} heads do not divide d_model {model.d_model}", where, "copy the file again"
        )
    return model


def _full_name(name: str, raw: Mapping[str, Tensor]) -> str:
    """A name as `BartForConditionalGeneration` has it; files of a bare `BartModel` lack the prefix."""
    bare = "encoder.embed_positions.weight" in raw and not name.startswith((_HEAD, BIAS))
    return PREFIX + name if bare else name


def _table_name(state: Mapping[str, Tensor]) -> str:
    return SHARED if SHARED in state else _COPIES[0]


def _fairseq_names(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights under fairseq's names; copies of the table and the bias are checked and left out."""
    table = _table_name(state)
    if table not in state:
        raise CheckpointError(f"{SHARED} is not in the file", where, _OTHER_KIND)
    refuse_untied(state, _COPIES, table, where, "only models with one tied embedding can be converted")
    if BIAS in state and bool(state[BIAS].any()):
        raise CheckpointError(
            f"{BIAS} is not zero, and there is no such bias here",
            where,
            "only models without it can be converted",
        )
    left_out = (SHARED, *_COPIES)
    plain = {
        n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX) and n not in left_out
    }
    return {TABLE: state[table], **plain}


def _refuse_disagreement(
    weights: dict[str, Tensor], model: ModelConfig, settings: dict[str, Any], where: str
) -> None:
    refuse_too_many_layers(model, len(weights), where)
    expected = parameter_shapes(replace(model, vocab_multiple=1), settings["vocab_size"])
    del expected["length_head.weight"]
    faults = weight_faults(weights, expected)
    if faults:
        raise CheckpointError(
            f"the configuration and the weights disagree: {faults}", where, "take both files from one model"
        )


def _special(
    settings: dict[str, Any], tokenizer: SpecialTokens | None, rows: int, notes: list[str], where: str
) -> SpecialTokens:
    """Special ids and vocabulary size, from the tokenizer where there is one."""
    ids = {name: settings.get(f"{name}_token_id") for name in ("bos", "pad", "eos")}
    if tokenizer is None:
        notes.append(f"no tokenizer in the folder: <unk> 3 and <mask> {rows - 1} assumed, as in every BART")
        if any(not isinstance(i, int) for i in ids.values()):
            raise CheckpointError(
                "bos_token_id, pad_token_id or eos_token_id is missing", where, "copy it again"
            )
        return SpecialTokens(
            **{name: int(i or 0) for name, i in ids.items()}, unk=3, mask=rows - 1, vocab_size=rows
        )
    wrong = [
        f"{n}_token_id {i}, the tokenizer {getattr(tokenizer, n)}"
        for n, i in ids.items()
        if i is not None and i != getattr(tokenizer, n)
    ]
    if wrong:
        raise CheckpointError(
            f"the configuration has {'; '.join(wrong)}",
            where,
            "take config.json and tokenizer from one model",
        )
    only_mask_lacks = tokenizer.vocab_size == rows + 1 and tokenizer.mask == rows
    if tokenizer.vocab_size > rows and not only_mask_lacks:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} symbols, the embedding table {rows} rows",
            where,
            "take tokenizer and weights from one model",
        )
    if tokenizer.vocab_size < rows:
        notes.append(
            f"the embedding has {rows - tokenizer.vocab_size} rows beyond the tokenizer; they are kept"
        )
        return replace(tokenizer, vocab_size=rows)
    return tokenizer


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


def read_search(
    folder: Path, settings: dict[str, Any], special: SpecialTokens, positions: int, notes: list[str]
) -> tuple[str, DecodeConfig]:
    """How a published model decodes: `objective.decoder_start`, and the search.

    As transformers reads them: from `generation_config.json`, or else from `config.json`.

    Args:
        notes: gets what `generate` would do otherwise.

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
            _OTHER_KIND,
        )
    penalty = given.get("length_penalty")
    if penalty is not None and penalty < 0:
        raise CheckpointError(
            f"length_penalty is {penalty}, and below 0 there is no counterpart here",
            f"{where}: length_penalty",
            "write 0 or more there: hypotheses are ranked by their sum / length ** length_penalty",
        )
    notes += [
        f"{name} {given[name]} of the generation settings has no counterpart here"
        for name, neutral in _NO_COUNTERPART.items()
        if given.get(name) not in (None, neutral)
    ]
    return starts[token], _decode(given, starts[token], special, positions, notes)


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
