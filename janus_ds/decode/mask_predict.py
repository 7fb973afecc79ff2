"""Non-autoregressive decoding with length candidates: mask-predict, or unmasking by a threshold.

Pass 0 predicts every inner token from MASK. What is masked for the next pass is said by one of two rules:

- mask-predict (section 3.4 of the paper; Ghazvininejad et al., 2019): the least certain tokens of the whole
  target, fewer each time. I iterations are T = I + 1 decoder passes.
- a threshold P (as masked-diffusion models decode): all tokens that the pass predicted with a probability of
  at most P, but for the most certain one. What is settled stays; the passes end when nothing is masked.

All length candidates of all sentences are rows of the same pass, and only masked positions are projected
to the vocabulary.

A pass computes only rows whose outcome is open, and this changes no result. A row is finished when
nothing is masked in it, for the number to mask only falls. A row whose input is that of its last pass
(as many tokens masked, the same ones, and they came out as before) would give the same tokens and
probabilities again, so these are put back. Equal tokens alone allow no stop: another choice of masked
positions may still change them.

Ties: of equal probabilities the smaller token id wins, of equally uncertain tokens the earlier
position is masked first (or settled first, by a threshold), of equally good candidates the first wins
(`paper`: the likelier length; `released`: the shorter one).

Shape letters: B sentences, H of them that the decoder still holds, C length candidates, R = B * C rows
(sentence-major), X rows of a pass (or of a chunk of it), L longest row, P positions predicted in a pass,
D width, K length classes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.watch import Pass, current_watch
from janus_ds.model.attention import KeysValues
from janus_ds.model.decoding.cache import EncoderOutput
from janus_ds.model.janus import JanusModel

ANY_TOKEN, BEGINS_WORD, WITHIN_WORD = -1, -2, -3
"""Which token is wanted at a place of a given target: any, one that begins a word, or one that does not."""

_CHUNK_ROWS = 1024
"""Rows that are projected to the vocabulary at a time, so that logits take a bounded memory."""

_FINISHED_SHARE = 4
"""Finished sentences leave the decoder when they are one of so many: to leave copies the others."""


def ruled(logits_XV: Tensor, wanted_X: Tensor, begins_word_V: Tensor) -> Tensor:
    """The logits, with -inf at tokens that are not of the wanted kind (`BEGINS_WORD`, ...)."""
    wanted_X1 = wanted_X[:, None]
    begins_XV, within_XV = wanted_X1 == BEGINS_WORD, wanted_X1 == WITHIN_WORD
    return logits_XV.masked_fill((begins_XV & ~begins_word_V) | (within_XV & begins_word_V), -math.inf)


class NarDecoder:
    """The passes of a model over all length candidates of a batch; rows and columns as in `TargetRows`."""

    def __init__(self, model: JanusModel, memory: EncoderOutput) -> None:
        self._model = model
        self._memory = memory

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor, most: int) -> Tensor:
        """One decoder pass: hidden rows at the flat indices `picked_P` = r * L + l, shape (P, D).

        `most` is the largest number of them in a row.
        """
        return self._nar_rows(token_RL, length_R, (picked_P, most))

    def _nar_rows(
        self,
        token_RL: Tensor,
        length_R: Tensor,
        picked: tuple[Tensor, int],
        kept: list[KeysValues] | None = None,
    ) -> Tensor:
        shape = (self._memory.sentences, -1)
        token_BCL = token_RL.view(*shape, token_RL.shape[1])
        return self._model.nar_rows(self._memory, token_BCL, length_R.view(shape), picked, kept)

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Logits over the vocabulary, shape (X, V), in float32 at least."""
        return self._model.logits(hidden_XD)

    def keep(self, sentence_B: Tensor) -> None:
        """Go on with these sentences only, by their index among those held now; the others are finished."""
        self._memory = self._memory.select(sentence_B)


@dataclass(frozen=True)
class MaskPredictSettings:
    """What mask-predict needs to know.

    Attributes:
        iterations: I, refinements after the first pass; None, with a threshold: until nothing is masked.
        bos, eos, pad, mask: ids; `mask` is what stands for an unknown token in decoder rows.
        forbidden: tokens that are never predicted.
        score: "paper" (mean log-probability of inner tokens) or "released" (their sum divided by the
            length with bos and eos, which count as certain).
        threshold: P, above 0 and at most 1; None: mask-predict.
        begins_word_V: which tokens do, bool, shape (V,); None: places of given targets take any token.
    """

    iterations: int | None
    bos: int
    eos: int
    pad: int
    mask: int
    forbidden: tuple[int, ...] = ()
    score: str = "paper"
    threshold: float | None = None
    begins_word_V: Tensor | None = None


