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


def start_from(
    model: nn.Module,
    source: str,
    tokenizer: Tokenizer,
    parallel: ParallelLayers,
    new_length_head: bool = False,
) -> None:
    """Put the weights of a run folder, a checkpoint or a weights file into a model.

    A length head with another number of classes cannot be taken over (conventions count lengths
    differently): the model's own, drawn from the seed, stays.

    Args:
        model: fresh from its seed.
        source: where the weights are.
        tokenizer: the data's; must be what the weights were trained with.
        parallel: the layers the model was built from.
        new_length_head: keep the model's own even where the other one fits.

    Raises:
        CheckpointError: there are no weights, they are of another shape, or they were trained with
            another tokenizer than the data has.
    """
    _check_tokenizer(source, tokenizer)
    path = find_weights(Path(source))
    weights = read_weights(path)
    own = model.get_parameter(_LENGTH_HEAD)
    fits = _LENGTH_HEAD in weights and weights[_LENGTH_HEAD].shape == own.shape
    if new_length_head or not fits:
        why = (
            "is not wanted (init_length_head: new)" if fits else f"does not fit ({own.shape[0]} classes here)"
        )
        logger.info("the length head of %s %s: a new one", path, why)
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
