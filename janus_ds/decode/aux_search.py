"""AUX search: NAR drafts a target, AUX judges all of it in one pass, and its own choices are the next draft.

AUX predicts each token from the source, MASK at every place, and the tokens before it (section 3.1 of the
paper, with all of the target masked). Its first row equals the NAR row of the first token, so the NAR pass
settles that token. Each further pass gives the settled tokens and the draft as compensation rows: AUX row j
then sees tokens 0 .. j - 1. The longest beginning of the draft that AUX would have written itself stands,
AUX's token takes the first other place, and its further choices become the next draft. Every pass settles a
token of each open candidate, and mostly several.

The output is that of AUX decoded one token a pass: whatever is settled was chosen by an AUX row that saw
nothing but settled tokens. For this the original part stays as it was to the end; a settled token that moved
into it would change what all other rows see. So its keys and values are those of the NAR pass, and those of
settled tokens stand as well: a pass computes the rows of open slots alone, two for each.

Slots are settled from left to right, or, by a model that was trained for any order, as NAR is sure of them.
Samples are exact in both: they have the distribution of AUX that draws one token a pass. A drafted token
that was drawn from q stands with probability min(1, p / q), where p is AUX's distribution; the first that
does not is drawn from (p - q)+, normalised, and the next draft from AUX's rows (speculative sampling:
Leviathan et al., Chen et al., 2023). Lengths are not drawn.

Shape letters: B sentences, C length candidates, R = B * C rows, X rows of a pass, L longest row, P positions
predicted in a pass, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from janus_ds.decode.mask_predict import Asked, MaskPredictSettings, NarDecoder, TargetRows
from janus_ds.decode.sample import Draws, draw_rows, left_over, stands, token_shares
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.model.attention import KeysValues
from janus_ds.model.decoding.cache import EncoderOutput
from janus_ds.model.decoding.steps import AuxPool
from janus_ds.model.janus import JanusModel


class AuxDecoder(NarDecoder):
    """The passes of AUX search: its first call is `hidden`, for all rows and all that is masked."""

    def __init__(self, model: JanusModel, memory: EncoderOutput, mask: int) -> None:
        super().__init__(model, memory)
        self._mask = mask
        self._pool: AuxPool | None = None
        self._number_X = torch.empty(0)
        """Rows of the pool, by their number in the first call."""

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor, most: int) -> Tensor:
        """See :meth:`NarDecoder.hidden`; keeps what later passes need."""
        kept: list[KeysValues] = []
        hidden_PD = self._nar_rows(token_RL, length_R, (picked_P, most), kept)
        slot_R = torch.zeros(token_RL.numel(), dtype=torch.bool, device=token_RL.device)
        slot_RL = slot_R.index_fill(0, picked_P, True).view(token_RL.shape)
        self._pool = AuxPool.build(kept, slot_RL, length_R, most)
        self._number_X = torch.arange(len(length_R))
        return hidden_PD

    def judged(
        self, number_X: Tensor, token_XL: Tensor, settled_X: Tensor, picked_P: Tensor, most: int
    ) -> Tensor:
        """One pass of AUX rows over open slots: hidden rows at `picked_P`, shape (P, D).

        Args:
            number_X: which rows of the first call, on the host; their settled tokens have not changed.
            token_XL: settled tokens and drafts, with given ones, bos and eos.
            settled_X: slots of each row that are settled, at least 1.
            picked_P: flat indices x * L + l, ascending: of each row all slots that are open, or none.
            most: the largest number of them in a row.
        """
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
        """Settle slots in another order than left to right: slot l as the rank_RL[r, l]-th, from 0."""
        if self._pool is not None:
            self._pool = self._pool.ordered(rank_RL)


def aux_search(
    decoder: AuxDecoder,
    length_BC: Tensor,
    settings: MaskPredictSettings,
    given_RL: Tensor | None = None,
    certain_first: bool = False,
    draws: Draws | None = None,
) -> list[list[Hypothesis]]:
    """Write all rows as AUX does, token by token.

    Args:
        length_BC: candidate lengths, bos and eos included; at least 3.
        settings: forbids all special symbols, MASK among them; score "paper".
        given_RL: as for :func:`janus_ds.decode.mask_predict.mask_predict`.
        certain_first: slots are settled in the order of NAR's highest probabilities, not left to right.
        draws: each candidate is a sample; None: AUX's likeliest tokens.

    Returns:
        For each sentence its C candidates, without bos and eos, that of the best mean log-probability first;
        `passes` counts the passes in which anything of the sentence was open.
    """
    if draws is None:
        rows = _AuxRows(length_BC, settings, given_RL)
    else:
        rows = _SampledRows(length_BC, settings, given_RL, draws)
    rows.fill(decoder)
    if certain_first:
        decoder.reorder(rows.order_by_certainty())
    while rows.judge(decoder):
        pass
    return rows.result()


class _AuxRows(TargetRows):
    """Rows of which the first wanted tokens are settled and the others a draft."""

    def __init__(self, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None) -> None:
        super().__init__(length_BC, settings, given_RL)
        self.rank_RL = self.inner_RL.cumsum(1)
        """When each wanted token is settled, from 1."""
        self.settled_R = torch.ones_like(self.length_R)
        """Wanted tokens that are settled, once the NAR pass has been made."""

    def judge(self, decoder: AuxDecoder) -> bool:
        """One pass over all drafts; False if all is settled already."""
        open_RL = (self.inner_RL & (self.rank_RL > self.settled_R[:, None])).cpu()
        asked = self.ask(decoder, open_RL, open_RL)
        if asked is None:
            return False
        given = asked.number_X, self.token_RL[asked.row_X, : asked.width], self.settled_R[asked.row_X]
        hidden_PD = decoder.judged(*given, asked.picked_P, asked.most)
        token_P, score_P, first_R = self.verdict(decoder, hidden_PD, asked)
        # What AUX wrote itself before the first difference, and its token there.
        self.settled_R = torch.minimum(first_R, self.inner_R).clamp_min(1)
        self.put(asked, token_P, score_P)
        return True

    def verdict(self, decoder: AuxDecoder, hidden_PD: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and their log-probabilities, and the rank of the first that was not drafted, (R,)."""
        token_P, score_P = self.predict(decoder, hidden_PD, asked)
        return token_P, score_P, self.first(asked.place_P, token_P != self.token_RL[asked.place_P])

    def first(self, place_P: tuple[Tensor, Tensor], refused_P: Tensor) -> Tensor:
        """The lowest rank of each row's refused tokens; beyond all where none is."""
        beyond = self.rank_RL.shape[1]
        rank_P = self.rank_RL[place_P].masked_fill(~refused_P, beyond)
        return torch.full_like(self.inner_R, beyond).scatter_reduce(0, place_P[0], rank_P, "amin")

    def order_by_certainty(self) -> Tensor:
        """New ranks, by the NAR pass; from 0."""
        sure_RL = self.certainty().masked_fill(~self.inner_RL, -torch.inf)
        order_RL = sure_RL.sort(dim=1, descending=True, stable=True).indices
        column_RL = torch.arange(order_RL.shape[1], device=order_RL.device).expand_as(order_RL)
        self.rank_RL = torch.zeros_like(order_RL).scatter(1, order_RL, column_RL + 1)
        return self.rank_RL - 1

    def certainty(self) -> Tensor:
        """NAR's highest log-probability at each place, (R, L)."""
        return self.score_RL


