"""AR scores whole outputs in one teacher-forced pass: it judges NAR's candidates with the same weights.

The rows are those of a check in `draft.py`: every token as a content row, and the query row of each predicts
the next. All candidates of all sentences are beams of one block; where that would be too wide a mask, they go
in groups.

Shape letters: B sentences, C candidates, T rows of a candidate, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from janus_ds.config.schema import RunConfig
from janus_ds.decode.search_settings import Hypothesis, distinct, search_settings
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.janus import JanusModel

_WIDEST_BLOCK = 512
"""Rows of a block: its mask is square."""


class ArScorer:
    """AR's view of given outputs."""

    def __init__(self, model: JanusModel, config: RunConfig) -> None:
        self.model = model
        self.search = search_settings(config, model.special)
        self.stream = ArStream.of(config.objective, model.special)
        forced = self.search.forced_first
        # One that is shown is part of the outputs.
        self._first = [] if forced is None or self.search.shows_first else [forced]

    def logits(
        self, memory: EncoderOutput, outputs: Sequence[Sequence[Sequence[int]]]
    ) -> Iterator[list[Tensor]]:
        """Logits for every token of each output and the eos behind it, (N + 1, V) each; one row more, in
        front, where AR begins with a forced token that is no part of outputs.

        They are made sentence by sentence, since those of a batch can take gigabytes.

        Args:
            outputs: for each sentence equally many candidates, inner tokens only.
        """
        rows = [[[self.search.start, *self._first, *tokens] for tokens in group] for group in outputs]
        width = max(len(row) for group in rows for row in group)
        padded = [[row + [self.search.eos] * (width - len(row)) for row in group] for group in rows]
        token_BCT = torch.tensor(padded, device=memory.states_BSD.device)
        at_once = max(1, _WIDEST_BLOCK // width)
        hidden = []
        for block_BKT in token_BCT.split(at_once, dim=1):
            cache = self.model.start_cache(memory, self.stream, block_BKT.shape[1], width)
            hidden.append(self.model.ar_block(cache, block_BKT))
        hidden_BCTD = torch.cat(hidden, 1)
        for group, hidden_CTD in zip(rows, hidden_BCTD, strict=True):
            yield [
                self.model.logits(hidden_TD[: len(row)])
                for row, hidden_TD in zip(group, hidden_CTD, strict=True)
            ]

    def scores(self, memory: EncoderOutput, outputs: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """AR's score of each output, as a beam search gives it."""
        search, found = self.search, []
        for group, parts in zip(outputs, self.logits(memory, outputs), strict=True):
            scores = []
            for tokens, logits_TV in zip(group, parts, strict=True):
                said = [*self._first, *tokens, search.eos]
                target_T = torch.tensor(said, device=logits_TV.device)
                gain_T = logits_TV.gather(1, target_T[:, None]).squeeze(1) - logits_TV.logsumexp(1)
                for step, token in enumerate(said) if search.free_forced else ():
                    if search.forced(step) == token:
                        gain_T[step] = 0.0
                scores.append(float(gain_T.sum()) / len(said) ** search.length_penalty)
            found.append(scores)
        return found


def rescore(
    scorer: ArScorer, memory: EncoderOutput, found: Sequence[Sequence[Hypothesis]]
) -> list[list[Hypothesis]]:
    """The candidates with AR's score, best first; of what occurs twice, one is kept."""
    groups = [distinct(group) for group in found]
    most = max(len(group) for group in groups)
    outputs = [[item.tokens for item in group + group[:1] * (most - len(group))] for group in groups]
    results = []
    for group, scores in zip(groups, scorer.scores(memory, outputs), strict=True):
        items = [
            replace(item, score=score, passes=item.passes + 1)
            for item, score in zip(group, scores, strict=False)
        ]
        results.append(sorted(items, key=lambda item: -item.score))
    return results
