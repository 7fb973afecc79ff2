"""What must hold whatever the weights are, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from janus_ds.batch import PredictedRows, TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model.decoding.cache import ArStream
from janus_ds.model.janus import JanusModel
from janus_ds.stream_mask import Segment
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, make_batch

EXACT = 1e-12
CACHED = 1e-10


@pytest.fixture(params=["dense", "grouped"])
def model(request: pytest.FixtureRequest) -> Iterator[JanusModel]:
    built = tiny_model()
    built.attention_backend = request.param
    with torch.no_grad():
        yield built


def hidden(rows: PredictedRows) -> tuple[Tensor, Tensor, Tensor]:
    assert rows.ar_BAD is not None
    assert rows.nar_BMD is not None
    assert rows.aux_BMD is not None
    return rows.ar_BAD, rows.nar_BMD, rows.aux_BMD


def changed(batch: TwoStreamBatch, segment: Segment, sample: int, row: int, token: int) -> TwoStreamBatch:
    tokens = batch.row_token_BR.clone()
    tokens[sample, batch.layout.start(segment) + row] = token
    return replace(batch, row_token_BR=tokens)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def test_aux_row_zero_is_the_nar_row_and_aux_is_nar_when_one_token_is_masked(model: JanusModel) -> None:
    _, nar, aux = hidden(model(make_batch(SAMPLES)))
    assert distance(nar[:, 0], aux[:, 0]) < EXACT
    assert distance(nar[0, 1], aux[0, 1]) > 1e-3
    single = [replace(s, masked=s.masked[:1]) for s in SAMPLES]
    _, nar, aux = hidden(model(make_batch(single)))
    assert nar.shape[1] == 1
    assert distance(nar, aux) < EXACT


def test_a_gold_token_changes_no_nar_row_and_only_later_aux_rows(model: JanusModel) -> None:
    batch = make_batch(SAMPLES)
    ar, nar, aux = hidden(model(batch))
    for j in range(3):
        other_ar, other_nar, other_aux = hidden(model(changed(batch, Segment.CMP, 0, j, 20)))
        assert distance(nar, other_nar) < EXACT
        assert distance(ar, other_ar) < EXACT
        assert distance(aux[0, : j + 1], other_aux[0, : j + 1]) < EXACT
        assert all(distance(aux[0, i], other_aux[0, i]) > 1e-4 for i in range(j + 1, 3))


def test_ar_rows_do_not_depend_on_later_tokens(model: JanusModel) -> None:
    batch = make_batch(SAMPLES)
    ar, nar, aux = hidden(model(batch))
    for row in range(7):
        other_ar, other_nar, other_aux = hidden(model(changed(batch, Segment.ARC, 0, row, 20)))
        assert distance(ar[0, :row], other_ar[0, :row]) < EXACT
        assert all(distance(ar[0, i], other_ar[0, i]) > 1e-4 for i in range(row, 7))
        assert distance(nar, other_nar) < EXACT
        assert distance(aux, other_aux) < EXACT


STREAMS = [
    (TINY, ObjectiveConfig(ar_stream="query", ar_query_position="predicted", decoder_start="bos")),
    (TINY_NMT, ObjectiveConfig(ar_stream="query", ar_query_position="previous", decoder_start="bos")),
    (TINY, ObjectiveConfig(ar_stream="query", ar_query_position="predicted", decoder_start="eos_bos")),
    (TINY, ObjectiveConfig(ar_stream="content", ar_query_position="predicted", decoder_start="bos")),
]


@torch.no_grad()
@pytest.mark.parametrize(("config", "objective"), STREAMS)
def test_cached_steps_equal_teacher_forcing(config: object, objective: ObjectiveConfig) -> None:
    """Beams 0 and 1 swap their pasts on the way; every step gives the row of the whole sequence."""
    model = tiny_model(config)  # type: ignore[arg-type]
    two_stream = objective.ar_stream == "query"
    how = Conventions(
        query_position=str(objective.ar_query_position),
        start=str(objective.decoder_start),
        rows=frozenset({"arc", "arq"} if two_stream else {"arc"}),
    )
    sources = [s.source for s in SAMPLES]
    targets = [[[0, 11, 12, 13, 14, 2], [0, 21, 22, 23, 24, 2]] for _ in sources]
    memory = model.encode(
        torch.tensor([s + [1] * (9 - len(s)) for s in sources]), torch.tensor([len(s) for s in sources])
    )
    cache = model.start_cache(memory, ArStream.of(objective, TOY), 2, 6)
    swap = torch.tensor([[1, 0]] * 3)
    steps = []
    for step in range(5 if how.start == "bos" else 6):
        content = [t[:-1] if how.start == "bos" else [2, *t[:-1]] for t in targets[0]]
        # After step 2 the two hypotheses stand in each other's slot.
        slots = (0, 1) if step < 3 else (1, 0)
        tokens = torch.tensor([[content[slot][step] for slot in slots]] * 3)
        out = model.ar_block(cache, tokens[:, :, None], swap if step == 3 else None)[:, :, 0]
        steps.append(out[:, list(slots)])
    for b in range(3):
        whole = model(make_batch([Sample(sources[b], t, []) for t in targets[b]], how))
        assert whole.ar_BAD is not None
        assert distance(torch.stack([s[b] for s in steps], 1), whole.ar_BAD) < CACHED


@torch.no_grad()
def test_nar_rows_are_the_nar_rows_of_training() -> None:
    model = tiny_model()
    batch = make_batch(SAMPLES)
    _, nar, _ = hidden(model(batch))
    memory = model.encode(batch.source_BS, batch.source_length_B)
    width = max(len(s.target) for s in SAMPLES) + 2
    tokens = torch.full((3, 2, width), TOY.pad)
    # Candidate 1 of each sentence is the training target, candidate 0 another, longer one.
    lengths = torch.tensor([[width, len(s.target)] for s in SAMPLES])
    tokens[:, 0] = 19
    picked = []
    for b, sample in enumerate(SAMPLES):
        row = [TOY.mask if p in sample.masked else t for p, t in enumerate(sample.target)]
        tokens[b, 1, : len(row)] = torch.tensor(row)
        picked += [(b * 2 + 1) * width + p for p in sample.masked]
    most = max(len(s.masked) for s in SAMPLES)
    rows = model.nar_rows(memory, tokens, lengths, (torch.tensor(picked), most))
    assert distance(rows, nar.flatten(0, 1)[batch.masked_T]) < EXACT
    assert model.logits(rows).shape == (len(picked), TOY.vocab_size)
    assert distance(model.length_logits(memory), model(batch).length_logits_BK) < EXACT
    chosen = memory.select(torch.tensor([1]))
    alone = model.nar_rows(chosen, tokens[1:2], lengths[1:2], (torch.tensor([width + 2]), 1))
    assert distance(alone, nar[1, :1]) < EXACT
