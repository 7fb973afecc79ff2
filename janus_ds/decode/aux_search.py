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

Shape letters: B sentences, C length candidates, R = B * C rows, X rows of a pass, L longest row, P positions
predicted in a pass, D width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from janus_ds.decode.hypothesis import ScoredTokens
from janus_ds.decode.mask_predict import MaskPredictSettings, RowDecoder, TargetRows


class JudgedRows(RowDecoder, Protocol):
    """What AUX search asks of a model; its first call is `hidden`, for all rows and all that is masked."""

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


def aux_search(
    decoder: JudgedRows, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None = None
) -> list[list[ScoredTokens]]:
    """Write all rows as AUX does, left to right.

    Args:
        decoder: the model on its encoded sources.
        length_BC: candidate lengths, bos and eos included; at least 3.
        settings: forbids all special symbols, MASK among them; score "paper".
        given_RL: as for :func:`janus_ds.decode.mask_predict.mask_predict`.

    Returns:
        For each sentence its C candidates, without bos and eos, that of the best mean log-probability first;
        `passes` counts the passes in which anything of the sentence was open.
    """
    rows = _AuxRows(length_BC, settings, given_RL)
    rows.fill(decoder)
    while rows.judge(decoder):
        pass
    return rows.result()


class _AuxRows(TargetRows):
    """Rows of which the first wanted tokens are settled and the others a draft."""

    def __init__(self, length_BC: Tensor, settings: MaskPredictSettings, given_RL: Tensor | None) -> None:
        super().__init__(length_BC, settings, given_RL)
        self.rank_RL = self.inner_RL.cumsum(1)
        """Wanted tokens up to each place."""
        self.settled_R = torch.ones_like(self.length_R)
        """Wanted tokens that are settled, once the NAR pass has been made."""

    def judge(self, decoder: JudgedRows) -> bool:
        """One pass over all drafts; False if all is settled already."""
        open_RL = (self.inner_RL & (self.rank_RL > self.settled_R[:, None])).cpu()
        asked = self.ask(decoder, open_RL, open_RL)
        if asked is None:
            return False
        row_X, before_RL = asked.row_X, self.token_RL
        given = asked.number_X, before_RL[row_X, : asked.width], self.settled_R[row_X]
        hidden_PD = decoder.judged(*given, asked.picked_P, asked.most)
        self.put(asked, *self.predict(decoder, hidden_PD))
        # What AUX wrote itself before the first difference, and its token there.
        same_RL = (self.token_RL == before_RL).long().cumprod(1)
        self.settled_R = torch.minimum((same_RL * self.inner_RL).sum(1) + 1, self.inner_R)
        return True
