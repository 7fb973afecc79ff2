"""Which tokens are masked: the laws of `MaskingConfig.target`, drawn for a whole batch at once.

Legend: B samples, K spans, N all inner tokens of the batch (without bos and eos), one sample after the
other. Every number is drawn by (run seed, epoch, sample id), so a sample's mask does not depend on the
samples beside it.

infilling           paper, section 3.3: spans hidden from the encoder, then further ones for the decoder
span_union          paper, translation: spans until their union reaches the share of the inner tokens
span_overlap        released translation code: overlapping spans until their lengths sum to ceil(.7 L)
infilling_released  released pretraining code: as span_overlap, a coin hides each span from the encoder
uniform             CMLM: a uniformly drawn number of tokens, at least one
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.config.schema import MaskingConfig
from janus_ds.data.masking.counter_rng import SampleKeys, Stream

Ints = NDArray[np.int64]

Floats = NDArray[Any]

Bools = NDArray[np.bool_]

INFILLING_LAWS = ("infilling", "infilling_released")
"""Laws that noise the source along with the target."""

_RELEASED_COIN = 0.5
_OVERLAP = 0.8

_COLUMN_BITS = np.uint64(20)

_COLUMN = np.uint64(2**20 - 1)

_LAST = np.uint64(2**64 - 1)


def expected_share(masking: MaskingConfig) -> float:
    """The share of inner tokens that is masked on average, 0 to 1; used to weigh samples before the draw.

    Overlapping spans mask fewer tokens than their lengths sum to: about .56 where .7 is asked for.
    """
    if masking.target == "uniform":
        return 0.5
    share = float(masking.target_share or 0.0)
    return share * _OVERLAP if masking.target in ("span_overlap", "infilling_released") else share


@dataclass(frozen=True)
class Spans:
    """Spans of a batch, flat; `start` and `stop` count over all inner tokens, stop is exclusive."""

    start: Ints
    stop: Ints
    hidden: Bools
    """Whether the encoder is not shown the span either."""


@dataclass(frozen=True)
class MaskDraw:
    """What a law decides for each inner token; the last three fields shape the noised source."""

    masked_N: Bools
    """The decoder predicts the token."""
    hidden_N: Bools
    """The encoder does not see the token; a subset of `masked_N`."""
    opens_N: Bools
    """The token is the first hidden one of its span: the span's one <mask> stands here."""
    inserted_N: Ints
    """<mask> symbols inserted before the token (hidden spans of length zero)."""


@lru_cache(maxsize=16)
def poisson_table(mean: float, zero: bool) -> Floats:
    """The distribution function of Poisson(mean), or of Poisson(mean) given that it is not zero.

    `searchsorted(table, u, side="right")` turns a uniform number into a length.
    """
    term, probabilities = exp(-mean), []
    for length in range(int(mean + 12 * mean**0.5 + 12)):
        probabilities.append(term if zero or length else 0.0)
        term *= mean / (length + 1)
    table = np.cumsum(probabilities)
    table = np.append(table / table[-1], np.inf)
    table.setflags(write=False)
    return table


def draw_lengths(keys: SampleKeys, stream: Stream, budget_B: Ints, table: Floats) -> tuple[Ints, Bools]:
    """Span lengths of each sample, drawn until their sum reaches its budget, the last one trimmed.

    Returns:
        lengths of shape (B, K), zero where not drawn, and which were drawn. K does not change what
        is drawn.
    """
    largest = int(budget_B.max(initial=0))
    if not largest:
        nothing_BK = np.zeros((len(budget_B), 0), dtype=np.int64)
        return nothing_BK, nothing_BK.astype(bool)
    columns = int(largest * 0.6) + 6
    while True:
        length_BK = np.searchsorted(table, keys.uniforms(stream, columns), side="right")
        total_BK = np.cumsum(length_BK, axis=1)
        if (total_BK[:, -1] >= budget_B).all():
            break
        columns *= 2
    before_BK = total_BK - length_BK
    drawn_BK = before_BK < budget_B[:, None]
    kept = int(drawn_BK.sum(axis=1).max(initial=0))
    length_BK = np.minimum(length_BK, budget_B[:, None] - before_BK)[:, :kept]
    drawn_BK = drawn_BK[:, :kept]
    return np.where(drawn_BK, length_BK, 0), drawn_BK


def _budget(share: float, length_B: Ints, inner_B: Ints) -> Ints:
    """ceil(share * length), at least one token and at most all; nothing where nothing is there."""
    # The small number keeps products like .1 * 30 = 3.0000000000000004 from being rounded up.
    budget_B: Ints = np.ceil(share * length_B - 1e-9).astype(np.int64)
    return np.minimum(np.maximum(budget_B, 1), inner_B)


