"""AR's scores of given outputs, the choice among NAR's candidates, and NAR with given tokens or a dial."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.rescore import ArScorer
from janus_ds.errors import DataError
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import TINY, tiny_generator, tiny_model

SOURCES = [[9, 8, 7, 6, 5], [7], [6, 5], [15, 14, 13]]
NMT = ObjectiveConfig(decoder_start="bos")
OBJECTIVES = [
    NMT,
    ObjectiveConfig(ar_stream="content", decoder_start="eos_bos"),
]


def generator(objective: ObjectiveConfig, model: JanusModel | None = None, **decode: Any) -> Generator:
    return tiny_generator(model or tiny_model(TINY), objective, **decode)


def scorer_of(made: Generator) -> ArScorer:
    return ArScorer(made.model, made.config)


@torch.no_grad()
@pytest.mark.parametrize(("stop", "longest"), [("fairseq", 9), ("transformers", 3)])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["query", "content"])
def test_scores_are_those_of_the_beam_search(
    objective: ObjectiveConfig, stop: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hypotheses of a search, scored anew, with what forced tokens cost and count."""
    ar = generator(objective, mode="ar", beam=3, beam_stop=stop, max_length=longest)
    found = ar.generate_ids(SOURCES)
    memory = ar.model.encode(*ar._pad(SOURCES))
    scores = scorer_of(ar).scores(memory, [[item.tokens for item in group] for group in found])
    # Logits are made sentence by sentence.
    assert len(next(scorer_of(ar).logits(memory, [[item.tokens for item in group] for group in found]))) == 3
    monkeypatch.setattr("janus_ds.decode.rescore._WIDEST_BLOCK", 12)
    assert torch.allclose(
        torch.tensor(scores),
        torch.tensor(scorer_of(ar).scores(memory, [[x.tokens for x in group] for group in found])),
    )
    assert stop == "fairseq" or any(len(item.tokens) == longest for group in found for item in group)
    for group, new in zip(found, scores, strict=True):
        assert new == pytest.approx([item.score for item in group], abs=1e-9)


@torch.no_grad()
def test_ar_chooses_among_candidates() -> None:
    nar = generator(NMT, mode="nar", iterations=2, length_beam=4)
    found = nar.generate_ids(SOURCES)
    judged = generator(NMT, mode="nar", iterations=2, length_beam=4, rescore="ar")
    results = judged.generate_ids(SOURCES)
    memory = nar.model.encode(*nar._pad(SOURCES))
    scorer = scorer_of(nar)
    for b, (group, result) in enumerate(zip(found, results, strict=True)):
        outputs = list(dict.fromkeys(item.tokens for item in group))
        (scores,) = scorer.scores(memory.select(torch.tensor([b])), [outputs])
        assert result[0].tokens == outputs[max(range(len(outputs)), key=lambda i: scores[i])]
        assert [item.score for item in result] == sorted((item.score for item in result), reverse=True)
        assert [item.passes for item in result] == [group[0].passes + 1] * len(result)
    assert [g[0].tokens for g in found] != [r[0].tokens for r in results]


@torch.no_grad()
def test_an_output_longer_than_the_position_table_is_refused() -> None:
    made = generator(NMT)
    memory = made.model.encode(*made._pad(SOURCES[:1]))
    with pytest.raises(DataError, match="does not fit the position table of 16") as caught:
        scorer_of(made).scores(memory, [[list(range(5, 25))]])
    assert caught.value.where
    assert caught.value.fix
