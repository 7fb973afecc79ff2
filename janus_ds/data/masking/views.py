"""What the model is given of a sample: the source, the target, and which target tokens are masked.

Pretraining (task denoise) makes the source by noising the target; translation (task pair) has it given.
Views depend on (run seed, epoch, sample id) and nothing else; the laws stand in `span_laws`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.batch import Ragged, SpecialTokens
from janus_ds.config.schema import MaskingConfig
from janus_ds.data.masking.counter_rng import SampleKeys, Stream
from janus_ds.data.masking.span_laws import MaskDraw, draw_noise, draw_target

Values = NDArray[Any]


@dataclass(frozen=True)
class Views:
    """Both sides of a batch, with bos and eos, int32."""

    source: Ragged
    target: Ragged
    masked: NDArray[np.bool_]
    """Which tokens NAR and AUX predict, aligned with `target.values`; never bos or eos."""
    order: NDArray[np.uint64] | None = None
    """AUX predicts the masked tokens of a sample in ascending order of these, aligned with `target.values`;
    None: left to right."""

    def slice(self, start: int, stop: int) -> Views:
        """Samples start .. stop - 1."""
        return self._each(lambda rows: rows.slice(start, stop))

    def take(self, places: NDArray[np.int64]) -> Views:
        """The samples at these places, in this order."""
        return self._each(lambda rows: rows.take(places))

    def _each(self, pick: Callable[[Ragged], Ragged]) -> Views:
        masked, order = (
            None if values is None else pick(Ragged(values, self.target.offsets)).values
            for values in (self.masked, self.order)
        )
        return Views(pick(self.source), pick(self.target), masked, order)  # type: ignore[arg-type]


def make_views(
    masking: MaskingConfig,
    special: SpecialTokens,
    keys: SampleKeys,
    samples: dict[str, Ragged],
    most_source: int | None = None,
) -> Views:
    """Source, target and mask of a batch of samples.

    Args:
        masking: resolved and checked (`config.presets.resolve`, `config.rules`).
        keys: of the B samples; the epoch says how many times each has been seen before.
        samples: "target" and, for pairs, "source": tokens without bos and eos.
        most_source: tokens that the noise may make of a sample; None: as many as it likes.
    """
    inner = samples["target"]
    if "source" in samples:
        source = samples["source"]
        masked_N = draw_target(masking, keys, inner.lengths)
    else:
        draw = draw_noise(masking, keys, inner.lengths)
        masked_N = draw.masked_N
        source = _rotated(_noised(inner, draw, special.mask, most_source), masking.rotate_share or 0.0, keys)
    target = _with_ends(inner, special)
    masked = np.zeros(len(target.values), dtype=bool)
    masked[_inner_places(target)] = masked_N
    order = None
    if masking.aux_order == "random":
        columns = int(inner.lengths.max(initial=0))
        drawn_BL = keys.bits(Stream.AUX_ORDER, columns)
        order = np.zeros(len(target.values), dtype=np.uint64)
        order[_inner_places(target)] = drawn_BL[np.arange(columns) < inner.lengths[:, None]]
    return Views(_with_ends(source, special), target, masked, order)


def _inner_places(rows: Ragged) -> NDArray[np.bool_]:
    """True for all but the first and the last token of each row."""
    inner = np.ones(len(rows.values), dtype=bool)
    inner[rows.offsets[:-1]] = False
    inner[rows.offsets[1:] - 1] = False
    return inner


def _with_ends(rows: Ragged, special: SpecialTokens) -> Ragged:
    """The rows with bos before and eos behind them, as int32."""
    offsets = rows.offsets + 2 * np.arange(len(rows.offsets))
    result = Ragged(np.empty(offsets[-1], dtype=np.int32), offsets)
    result.values[_inner_places(result)] = rows.values
    result.values[offsets[:-1]] = special.bos
    result.values[offsets[1:] - 1] = special.eos
    return result


def _noised(rows: Ragged, draw: MaskDraw, mask_id: int, most: int | None) -> Ragged:
    """Text infilling: each hidden span becomes one mask, and inserted masks stand before their token, as
    many of a row as it has room for."""
    shown_N, inserted_N = ~draw.hidden_N, draw.inserted_N
    kept_N = shown_N | draw.opens_N
    last_N = np.cumsum(inserted_N + kept_N)
    offsets = np.append(0, last_N)[rows.offsets]
    if most is not None and np.diff(offsets).max(initial=0) > most:
        inside_N, kept_B = (np.append(0, np.cumsum(x))[rows.offsets] for x in (inserted_N, kept_N))
        upto_N = np.cumsum(inserted_N) - np.repeat(inside_N[:-1], rows.lengths)
        room_N = np.repeat(np.maximum(most - np.diff(kept_B), 0), rows.lengths)
        fits_N = np.minimum(upto_N, room_N) - np.minimum(upto_N - inserted_N, room_N)
        return _noised(rows, replace(draw, inserted_N=fits_N), mask_id, None)
    values: Values = np.full(offsets[-1], mask_id, dtype=np.int32)
    values[last_N[shown_N] - 1] = rows.values[shown_N]
    return Ragged(values, offsets)


def _rotated(rows: Ragged, share: float, keys: SampleKeys) -> Ragged:
    """The rows, a share of them turned so that they begin at another of their tokens (BART's rotation)."""
    if share == 0.0:
        return rows
    uniform_B2 = keys.uniforms(Stream.ROTATION, 2)
    lengths = rows.lengths
    turn_B = np.floor(uniform_B2[:, 1] * (lengths - 1)).astype(np.int64) + 1
    turn_B = np.where((uniform_B2[:, 0] < share) & (lengths > 1), turn_B, 0)
    start, turn, length = (np.repeat(x, lengths) for x in (rows.offsets[:-1], turn_B, lengths))
    inside = np.arange(len(rows.values)) - start + turn
    return Ragged(rows.values[start + np.where(inside >= length, inside - length, inside)], rows.offsets)