def mask_predict_settings(config: RunConfig, special: SpecialTokens) -> MaskPredictSettings:
    """For NAR, as the recipe says."""
    decode, rule = config.decode, config.decode.nar_score or "paper"
    return MaskPredictSettings(
        iterations=decode.iterations,
        bos=special.bos,
        eos=special.eos,
        pad=special.pad,
        mask=special.unk if config.objective.mask_symbol == "unk" else special.mask,
        forbidden=() if rule == "released" else tuple(special.ids),
        score=rule,
        threshold=decode.threshold,
    )


def plain_settings(config: RunConfig, special: SpecialTokens) -> MaskPredictSettings:
    """The same where tokens are judged or stand in a given text: no special symbol is predicted."""
    return replace(mask_predict_settings(config, special), forbidden=tuple(special.ids), score="paper")


def most_rows(config: RunConfig) -> int:
    """Most NAR rows of a sentence, bos and eos included."""
    rows, longest = config.model.max_target_positions, config.decode.max_length
    return min(rows, longest + 2) if longest else rows


def remask_counts(inner_R: Tensor, step: int, steps: int) -> Tensor:
    """How many tokens are masked again after pass `step` of `steps`: floor(n * (1 - (step + 1) / steps)).

    The product is taken in float32, as the released code does: 5 * (1 - 4/5) is 1 there and .9999
    in float64.

    Args:
        inner_R: inner tokens n of each row.
        step: the pass just made, from 0.
        steps: T, passes in all.

    Returns:
        int64, shape (R,).
    """
    share_R = torch.full_like(inner_R, 1.0 - (step + 1) / steps, dtype=torch.float32)
    return (inner_R.float() * share_R).long()


def length_candidates(logits_BK: Tensor, rule: str, beam: int, convention: str, longest: int) -> Tensor:
    """Lengths to try for each sentence, bos and eos included, shape (B, C).

    Args:
        logits_BK: the length head's output.
        rule: "paper" (the `beam` likeliest classes) or "released" (`beam` neighbours of the likeliest:
            argmax - beam // 2 and upward).
        beam: candidates wanted; C is smaller where there are not as many classes.
        convention: what a class counts: "inner" tokens, or tokens "with_specials".
        longest: rows of the decoder's position table.
    """
    specials = 2 if convention == "inner" else 0
    if rule == "paper":
        best_BC = logits_BK.topk(min(beam, logits_BK.shape[1]), dim=1).indices
        return (best_BC + specials).clamp(3, longest)
    offset_C = torch.arange(beam, device=logits_BK.device) - beam // 2
    return (logits_BK.argmax(dim=1, keepdim=True) + specials + offset_C).clamp(2, longest)


def mask_predict(
    decoder: NarDecoder, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None = None
) -> list[list[Hypothesis]]:
    """Fill all rows, in at most I + 1 passes; with a threshold and no I, until nothing is masked.

    Args:
        length_BC: candidate lengths, bos and eos included.
        settings: iterations and rules.
        given_RL: tokens that stand, bos, eos and padding among them; `ANY_TOKEN`, `BEGINS_WORD` or
            `WITHIN_WORD` where one is wanted. None: all inner ones are wanted.

    Returns:
        For each sentence its C candidates, best first, without bos and eos; `passes` counts those passes
        in which anything of the sentence was masked.

    Raises:
        ValueError: neither a number of iterations nor a threshold.
    """
    threshold, iterations = settings.threshold, settings.iterations
    if threshold is None and iterations is None:
        raise ValueError("mask-predict needs a number of iterations, or a threshold")
    rows = TargetRows(length_BC, settings, given_RL)
    for step in count():
        if not rows.fill(decoder) or step == iterations:
            break  # With nothing masked now, nothing is masked later.
        if threshold is not None:
            rows.mask_unsure(threshold)
        elif iterations is not None:
            rows.mask_again(remask_counts(rows.inner_R, step, iterations + 1))
    return rows.result()


