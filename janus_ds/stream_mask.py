"""Attention visibility rules of the two-stream decoder: one predicate on (segment, rank).

The decoder works on six segments of rows for each sample (paper, section 3.1 and Figure 2):

======  ==============================  =========================  ==============================
name    rows                            rank of a row              token, position
======  ==============================  =========================  ==============================
ARC     AR content                      0 .. A-1                   the tokens fed to AR
VIS     NAR content, not masked         0 .. V-1 (target order)    target tokens that are shown
CMP     compensation                    0 .. M-1 (AUX order)       the M gold tokens
MSK     NAR content, masked             0 .. M-1                   MASK
ARQ     AR query                        0 .. A-1                   MASK, one a predicted token
QRY     AUX query                       0 .. M-1                   MASK
======  ==============================  =========================  ==============================

The AUX order is the target order, unless `masking.aux_order` is random; CMP, MSK and QRY share it.
VIS and MSK together are the paper's "original part". Keys and values come from content rows
(ARC, VIS, CMP, MSK) only. The rule is four comparisons on two integers a row, so neither a loop
over samples nor a three-dimensional matrix is needed (the paper's section on limitations names
that matrix as its cost).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Segment(IntEnum):
    """Row segments in the order in which rows are laid out."""

    ARC = 0
    VIS = 1
    CMP = 2
    MSK = 3
    ARQ = 4
    QRY = 5


# Plain numbers: torch.compile takes a tensor for unequal to an IntEnum, whatever its values.
_ARC, _VIS, _CMP, _MSK, _ARQ, _QRY = (segment.value for segment in Segment)

CONTENT_SEGMENTS = (Segment.ARC, Segment.VIS, Segment.CMP, Segment.MSK)


def visible(query_segment: Any, query_rank: Any, key_segment: Any, key_rank: Any) -> Any:
    """Whether a query row may attend to a content row, padding aside.

    ARC and ARQ row i: ARC 0 .. i; ARQ row i predicts the token after that of ARC row i. VIS and MSK: each
    other. CMP row i: VIS, MASK j for j > i, gold j for j <= i. QRY row i: VIS, MASK j for j >= i, gold j
    for j < i. Works on integers, numpy arrays and tensors alike, with broadcasting.

    In training it is applied by `RowLayout.visible`; in AUX decoding by `model.decoding.steps.AuxRows`.

    Returns:
        boolean, of the broadcast shape.
    """
    q, k = query_segment, key_segment
    ar = ((q == _ARC) | (q == _ARQ)) & (k == _ARC) & (key_rank <= query_rank)
    original_key = (k == _VIS) | (k == _MSK)
    original = ((q == _VIS) | (q == _MSK)) & original_key
    compensation = (q == _CMP) & (
        (k == _VIS) | ((k == _MSK) & (key_rank > query_rank)) | ((k == _CMP) & (key_rank <= query_rank))
    )
    auxiliary = (q == _QRY) & (
        (k == _VIS) | ((k == _MSK) & (key_rank >= query_rank)) | ((k == _CMP) & (key_rank < query_rank))
    )
    return ar | original | compensation | auxiliary
