"""How well a model fills what is hidden in held-out passages, against the original."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.loader import validation_batches
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.step_plan import RankShare
from janus_ds.decode.load import LoadedRun
from janus_ds.evaluate.passages import valid_split
from janus_ds.model.janus import JanusModel

_BATCH = 32


@dataclass(frozen=True)
class Blanks:
    """Tokens hidden from the encoder, and the shares of them whose likeliest token is the original."""

    tokens: int
    ar: float
    """Each given the source and all of the original to its left."""
    nar: float
    """All at once, given the source and what the original has around the blanks."""


def blank_batches(run: LoadedRun, samples: int, data: Path | None = None) -> list[TwoStreamBatch]:
    """The first samples of a run's validation split; masked is what the encoder does not see.

    Args:
        run: of pretraining, trained both ways.
        samples: how many; fewer where the split has fewer.
        data: the data directory; None: where it lay in training.

    Raises:
        DataError: the directory is not there any more, or is damaged.
    """
    masking = replace(run.config.masking, target_share=run.config.masking.source_share)
    config: RunConfig = replace(run.config, masking=masking)
    maker = BatchMaker(valid_split(config, data), config, run.special)
    share = RankShare(rank=0, size=1, micro_batch=_BATCH)
    return [item.batch for item in validation_batches(maker, share, samples)]


@torch.no_grad()
def fill_blanks(model: JanusModel, batches: list[TwoStreamBatch]) -> Blanks:
    """Predict all masked tokens, in one pass of the decoder a batch; the model is in evaluation mode."""
    tokens, right = 0, {"ar": 0, "nar": 0}
    symbols = model.special.vocab_size
    for batch in batches:
        batch = batch.to(model.output_weight.device)
        rows = model(batch)
        target_T = batch.masked_target_BM.flatten()[batch.masked_T]
        tokens += len(target_T)
        streams = {"ar": (rows.ar_BAD, batch.ar_masked_T), "nar": (rows.nar_BMD, batch.masked_T)}
        for name, (hidden, index_T) in streams.items():
            logits_TV = hidden.flatten(0, 1)[index_T] @ model.output_weight[:symbols].T
            right[name] += int((logits_TV.argmax(1) == target_T).sum())
    return Blanks(tokens, right["ar"] / max(1, tokens), right["nar"] / max(1, tokens))
