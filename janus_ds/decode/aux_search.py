"""AUX search: NAR drafts a target, AUX judges all of it in one pass, and its own choices are the next draft.

AUX predicts each token from the source, MASK at every place, and the tokens before it (section 3.1 of the
paper, with all of the target masked). Its first row equals the NAR row of the first token, so the NAR pass
settles that token. Each further pass gives the settled tokens and the draft as compensation rows: AUX row j
then sees tokens 0 .. j - 1. The longest beginning of the draft that AUX would have written itself stands,
AUX's token takes the first other place, and its further choices become the next draft. Every pass settles a
token of each open candidate, and mostly several.

The output is that of AUX decoded one token a pass: whatever is settled was chosen by an AUX row that saw
nothing but settled tokens. For this the original part stays masked to the end; a settled token that moved
into it would change what all other rows see.

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
    """What AUX search asks of a model."""

    def judged(self, token_RL: Tensor, draft_RL: Tensor, length_R: Tensor, picked_P: Tensor) -> Tensor:
        """One decoder pass: hidden AUX rows at the flat indices `picked_P` = r * L + l, shape (P, D).

        Args:
            token_RL: the original part, masked where AUX predicts.
            draft_RL: the same with a token at every masked place.
            length_R: tokens of each row, bos and eos included.
            picked_P: ascending.
        """


def aux_search(
    decoder: JudgedRows, length_BC: Tensor, settings: MaskPredictSettings
) -> list[list[ScoredTokens]]:
    """Write all rows as AUX does, left to right.

    Args:
        decoder: the model on its encoded sources.
        length_BC: candidate lengths, bos and eos included; at least 3.
        settings: forbids all special symbols, MASK among them; score "paper".

    Returns:
        For each sentence its C candidates, without bos and eos, that of the best mean log-probability first;
        `passes` counts the passes in which anything of the sentence was open.
    """
    rows = _AuxRows(length_BC, settings)
    rows.fill(decoder)
    while rows.judge(decoder):
        pass
    return rows.result()


class _AuxRows(TargetRows):
    """Rows of which the first tokens are settled and the others a draft."""

    def __init__(self, length_BC: Tensor, settings: MaskPredictSettings) -> None:
        super().__init__(length_BC, settings)
        self.blank_RL = self.token_RL
        """The original part: MASK at every inner place."""
        self.settled_R = torch.ones_like(self.length_R)
        """Inner tokens that are settled, once the NAR pass has been made."""

    def judge(self, decoder: JudgedRows) -> bool:
        """One pass over all drafts; False if all is settled already."""
        column_L = torch.arange(self.token_RL.shape[1], device=self.token_RL.device)
        open_RL = self.inner_RL & (column_L > self.settled_R[:, None])
        open_R = open_RL.any(1)
        if not open_R.any():
            return False
        self.passes_B += open_R.view(-1, self.candidates).any(1)
        row_X = self.rows_to_compute(decoder, open_R, open_R)
        width = int(self.length_R[row_X].max())
        picked_P = open_RL[row_X, :width].flatten().nonzero().squeeze(1)
        blank_XL, draft_XL = self.blank_RL[row_X, :width], self.token_RL[row_X, :width]
        token_P, score_P = self.predict(
            decoder, decoder.judged(blank_XL, draft_XL, self.length_R[row_X], picked_P)
        )
        place_P = row_X[picked_P // width], picked_P % width
        token_RL = self.token_RL.index_put(place_P, token_P)
        # Columns before the first difference; with bos in column 0, as many inner tokens are settled now.
        agreed_R = (token_RL == self.token_RL).long().cumprod(1).sum(1)
        self.settled_R = torch.minimum(agreed_R, self.inner_R)
        self.token_RL = token_RL
        self.score_RL = self.score_RL.to(score_P.dtype).index_put(place_P, score_P)
        return True
