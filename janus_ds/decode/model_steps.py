"""A model as the two searches ask for it: step by step, or all rows at once.

Shape letters: B sentences, K beams, C length candidates, R = B * C rows, L target tokens, P picked rows,
X rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from janus_ds.model.incremental import ArCache, Memory
from janus_ds.model.janus import JanusModel

__all__ = ["CachedSteps", "CandidateRows"]


class CachedSteps:
    """The step function of a beam search: one content row and one query row a beam.

    Args:
        model: in evaluation mode.
        cache: of the sentences that begin.
        encode_next: encodes the next sentences that wait, so many; None: none wait.
        before: a token that is fed together with the first ones, before them.
    """

    def __init__(
        self,
        model: JanusModel,
        cache: ArCache,
        encode_next: Callable[[int], Memory] | None = None,
        before: int | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._encode_next = encode_next
        self._before = before

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None, step: int) -> Tensor:
        """See :class:`janus_ds.decode.beam_search.StepFunction`."""
        tokens = [token_BK]
        if parent_BK is None and self._before is not None:
            tokens.insert(0, torch.full_like(token_BK, self._before))
        hidden_BKTD = self._model.ar_block(self._cache, torch.stack(tokens, 2), parent_BK)
        return self._model.logits(hidden_BKTD[:, :, -1])

    def keep(self, sentence_B: Tensor) -> None:
        """See :class:`janus_ds.decode.beam_search.StepFunction`."""
        self._cache = self._cache.select(sentence_B)

    def refill(self, place_X: Tensor) -> None:
        """See :class:`janus_ds.decode.beam_search.RefillableSteps`."""
        if self._encode_next is not None:
            self._cache.refill(place_X, self._encode_next(len(place_X)))


class CandidateRows:
    """The decoder of mask-predict: all length candidates of all sentences in one pass."""

    def __init__(self, model: JanusModel, memory: Memory) -> None:
        self._model = model
        self._memory = memory

    @property
    def device(self) -> torch.device:
        """Where tokens are wanted."""
        return self._memory.states_BSD.device

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor) -> Tensor:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        shape = (self._memory.sentences, -1)
        token_BCL, length_BC = token_RL.view(*shape, token_RL.shape[1]), length_R.view(shape)
        return self._model.nar_rows(self._memory, token_BCL, length_BC, picked_P)

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        return self._model.logits(hidden_XD)

    def keep(self, sentence_B: Tensor) -> None:
        """See :class:`janus_ds.decode.mask_predict.RowDecoder`."""
        self._memory = self._memory.select(sentence_B)