class _SampledRows(_AuxRows):
    """Rows whose tokens are drawn."""

    def __init__(
        self, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None, draws: Draws
    ) -> None:
        super().__init__(length_BC, settings, given_RL)
        self.draws = draws
        self.sure_RL = self.score_RL
        self.share_PV = self.score_RL[:0]
        """What the tokens of the last pass were drawn from, and at which index those of each place."""
        self.index_RL = self.token_RL

    def predict(self, decoder: NarDecoder, hidden_PD: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """The NAR pass: every token is drawn by itself."""
        score_PV, share_PV = self._distributions(decoder, hidden_PD, asked)
        allowed_PV = score_PV.masked_fill(share_PV == 0, -torch.inf)
        self.sure_RL = self.sure_RL.to(score_PV.dtype).index_put(asked.place_P, allowed_PV.amax(1))
        token_P = draw_rows(share_PV, self._uniform(asked))
        return token_P, score_PV.gather(1, token_P[:, None]).squeeze(1)

    def verdict(self, decoder: AuxDecoder, hidden_PD: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
        """Drafted tokens up to the first refused one, and newly drawn ones."""
        place_P = asked.place_P
        drawn_PV, draft_P = self.share_PV[self.index_RL[place_P]], self.token_RL[place_P]
        score_PV, share_PV = self._distributions(decoder, hidden_PD, asked)
        refused_P = ~stands(share_PV, drawn_PV, draft_P, self._uniform(asked))
        first_R = self.first(place_P, refused_P)
        behind_P = self.rank_RL[place_P] - first_R[place_P[0]]
        source_PV = share_PV.where(behind_P[:, None] != 0, left_over(share_PV, drawn_PV))
        token_P = draft_P.where(behind_P < 0, draw_rows(source_PV, self._uniform(asked)))
        return token_P, score_PV.gather(1, token_P[:, None]).squeeze(1), first_R

    def certainty(self) -> Tensor:
        """NAR's highest log-probability, whatever was drawn."""
        return self.sure_RL

    def _distributions(self, decoder: NarDecoder, hidden_PD: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and what is drawn from."""
        logits_PV = decoder.logits(hidden_PD)
        allowed_PV = self.allowed(logits_PV, asked)
        self.share_PV = token_shares(allowed_PV, self.settings.forbidden, self.draws.sampling)
        index_P = torch.arange(len(logits_PV), device=logits_PV.device)
        self.index_RL = self.index_RL.index_put(asked.place_P, index_P)
        return logits_PV.double().log_softmax(1), self.share_PV

    def _uniform(self, asked: Asked) -> Tensor:
        row_P, _ = asked.place_P
        count_B = (row_P // self.candidates).bincount(minlength=len(self.passes_B))
        return self.draws.uniform(count_B.tolist()).to(row_P.device)
