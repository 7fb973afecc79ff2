"""AR scores whole outputs in one teacher-forced pass: it judges NAR's candidates with the same weights.

The rows are those of a check in `draft.py`: every token as a content row, and the query row of each predicts
the next. All candidates of all sentences are beams of one block; where that would be too wide a mask, they go
in groups.

Shape letters: B sentences, C candidates, T rows of a candidate, P scored rows, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.decode.mask_predict import MaskPredictSettings, TargetRows
from janus_ds.decode.model_steps import NarDecoder
from janus_ds.decode.sample import draw_rows
from janus_ds.decode.search_settings import ScoredTokens, SearchSettings
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.janus import JanusModel

_WIDEST_BLOCK = 512
"""Rows of a block: its mask is square."""
_UNSURE = 0.5
"""Positions that NAR gives its token a lower probability are drawn anew."""


@dataclass(frozen=True)
class ArScorer:
    """AR's view of given outputs.

    Attributes:
        model: in evaluation mode.
        stream: how AR rows are made.
        search: start symbols, eos, and the exponent of the length in a score.
    """

    model: JanusModel
    stream: ArStream
    search: SearchSettings

    def logits(self, memory: EncoderOutput, outputs: Sequence[Sequence[Sequence[int]]]) -> list[list[Tensor]]:
        """Logits for every token of each output and the eos behind it, (N + 1, V) each.

        Args:
            memory: the encoded sources.
            outputs: for each sentence equally many candidates, inner tokens only.
        """
        first = [] if self.search.forced_first is None else [self.search.forced_first]
        rows = [[[self.search.start, *first, *tokens] for tokens in group] for group in outputs]
        width = max(len(row) for group in rows for row in group)
        padded = [[row + [self.search.eos] * (width - len(row)) for row in group] for group in rows]
        token_BCT = torch.tensor(padded, device=memory.states_BSD.device)
        at_once = max(1, _WIDEST_BLOCK // width)
        hidden = []
        for block_BKT in token_BCT.split(at_once, dim=1):
            cache = self.model.start_cache(memory, self.stream, block_BKT.shape[1], width)
            hidden.append(self.model.ar_block(cache, block_BKT))
        hidden_BCTD = torch.cat(hidden, 1)
        return [
            [self.model.logits(hidden_BCTD[b, c, len(first) : len(row)]) for c, row in enumerate(group)]
            for b, group in enumerate(rows)
        ]

    def scores(self, memory: EncoderOutput, outputs: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """AR's score of each output, as a beam search gives it (without a forced first token)."""
        found = []
        for group, parts in zip(outputs, self.logits(memory, outputs), strict=True):
            scores = []
            for tokens, logits_TV in zip(group, parts, strict=True):
                target_T = torch.tensor([*tokens, self.search.eos], device=logits_TV.device)
                gain_T = logits_TV.gather(1, target_T[:, None]).squeeze(1) - logits_TV.logsumexp(1)
                scores.append(float(gain_T.sum()) / len(target_T) ** self.search.length_penalty)
            found.append(scores)
        return found


def rescore(
    scorer: ArScorer, memory: EncoderOutput, found: Sequence[Sequence[ScoredTokens]], weight: float = 1.0
) -> list[list[ScoredTokens]]:
    """The candidates with AR's score, or a mixture of AR's and their own, best first.

    Args:
        scorer: the model.
        memory: the encoded sources.
        found: candidates of each sentence; what occurs twice is kept once.
        weight: of AR's score; the candidates' own gets the rest.
    """
    groups = [list({item.tokens: item for item in reversed(group)}.values())[::-1] for group in found]
    most = max(len(group) for group in groups)
    outputs = [[item.tokens for item in group + group[:1] * (most - len(group))] for group in groups]
    results = []
    for group, scores in zip(groups, scorer.scores(memory, outputs), strict=True):
        items = [
            replace(item, score=weight * score + (1 - weight) * item.score, passes=item.passes + 1)
            for item, score in zip(group, scores, strict=False)
        ]
        results.append(sorted(items, key=lambda item: -item.score))
    return results


def sampled_variants(
    decoder: NarDecoder,
    found: Sequence[Sequence[ScoredTokens]],
    nar: MaskPredictSettings,
    samples: int,
    random: Sequence[torch.Generator],
) -> list[list[ScoredTokens]]:
    """The candidates, and samples of each one at the positions that NAR is not sure of.

    One more pass gives NAR's distribution at every position of the finished candidates; each of those whose
    token has a probability below one half is drawn from it, by itself.

    Args:
        decoder: the model on the encoded sources.
        found: equally many candidates of each sentence.
        nar: symbols and forbidden tokens.
        samples: wanted of each candidate.
        random: numbers of each sentence, so that its samples do not depend on the batch.
    """
    rows = [item for group in found for item in group]
    device = decoder.device
    length_R = torch.tensor([len(item.tokens) + 2 for item in rows], device=device)
    blank = TargetRows(length_R[:, None], nar)
    own_P = torch.tensor([token for item in rows for token in item.tokens], dtype=torch.long, device=device)
    token_RL = blank.token_RL.masked_scatter(blank.inner_RL, own_P)
    picked_P, most = blank.inner_RL.flatten().nonzero().squeeze(1), max(len(item.tokens) for item in rows)
    logits_PV = decoder.logits(decoder.hidden(token_RL, length_R, picked_P, most)).float()
    forbidden = torch.tensor(nar.forbidden, dtype=torch.long, device=device)
    share_PV = logits_PV.index_fill(1, forbidden, -math.inf).softmax(1)
    sure_P = share_PV.gather(1, own_P[:, None]).squeeze(1) >= _UNSURE
    count_B = [sum(len(item.tokens) for item in group) for group in found]
    results = [list(group) for group in found]
    candidates = len(found[0])
    for _ in range(samples):
        uniform_P = torch.cat(
            [torch.rand(count, generator=own) for count, own in zip(count_B, random, strict=True)]
        )
        drawn_P = torch.where(sure_P, own_P, draw_rows(share_PV, uniform_P.to(share_PV)))
        score_P = share_PV.gather(1, drawn_P[:, None]).squeeze(1).log()
        drawn_RL = token_RL.flatten().index_put((picked_P,), drawn_P).view(token_RL.shape)
        total_R = torch.zeros(token_RL.numel(), device=device).index_put((picked_P,), score_P)
        mean_R = total_R.view(token_RL.shape).sum(1) / (length_R - 2).clamp(min=1)
        for number, (row, item, score) in enumerate(
            zip(drawn_RL.tolist(), rows, mean_R.tolist(), strict=True)
        ):
            inner = tuple(row[1 : len(item.tokens) + 1])
            results[number // candidates].append(ScoredTokens(inner, score, item.passes + 1))
    return results
