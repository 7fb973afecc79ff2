"""Batches of the plain `ar` layout from given sources and targets, for comparison with other code."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.masking.views import Views
from janus_ds.decode.load import LoadedRun


def ar_batch(
    run: LoadedRun, source_BS: Tensor, source_length_B: Tensor, target_BT: Tensor, target_length_B: Tensor
) -> TwoStreamBatch:
    """A batch made by the run's own collator of padded sources and targets with bos and eos."""
    source, target = _ragged(source_BS, source_length_B), _ragged(target_BT, target_length_B)
    classes = run.config.model.length_classes or 0
    collate = Collator(run.special, run.config.objective, classes, 8, run.config.model.max_source_positions)
    views = Views(source, target, np.zeros(len(target.values), dtype=bool))
    return collate(views, np.arange(len(source_BS)))


def _ragged(token_BT: Tensor, length_B: Tensor) -> Ragged:
    rows = [row[: int(n)].tolist() for row, n in zip(token_BT, length_B, strict=True)]
    return Ragged.from_rows(rows)
