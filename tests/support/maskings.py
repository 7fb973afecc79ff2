"""The presets' masking laws, and masks and views drawn by them."""

from __future__ import annotations

import numpy as np
import pytest

from janus_ds.batch import Ragged
from janus_ds.config.schema import MaskingConfig
from janus_ds.data.masking.counter_rng import SampleKeys
from janus_ds.data.masking.span_laws import MaskDraw, draw_noise, draw_target
from janus_ds.data.masking.views import make_views
from tests.support.packed_data import SPECIAL

CONFIGS = {
    "infilling": MaskingConfig("infilling", 0.5, 0.3, 2.0, 0.0),
    "infilling_released": MaskingConfig("infilling_released", 0.3, 0.3, 3.0, 0.5),
    "span_union": MaskingConfig("span_union", 0.7, 0.0, 2.0, 0.0),
    "span_overlap": MaskingConfig("span_overlap", 0.7, 0.0, 2.0, 0.0),
    "uniform": MaskingConfig("uniform", 0.0, 0.0, 2.0, 0.0),
}
every_law = pytest.mark.parametrize("law", list(CONFIGS))


def sample_keys(count: int) -> SampleKeys:
    return SampleKeys(1, np.zeros(count, np.int64), np.arange(count))


def masks(law: str, length: int, count: int) -> np.ndarray:
    """Masked tokens of many samples of one length, shape (count, length)."""
    inner_B = np.full(count, length)
    return draw_target(CONFIGS[law], sample_keys(count), inner_B).reshape(count, length)


def noise(law: str, length: int, count: int) -> MaskDraw:
    return draw_noise(CONFIGS[law], sample_keys(count), np.full(count, length))


def views_of(
    law: str | MaskingConfig, rows: list[list[int]], ids=None, seed=1, epoch=0, pair=False, most=None
):
    ids = np.arange(len(rows)) if ids is None else np.asarray(ids)
    samples = {"target": Ragged.from_rows(rows)} | ({"source": Ragged.from_rows(rows)} if pair else {})
    masking = CONFIGS[law] if isinstance(law, str) else law
    return make_views(masking, SPECIAL, SampleKeys(seed, np.full(len(rows), epoch), ids), samples, most)
