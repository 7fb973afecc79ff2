"""The first weights of a run, where they come from another one (`init`)."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from janus_ds.checkpoint.weights import find_weights, read_weights
from janus_ds.config.initial import record_of
from janus_ds.data.tokenizer import Tokenizer
from janus_ds.errors import CheckpointError
from janus_ds.model.weights import load_weights
from janus_ds.parallel.layers import ParallelLayers

__all__ = ["start_from"]

_LENGTH_HEAD = "length_head.weight"

logger = logging.getLogger(__name__)


def start_from(model: nn.Module, source: str, tokenizer: Tokenizer, parallel: ParallelLayers) -> None:
    """Put the weights of a run folder, a checkpoint or a weights file into a model.

    A length head with another number of classes cannot be taken over (conventions count lengths
    differently): the model's own, drawn from the seed, stays.

    Raises:
        CheckpointError: there are no weights, they are of another shape, or they were trained with
            another tokenizer than the data has.
    """
    _check_tokenizer(source, tokenizer)
    path = find_weights(Path(source))
    weights = read_weights(path)
    own = model.get_parameter(_LENGTH_HEAD)
    if _LENGTH_HEAD not in weights or weights[_LENGTH_HEAD].shape != own.shape:
        logger.info("the length head of %s does not fit (%d classes here): a new one", path, own.shape[0])
        weights[_LENGTH_HEAD] = own.detach().clone()
    load_weights(model, weights, str(path), parallel)


def _check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    trained_with = record_of(Path(source)).get("tokenizer_fingerprint")
    if trained_with and trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            "the weights to start from were trained with another tokenizer than the data has",
            f"init {source}: tokenizer {trained_with[:12]}, data {tokenizer.fingerprint[:12]}",
            f"prepare the data with --tokenizer {Path(source) / 'tokenizer'}, or give other weights",
        )
