"""From views to a :class:`TwoStreamBatch`: the rows of all streams, laid out for one pass.

Legend: B samples, L target tokens with bos and eos, N all target tokens of the batch, A AR rows, V visible
rows, M masked slots, R all rows. Everything is done for the whole batch in numpy; torch comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from janus_ds.batch import BatchCounts, RowLayout, SpecialTokens, TwoStreamBatch
from janus_ds.config.schema import STREAMS, ObjectiveConfig
from janus_ds.data.masking.views import Views
from janus_ds.stream_mask import Segment

Array = NDArray[Any]


@dataclass(frozen=True)
class RowKinds:
    """Which rows an objective needs."""

    ar: bool
    """AR content rows."""
    ar_query: bool
    """AR query rows beside them (two-stream AR)."""
    nar: bool
    """The original part: visible and MASK rows."""
    aux: bool
    """Compensation and AUX query rows."""

    @classmethod
    def of(cls, objective: ObjectiveConfig) -> RowKinds:
        """Rows of the streams that are trained; AUX rows stand in for some MASK rows, which they need."""
        ar, nar, aux = (name in objective.streams for name in STREAMS)
        return cls(ar, ar and objective.ar_stream != "content", nar or aux, aux)


@dataclass(frozen=True)
class _Masked:
    """The target tokens split into masked ones (in AUX order) and visible ones; flat, sample by sample."""

    token_T: Array
    position_T: Array
    length_B: Array
    shown_token_N: Array
    shown_position_N: Array
    shown_length_B: Array


class Collator:
    """Builds batches for one objective.

    Args:
        objective: resolved (`config.presets.resolve`).
        pad_multiple: segment widths and the source are padded to a multiple of this.
        max_source_positions: the padded source is never wider than this (None: no bound).
    """

    def __init__(
        self,
        special: SpecialTokens,
        objective: ObjectiveConfig,
        length_classes: int,
        pad_multiple: int,
        max_source_positions: int | None = None,
    ) -> None:
        self.kinds = RowKinds.of(objective)
        self._draws = objective.dropout_draws
        self._special = special
        self._mask_id = special.unk if objective.mask_symbol == "unk" else special.mask
        self._starts_with_eos = objective.decoder_start == "eos_bos"
        # Under `previous` (released translation code) a query stands where its content row stands.
        ahead = not self._starts_with_eos and objective.ar_query_position != "previous"
        self._query_shift = int(ahead)
        self._length_with_specials = objective.length_convention == "with_specials"
        self._length_classes = length_classes
        self._multiple = pad_multiple
        self._max_source = max_source_positions

    def __call__(self, views: Views, ids: ArrayLike) -> TwoStreamBatch:
        """One micro-batch of the given samples.

        Where the objective compares two dropout draws, the batch holds all samples twice, one time after the
        other: the counts are those of all copies, so that sums over them become means.

        Args:
            views: of B samples, each with at least one inner target token.
            ids: int64, shape (B,): sample numbers.
        """
        id_B = np.asarray(ids, dtype=np.int64)
        if self._draws > 1:
            views, id_B = views.take(np.tile(np.arange(len(id_B)), self._draws)), np.tile(id_B, self._draws)
        size = len(id_B)
        length_B = views.target.lengths
        masked = self._split(views) if self.kinds.nar else _nothing_masked(size)
        ar_length_B = self.kinds.ar * (length_B - self._ar_row_shift)
        layout = self._layout(ar_length_B, masked)
        rows = _Rows(size, layout, self._special.pad)
        fields = {"ar_target_BA": self._fill_ar(rows, views, ar_length_B)}
        fields["masked_target_BM"] = self._fill_masked(rows, masked)
        fields |= self._pairing(masked, ar_length_B, layout)
        source_BS, source_length_B = self._source(views)
        arrays = {
            "sample_id_B": id_B,
            "source_BS": source_BS,
            "source_length_B": source_length_B,
            "row_token_BR": rows.token,
            "row_position_BR": rows.position,
            "ar_length_B": ar_length_B,
            "visible_length_B": masked.shown_length_B,
            "masked_length_B": masked.length_B,
            "length_target_B": self._length_targets(length_B),
            **fields,
        }
        counts = BatchCounts(
            samples=size,
            source_tokens=len(views.source.values),
            target_tokens=len(views.target.values),
            ar_tokens=int(ar_length_B.sum()),
            masked_tokens=len(masked.token_T),
        )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return TwoStreamBatch(layout=layout, counts=counts, draws=self._draws, **tensors)

    def _length_targets(self, length_B: Array) -> Array:
        wanted_B = length_B if self._length_with_specials else length_B - 2
        return np.minimum(wanted_B, self._length_classes - 1)

    def _width(self, length_B: Array) -> int:
        return -(-int(length_B.max(initial=0)) // self._multiple) * self._multiple

    def _layout(self, ar_length_B: Array, masked: _Masked) -> RowLayout:
        slots, ar_rows = self._width(masked.length_B), self._width(ar_length_B)
        return RowLayout(
            arc=ar_rows,
            vis=self._width(masked.shown_length_B),
            cmp=slots if self.kinds.aux else 0,
            msk=slots,
            arq=ar_rows if self.kinds.ar_query else 0,
            qry=slots if self.kinds.aux else 0,
        )

    def _split(self, views: Views) -> _Masked:
        target = views.target
        position_N = np.arange(len(target.values)) - np.repeat(target.offsets[:-1], target.lengths)
        masked_T, shown_N = np.flatnonzero(views.masked), np.flatnonzero(~views.masked)
        length_B = np.diff(np.searchsorted(masked_T, target.offsets))
        if views.order is not None:
            sample_T = np.repeat(np.arange(len(length_B)), length_B)
            masked_T = masked_T[np.lexsort((views.order[masked_T], sample_T))]
        return _Masked(
            token_T=target.values[masked_T],
            position_T=position_N[masked_T],
            length_B=length_B,
            shown_token_N=target.values[shown_N],
            shown_position_N=position_N[shown_N],
            shown_length_B=target.lengths - length_B,
        )

    def _fill_ar(self, rows: _Rows, views: Views, ar_length_B: Array) -> Array:
        """Fill content and query rows; the tokens that they predict, (B, A)."""
        position_A = np.arange(rows.layout.arc)
        valid_BA = position_A < ar_length_B[:, None]
        target_BA: Array = np.full(valid_BA.shape, self._special.pad)
        if not self.kinds.ar:
            return target_BA
        values, first = views.target.values, views.target.offsets[:-1]
        content_N = np.concatenate([values[:1], values[:-1]])
        content_N[first] = self._special.eos
        if self._starts_with_eos:
            predicted_N = values
        else:
            # Without the leading eos the first token is content only.
            after_first_N = np.ones(len(values), dtype=bool)
            after_first_N[first] = False
            content_N, predicted_N = content_N[after_first_N], values[after_first_N]
        target_BA[valid_BA] = predicted_N
        rows.columns(rows.token, Segment.ARC)[valid_BA] = content_N
        np.multiply(position_A, valid_BA, out=rows.columns(rows.position, Segment.ARC))
        if self.kinds.ar_query:
            rows.columns(rows.token, Segment.ARQ)[valid_BA] = self._mask_id
            position_BQ = rows.columns(rows.position, Segment.ARQ)
            np.multiply(position_A + self._query_shift, valid_BA, out=position_BQ)
        return target_BA

    def _fill_masked(self, rows: _Rows, masked: _Masked) -> Array:
        """Fill visible, masked, compensation and AUX rows; the gold token of each masked slot, (B, M)."""
        layout = rows.layout
        shown_BV = np.arange(layout.vis) < masked.shown_length_B[:, None]
        rows.columns(rows.token, Segment.VIS)[shown_BV] = masked.shown_token_N
        rows.columns(rows.position, Segment.VIS)[shown_BV] = masked.shown_position_N
        valid_BM = np.arange(layout.msk) < masked.length_B[:, None]
        gold_BM: Array = np.full(valid_BM.shape, self._special.pad)
        gold_BM[valid_BM] = masked.token_T
        position_BM = np.zeros(valid_BM.shape, dtype=np.int64)
        position_BM[valid_BM] = masked.position_T
        rows.columns(rows.token, Segment.MSK)[valid_BM] = self._mask_id
        rows.columns(rows.position, Segment.MSK)[:] = position_BM
        if self.kinds.aux:
            cmp_token, qry_token = (rows.columns(rows.token, s) for s in (Segment.CMP, Segment.QRY))
            cmp_token[:] = gold_BM
            qry_token[valid_BM] = self._mask_id
            for segment in (Segment.CMP, Segment.QRY):
                rows.columns(rows.position, segment)[:] = position_BM
        return gold_BM

    @property
    def _ar_row_shift(self) -> int:
        """AR row p - shift predicts target token p."""
        return 0 if self._starts_with_eos else 1

    def _pairing(self, masked: _Masked, ar_length_B: Array, layout: RowLayout) -> dict[str, Array]:
        """Flat indices that pair AR predictions with masked slots."""
        size, width = len(masked.length_B), layout.arc
        nothing = np.zeros(0, dtype=np.int64)
        valid_BM = np.arange(layout.msk) < masked.length_B[:, None]
        valid_BA = np.arange(width) < ar_length_B[:, None]
        result = {"ar_unmasked_U": nothing, "ar_masked_T": nothing, "masked_T": np.flatnonzero(valid_BM)}
        if not self.kinds.ar:
            return result
        if not self.kinds.nar:
            return result | {"ar_unmasked_U": np.flatnonzero(valid_BA)}
        start_T = np.repeat(np.arange(size) * width, masked.length_B)
        ar_masked_T = start_T + masked.position_T - self._ar_row_shift
        valid_BA.reshape(-1)[ar_masked_T] = False
        return result | {"ar_unmasked_U": np.flatnonzero(valid_BA), "ar_masked_T": ar_masked_T}

    def _source(self, views: Views) -> tuple[Array, Array]:
        length_B = views.source.lengths
        longest = int(length_B.max(initial=0))
        width = max(longest, min(self._width(length_B), self._max_source or self._width(length_B)))
        source_BS = np.full((len(length_B), width), self._special.pad)
        source_BS[np.arange(width) < length_B[:, None]] = views.source.values
        return source_BS, length_B


class _Rows:
    """Token and position of all rows, in the shape of the layout; padding is pad at position 0."""

    def __init__(self, size: int, layout: RowLayout, pad: int) -> None:
        self.layout = layout
        shape = (size, layout.rows)
        self.token = np.full(shape, pad)
        self.position = np.zeros(shape, dtype=np.int64)

    def columns(self, array: Array, segment: Segment) -> Array:
        """A view of one segment of one of the arrays, (B, width)."""
        return array[:, self.layout.columns(segment)]


def _nothing_masked(size: int) -> _Masked:
    nothing, zero_B = np.zeros(0, dtype=np.int64), np.zeros(size, dtype=np.int64)
    return _Masked(nothing, nothing, zero_B, nothing, nothing, zero_B)