@dataclass(frozen=True)
class Asked:
    """What one pass computes and predicts."""

    number_X: Tensor
    """Rows that are computed, on the host."""
    row_X: Tensor
    """The same on the device."""
    width: int
    """Tokens of the longest of them."""
    picked_P: Tensor
    """Flat indices x * width + l of what is predicted, ascending."""
    most: int
    """Largest number of them in a row."""

    @property
    def place_P(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of what is predicted."""
        return self.row_X[self.picked_P // self.width], self.picked_P % self.width


class TargetRows:
    """Tokens and their log-probabilities during one search over length candidates.

    A pass waits for the device once, for what is masked; which rows it computes is worked out on the host.
    """

    def __init__(
        self, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None = None
    ) -> None:
        self.settings = settings
        self.infills = given_RL is not None
        self.candidates = length_BC.shape[1]
        self.length_R = length_R = length_BC.flatten()
        self._host_length_R = length_R.cpu()
        column_L = torch.arange(int(self._host_length_R.max()), device=length_R.device)
        last_R1 = length_R[:, None] - 1
        if given_RL is None:
            given_RL = torch.full((len(length_R), len(column_L)), settings.pad, device=length_R.device)
            given_RL[:, 0] = settings.bos
            given_RL = given_RL.masked_fill(column_L == last_R1, settings.eos)
            given_RL = given_RL.masked_fill((column_L > 0) & (column_L < last_R1), ANY_TOKEN)
        self._wanted_RL = given_RL
        self.inner_RL = given_RL < 0
        """Places that tokens are wanted for: all inner ones, but for given ones."""
        self.inner_R = self.inner_RL.sum(1)
        self.token_RL = given_RL.masked_fill(self.inner_RL, settings.mask)
        self.score_RL = torch.zeros(self.inner_RL.shape, device=length_R.device)
        self.given_RL = torch.full_like(self.token_RL, -1)
        """What each row's last pass was given, and below what came out."""
        self.filled_RL = self.token_RL
        # What is settled by a threshold must not look masked.
        forbidden = (*settings.forbidden, *(() if settings.threshold is None else (settings.mask,)))
        self._forbidden = torch.tensor(forbidden, dtype=torch.long, device=length_R.device)
        self.held_B = torch.arange(len(length_BC))
        """Sentences that the decoder still holds, on the host."""
        self.passes_B = torch.zeros_like(self.held_B)

    def fill(self, decoder: NarDecoder) -> bool:
        """One pass: every masked position takes its likeliest token. False if nothing is masked."""
        # `released` forbids nothing, so that a predicted MASK stays masked for the next pass.
        masked_RL = (self.token_RL == self.settings.mask) & self.inner_RL
        again_R1 = (self.token_RL == self.given_RL).all(1, keepdim=True)
        open_RL, same_R1 = torch.cat([masked_RL, again_R1], 1).cpu().tensor_split([masked_RL.shape[1]], 1)
        asked = self.ask(decoder, open_RL, open_RL & ~same_R1)
        self.given_RL = self.token_RL
        # A finished row comes out as it was, too.
        self.token_RL = torch.where(again_R1, self.filled_RL, self.token_RL)
        if asked is not None:
            given = self.given_RL[asked.row_X, : asked.width], self.length_R[asked.row_X]
            hidden_PD = decoder.hidden(*given, asked.picked_P, asked.most)
            self.put(asked, *self.predict(decoder, hidden_PD, asked))
        self.filled_RL = self.token_RL
        return bool(open_RL.any())

    def ask(self, decoder: NarDecoder, open_RL: Tensor, wanted_RL: Tensor) -> Asked | None:
        """Count a pass, and say what it computes; None: nothing.

        Rows are equally many of each sentence that the decoder holds, in order. Sentences with no open row
        are given up, once they are many enough to be worth it.
        """
        open_B = open_RL.any(1).view(-1, self.candidates).any(1)
        self.passes_B += open_B
        open_B = open_B[self.held_B]
        finished = len(open_B) - int(open_B.sum())
        if finished and finished < len(open_B) and _FINISHED_SHARE * finished >= len(open_B):
            decoder.keep(open_B.nonzero().squeeze(1).to(self.length_R.device))
            self.held_B = self.held_B[open_B]
        wanted_HC = wanted_RL.any(1).view(-1, self.candidates)[self.held_B]
        rows = int(wanted_HC.sum(1).max())
        if not rows:
            return None
        # Wanted rows first, then others to make the block rectangular; all in their order.
        chosen_HX = wanted_HC.float().sort(dim=1, descending=True, stable=True).indices[:, :rows]
        chosen_HX = chosen_HX.sort(dim=1).values
        number_X = (self.held_B[:, None] * self.candidates + chosen_HX).flatten()
        width = int(self._host_length_R[number_X].max())
        picked_XL = wanted_RL[number_X, :width]
        indices = torch.cat([number_X, picked_XL.flatten().nonzero().squeeze(1)]).to(self.length_R.device)
        row_X, picked_P = indices.tensor_split([len(number_X)])
        return Asked(number_X, row_X, width, picked_P, int(picked_XL.sum(1).max()))

    def put(self, asked: Asked, token_P: Tensor, score_P: Tensor) -> None:
        """Note what was predicted."""
        self.token_RL = self.token_RL.index_put(asked.place_P, token_P)
        self.score_RL = self.score_RL.to(score_P.dtype).index_put(asked.place_P, score_P)
        if watch := current_watch():
            with watch.busy():
                watch.show(self._as_pass(asked))

    def _as_pass(self, asked: Asked) -> Pass:
        """The best candidate of the first sentence, for who watches."""
        best = int(self._mean_R()[: self.candidates].argmax())
        inner = slice(1, int(self._host_length_R[best]) - 1)
        row_P, column_P = asked.place_P
        new = tuple((column_P[row_P == best] - 1).tolist())
        return Pass(
            tuple(self.token_RL[best, inner].tolist()), tuple(self.score_RL[best, inner].exp().tolist()), new
        )

    def predict(self, decoder: NarDecoder, hidden_PD: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """The token of each hidden row, here the likeliest, and its log-probability."""
        parts = []
        for start in range(0, len(hidden_PD), _CHUNK_ROWS):
            logits_XV = decoder.logits(hidden_PD[start : start + _CHUNK_ROWS])
            allowed_XV = self.allowed(logits_XV, asked, start)
            best_X, token_X = allowed_XV.index_fill(1, self._forbidden, -math.inf).max(dim=1)
            parts.append((token_X, best_X - logits_XV.logsumexp(dim=1)))
        token_P, score_P = (torch.cat(part) for part in zip(*parts, strict=True))
        return token_P, score_P

    def allowed(self, logits_XV: Tensor, asked: Asked, start: int = 0) -> Tensor:
        """The logits, from position `start` on; -inf where the text before a blank rules a token out."""
        begins_V = self.settings.begins_word_V
        if begins_V is None or not self.infills:
            return logits_XV
        return ruled(logits_XV, self._wanted_RL[asked.place_P][start : start + len(logits_XV)], begins_V)

    def mask_unsure(self, threshold: float) -> None:
        """Mask what the last pass predicted, but for each row's likeliest token and all above `threshold`."""
        predicted_RL = (self.given_RL == self.settings.mask) & self.inner_RL
        settled_RL = self.score_RL > math.log(threshold)
        score_RL = self.score_RL.masked_fill(~predicted_RL, -math.inf)
        order_RL = score_RL.sort(dim=1, descending=True, stable=True).indices
        settled_RL = settled_RL.scatter(1, order_RL[:, :1], True)
        self.token_RL = self.token_RL.masked_fill(predicted_RL & ~settled_RL, self.settings.mask)

    def mask_again(self, count_R: Tensor) -> None:
        """Mask the `count_R` least certain inner tokens of each row."""
        score_RL = self.score_RL.masked_fill(~self.inner_RL, float("inf"))
        order_RL = score_RL.sort(dim=1, stable=True).indices
        column_L = torch.arange(order_RL.shape[1], device=order_RL.device)
        first_RL = column_L < count_R[:, None]
        again_RL = torch.zeros_like(first_RL).scatter(1, order_RL, first_RL)
        self.token_RL = self.token_RL.masked_fill(again_RL, self.settings.mask)

    def _mean_R(self) -> Tensor:
        released = self.settings.score == "released"
        return self.score_RL.sum(dim=1) / (self.length_R if released else self.inner_R).clamp(min=1)

    def result(self) -> list[list[Hypothesis]]:
        """The rows as candidates of their sentences, best first, without what only fills up a sentence."""
        passes_R = self.passes_B.repeat_interleave(self.candidates)
        items = (self.token_RL, self.length_R, self._mean_R(), passes_R, self.inner_RL)
        rows = zip(*(item.tolist() for item in items), strict=True)
        found = [
            Hypothesis(
                tuple(tokens[1 : length - 1]),
                score,
                passes,
                filled=tuple(place - 1 for place, inner in enumerate(wanted) if inner and self.infills),
            )
            for tokens, length, score, passes, wanted in rows
        ]
        groups = [found[i : i + self.candidates] for i in range(0, len(found), self.candidates)]
        groups = [[item for item in group if item.filled or not self.infills] for group in groups]
        return [sorted(group, key=lambda item: -item.score) for group in groups]
