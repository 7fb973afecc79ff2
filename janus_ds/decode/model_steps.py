"""Adapts a model and its recipe to the interfaces of beam search, mask-predict and AUX search.

Shape letters: B sentences, K beams, C length candidates, R = B * C rows, L target tokens, P picked rows,
X rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.decode.mask_predict import MaskPredictSettings
from janus_ds.decode.search_settings import SearchSettings, TokenRules
from janus_ds.decode.watch import BeamTrace, current_watch
from janus_ds.errors import ConfigError
from janus_ds.model.attention import KeysValues
from janus_ds.model.decoding.cache import EncoderOutput, KVCache
from janus_ds.model.decoding.steps import AuxPool
from janus_ds.model.decoding.symbols import ANY, ArSymbols
from janus_ds.model.janus import JanusModel


class CachedSteps:
    """The step function of a beam search: one content row and one query row a beam.

    Args:
        cache: of the sentences that begin.
        encode_next: encodes the next sentences that wait, so many; None: none wait.
        before: a token that is fed together with the first ones, before them.
    """

    def __init__(
        self,
        model: JanusModel,
        cache: KVCache,
        encode_next: Callable[[int], EncoderOutput] | None = None,
        before: int | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._encode_next = encode_next
        self._before = before
        watch = current_watch()
        self._trace = BeamTrace(watch) if watch else None

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None, step: int) -> Tensor:
        """See :class:`janus_ds.decode.beam_search.StepFunction`."""
        tokens = [token_BK]
        if parent_BK is None and self._before is not None:
            tokens.insert(0, torch.full_like(token_BK, self._before))
        hidden_BKTD = self._model.ar_block(self._cache, torch.stack(tokens, 2), parent_BK)
        logits_BKV = self._model.logits(hidden_BKTD[:, :, -1])
        if self._trace:
            self._trace.note(token_BK, parent_BK, logits_BKV)
        return logits_BKV

    def keep(self, sentence_B: Tensor) -> None:
        """See :class:`janus_ds.decode.beam_search.StepFunction`."""
        self._cache = self._cache.select(sentence_B)

    def refill(self, place_X: Tensor) -> None:
        """See :class:`janus_ds.decode.beam_search.RefillableSteps`."""
        if self._encode_next is not None:
            self._cache.refill(place_X, self._encode_next(len(place_X)))


class NarDecoder:
    """The decoder of mask-predict: all length candidates of all sentences in one pass."""

    def __init__(self, model: JanusModel, memory: EncoderOutput) -> None:
        self._model = model
        self._memory = memory

    @property
    def device(self) -> torch.device:
        """Where tokens are wanted."""
        return self._memory.states_BSD.device

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor, most: int) -> Tensor:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        shape = (self._memory.sentences, -1)
        token_BCL, length_BC = token_RL.view(*shape, token_RL.shape[1]), length_R.view(shape)
        return self._model.nar_rows(self._memory, token_BCL, length_BC, (picked_P, most))

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        return self._model.logits(hidden_XD)

    def keep(self, sentence_B: Tensor) -> None:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        self._memory = self._memory.select(sentence_B)


class AuxDecoder(NarDecoder):
    """The decoder of AUX search: NAR's pass, and passes of AUX rows."""

    def __init__(self, model: JanusModel, memory: EncoderOutput, mask: int) -> None:
        super().__init__(model, memory)
        self._mask = mask
        self._pool: AuxPool | None = None
        self._number_X = torch.empty(0)
        """Rows of the pool, by their number in the first call."""

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor, most: int) -> Tensor:
        """See :class:`janus_ds.decode.aux_search.JudgedRows`."""
        kept: list[KeysValues] = []
        shape = (self._memory.sentences, -1)
        token_BCL, length_BC = token_RL.view(*shape, token_RL.shape[1]), length_R.view(shape)
        hidden_PD = self._model.nar_rows(self._memory, token_BCL, length_BC, (picked_P, most), kept)
        slot_R = torch.zeros(token_RL.numel(), dtype=torch.bool, device=token_RL.device)
        slot_RL = slot_R.index_fill(0, picked_P, True).view(token_RL.shape)
        self._pool = AuxPool.build(kept, slot_RL, length_R, most)
        self._number_X = torch.arange(len(length_R))
        return hidden_PD

    def judged(
        self, number_X: Tensor, token_XL: Tensor, settled_X: Tensor, picked_P: Tensor, most: int
    ) -> Tensor:
        """See :class:`janus_ds.decode.aux_search.JudgedRows`."""
        if self._pool is None:
            raise ValueError("AUX rows need a NAR pass before")
        if not torch.equal(number_X, self._number_X):
            # Finished rows may have gone; they are asked for as padding only.
            index_X = torch.searchsorted(self._number_X, number_X).clamp_max(len(self._number_X) - 1)
            self._pool, self._number_X = self._pool.select(index_X.to(token_XL.device)), number_X
        shape, width = (self._memory.sentences, -1), token_XL.shape[1]
        place_P = picked_P // width, picked_P % width
        step_P = self._pool.rank_XN[place_P] - settled_X[place_P[0]]
        hidden_XTD = self._model.aux_rows(
            self._memory, self._pool, token_XL.view(*shape, width), settled_X.view(shape), most, self._mask
        )
        return hidden_XTD[place_P[0], step_P]

    def reorder(self, rank_RL: Tensor) -> None:
        """See :class:`janus_ds.decode.aux_search.JudgedRows`."""
        if self._pool is not None:
            self._pool = self._pool.ordered(rank_RL)


def search_settings(config: RunConfig, special: SpecialTokens, prefix: Sequence[int] = ()) -> SearchSettings:
    """For AR: beam search, and the checks of a draft; in mode ar, outputs begin with a prefix.

    Raises:
        ConfigError: the prefix leaves no room for an output, or has unknown symbols.
    """
    decode, symbols = config.decode, ArSymbols.of(config, special)
    most = symbols.most_steps(config)
    if len(prefix) + symbols.lead >= most:
        raise ConfigError(
            f"the prefix has {len(prefix)} tokens, an output up to {most - symbols.lead - 1}",
            "decode.prefix",
            "give a shorter one, or a larger decode.max_length",
        )
    if special.unk in prefix:
        what = "the prefix has characters that the tokenizer does not know, and no output can have them"
        raise ConfigError(what, "decode.prefix", "leave them out")
    min_steps = decode.min_length + symbols.lead if decode.min_length else 0
    rules = TokenRules(special.eos, decode.no_repeat_ngram_size, decode.repetition_penalty, min_steps)
    return SearchSettings(
        beam=decode.beam,
        max_steps=most,
        start=symbols.start,
        eos=special.eos,
        forbidden=symbols.forbidden,
        forced_first=symbols.first,
        shows_first=symbols.first != special.bos,
        forced_last=ANY if symbols.last is None else symbols.last,
        rules=rules or None,
        stop=decode.beam_stop,
        early_stopping=decode.early_stopping,
        length_penalty=decode.length_penalty,
        prefix=tuple(prefix) if decode.mode == "ar" else (),
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


def plain_settings(config: RunConfig, special: SpecialTokens) -> MaskPredictSettings:
    """The same where tokens are judged or stand in a given text: no special symbol is predicted."""
    specials = {special.bos, special.pad, special.eos, special.unk, special.mask}
    return replace(mask_predict_settings(config, special), forbidden=tuple(specials), score="paper")


def most_rows(config: RunConfig) -> int:
    """Most NAR rows of a sentence, bos and eos included."""
    rows, longest = config.model.max_target_positions, config.decode.max_length
    return min(rows, longest + 2) if longest else rows