def _base(inner_B: Ints) -> Ints:
    """Where each sample's tokens begin among the N."""
    before_B: Ints = np.cumsum(inner_B) - inner_B
    return before_B


def _shuffled_columns(bits_BK: NDArray[np.uint64], used_BK: Bools) -> tuple[Ints, Floats]:
    """The used columns of each row in the order of their random bits, and those as uniform numbers.

    The column number rides in the low bits, so that one sort of plain integers does it; unused columns
    come last, as column 0.
    """
    columns = np.arange(bits_BK.shape[1], dtype=np.uint64)
    packed_BK = np.where(used_BK, (bits_BK & ~_COLUMN) | columns, _LAST)
    packed_BK.sort(axis=1)
    column_BK = np.where(packed_BK == _LAST, 0, packed_BK & _COLUMN).astype(np.int64)
    return column_BK, (packed_BK >> _COLUMN_BITS) * 2.0**-44


def _spans_apart(keys: SampleKeys, inner_B: Ints, hidden_B: Ints, budget_B: Ints, mean: float) -> Spans:
    """Disjoint spans: hidden ones up to `hidden_B` tokens, then further ones up to `budget_B`.

    Each span falls into a random gap between the tokens that stay, on a circle that is then cut at a
    random place; so every token is covered with the same probability, which is the share itself. A span
    across the cut becomes two. Only hidden spans can have length zero: elsewhere they mean nothing.
    """
    hidden_length_BK, hidden_drawn_BK = draw_lengths(
        keys, Stream.HIDDEN_LENGTH, hidden_B, poisson_table(mean, zero=True)
    )
    further_length_BK, further_drawn_BK = draw_lengths(
        keys, Stream.FURTHER_LENGTH, budget_B - hidden_B, poisson_table(mean, zero=False)
    )
    split = hidden_length_BK.shape[1]
    length_BK = np.concatenate([hidden_length_BK, further_length_BK], axis=1)
    drawn_BK = np.concatenate([hidden_drawn_BK, further_drawn_BK], axis=1)
    place_BK = np.concatenate(
        [
            keys.bits(Stream.HIDDEN_PLACE, split),
            keys.bits(Stream.FURTHER_PLACE, further_length_BK.shape[1]),
        ],
        axis=1,
    )
    column_BK, uniform_BK = _shuffled_columns(place_BK, drawn_BK)
    valid_BK = np.arange(column_BK.shape[1]) < drawn_BK.sum(axis=1)[:, None]
    length_BK = np.where(valid_BK, np.take_along_axis(length_BK, column_BK, axis=1), 0)
    shown_B = inner_B - budget_B
    gap_BK = (uniform_BK * np.maximum(shown_B, 1)[:, None]).astype(np.int64) + 1
    start_BK = np.minimum(gap_BK, shown_B[:, None]) + np.cumsum(length_BK, axis=1) - length_BK
    cut_B = (keys.uniform(Stream.CIRCLE) * inner_B).astype(np.int64)
    start_BK = (start_BK + cut_B[:, None]) % np.maximum(inner_B, 1)[:, None]
    return _flatten(start_BK, length_BK, column_BK < split, valid_BK, inner_B)


def _flatten(start_BK: Ints, length_BK: Ints, hidden_BK: Bools, valid_BK: Bools, inner_B: Ints) -> Spans:
    """The valid spans, flat; those that run over the end of their sample go on at its start."""
    base_B = _base(inner_B)
    row = np.nonzero(valid_BK)[0]
    start, hidden = base_B[row] + start_BK[valid_BK], hidden_BK[valid_BK]
    stop, end = start + length_BK[valid_BK], base_B[row] + inner_B[row]
    over = np.flatnonzero(stop > end)
    return Spans(
        start=np.append(start, base_B[row[over]]),
        stop=np.append(np.minimum(stop, end), stop[over] - inner_B[row[over]]),
        hidden=np.append(hidden, hidden[over]),
    )


def _spans_overlapping(keys: SampleKeys, inner_B: Ints, budget_B: Ints, mean: float, coin: float) -> Spans:
    """The released law: starts without replacement, overlap allowed, length 1 for a span over the end.

    Args:
        coin: share of spans that are hidden from the encoder, each on its own.
    """
    # Spans of length zero matter only where they put a <mask> into the source.
    table = poisson_table(mean, zero=coin > 0)
    length_BK, drawn_BK = draw_lengths(keys, Stream.FURTHER_LENGTH, budget_B, table)
    rank_BK = np.broadcast_to(np.arange(length_BK.shape[1]), length_BK.shape)
    order_BN = _position_order(keys, inner_B)
    start_BK = np.take_along_axis(order_BN, rank_BK % np.maximum(inner_B, 1)[:, None], axis=1)
    length_BK = np.where(start_BK + length_BK > inner_B[:, None], 1, length_BK)
    hidden_BK = keys.uniforms(Stream.COIN, length_BK.shape[1]) < coin
    return _flatten(start_BK, length_BK, hidden_BK, drawn_BK, inner_B)


