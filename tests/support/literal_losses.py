"""The literal loss table of the paper's section 3 (V = 4), printed by the released code."""

from __future__ import annotations

import torch

AR = torch.tensor([[2, 0, -1, 1], [0, 1, 0, 0], [1, 1, 3, -2]], dtype=torch.float64)
"""Rows 1 and 2 are the masked tokens; the targets of all are 0, 1, 2."""
NAR = torch.tensor([[0.5, 0.2, -0.3, 0], [0, 0, 2, 1]], dtype=torch.float64)
AUX = torch.tensor([[1, 0, 0, 0], [0, -1, 1, 0]], dtype=torch.float64)
MASKED_TARGET = torch.tensor([1, 2])
LENGTH = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 0]], dtype=torch.float64)
LENGTH_TARGET = torch.tensor([2, 0])
PRINTED = {
    "ar": 0.6262305,
    "ar_nll": 0.4762305,
    "nar": 0.978622,
    "nar_nll": 0.911122,
    "aux": 1.222596,
    "aux_nll": 1.185096,
    "kl_ar_nar": 0.285238,
    "kl_nar_aux": 0.048796,
    "kl_ar_aux": 0.364249,
    "length": 0.618740,
}
"""Means over each term's own count, smoothing 0.1."""
RELEASED_TRANSLATION = 3.215492
"""Total of the released translation weights."""
RELEASED_PRETRAINING = 3.223608
"""0.5 (sums of NLL) + 0.5 (sums of K(NAR, AUX) and K(AR, AUX))."""