def _position_order(keys: SampleKeys, inner_B: Ints) -> Ints:
    """A permutation of each sample's positions, shape (B, longest sample)."""
    width = int(inner_B.max(initial=0))
    used_BN = np.arange(width) < inner_B[:, None]
    return _shuffled_columns(keys.bits(Stream.POSITION_ORDER, width), used_BN)[0]


def _covered(start: Ints, stop: Ints, size: int) -> Ints:
    """How many of the spans cover each of `size` tokens."""
    change = np.bincount(start, minlength=size + 1) - np.bincount(stop, minlength=size + 1)
    covered: Ints = np.cumsum(change)[:size]
    return covered


def _draw_of(spans: Spans, size: int) -> MaskDraw:
    masked_N = _covered(spans.start, spans.stop, size) > 0
    if not spans.hidden.any():
        nothing_N = np.zeros(size, dtype=bool)
        return MaskDraw(masked_N, nothing_N, nothing_N, np.zeros(size, dtype=np.int64))
    start, stop = spans.start[spans.hidden], spans.stop[spans.hidden]
    inserted_N = np.bincount(start[start == stop], minlength=size)
    start, stop = start[start < stop], stop[start < stop]
    hidden_N = _covered(start, stop, size) > 0
    # A token opens a span unless some span holds it and the token before it.
    opens_N = hidden_N & (_covered(start + 1, stop, size) == 0)
    return MaskDraw(masked_N, hidden_N, opens_N, inserted_N)


def _spans_of_law(masking: MaskingConfig, keys: SampleKeys, inner_B: Ints) -> Spans:
    share, mean = masking.target_share or 0.0, masking.poisson or 0.0
    if masking.target in ("span_overlap", "infilling_released"):
        coin = _RELEASED_COIN if masking.target == "infilling_released" else 0.0
        # The released code counts bos and eos into the length that the share is taken of.
        return _spans_overlapping(keys, inner_B, _budget(share, inner_B + 2, inner_B), mean, coin)
    hidden_B = np.zeros_like(inner_B)
    if masking.target == "infilling" and masking.source_share:
        hidden_B = _budget(masking.source_share, inner_B, inner_B)
    budget_B = np.maximum(_budget(share, inner_B, inner_B), hidden_B)
    return _spans_apart(keys, inner_B, hidden_B, budget_B, mean)


def draw_target(masking: MaskingConfig, keys: SampleKeys, inner_B: Ints) -> Bools:
    """The masked tokens by a law for targets alone; at least one in every sample that has a token.

    Args:
        masking: resolved (`config.presets.resolve`) and checked (`config.rules`).
        keys: of the B samples.
        inner_B: int64, tokens of each sample without bos and eos.

    Returns:
        boolean, shape (N,).
    """
    size = int(inner_B.sum())
    if masking.target != "uniform":
        spans = _spans_of_law(masking, keys, inner_B)
        return _covered(spans.start, spans.stop, size) > 0
    count_B = np.minimum((keys.uniform(Stream.SHARE) * inner_B).astype(np.int64) + 1, inner_B)
    order_BN = _position_order(keys, inner_B)
    chosen_BN = np.arange(order_BN.shape[1]) < count_B[:, None]
    masked_N = np.zeros(size, dtype=bool)
    masked_N[(order_BN + _base(inner_B)[:, None])[chosen_BN]] = True
    return masked_N


def draw_noise(masking: MaskingConfig, keys: SampleKeys, inner_B: Ints) -> MaskDraw:
    """The masked tokens and the noise on the source, for pretraining (paper, section 3.3).

    Under a law for targets alone, the source is noised by itself, and what the encoder does not see is
    masked in the target too. Arguments as in :func:`draw_target`.
    """
    size = int(inner_B.sum())
    if masking.target in INFILLING_LAWS:
        return _draw_of(_spans_of_law(masking, keys, inner_B), size)
    source_only = replace(masking, target="infilling", target_share=0.0)
    draw = _draw_of(_spans_of_law(source_only, keys, inner_B), size)
    return replace(draw, masked_N=draw_target(masking, keys, inner_B) | draw.hidden_N)
