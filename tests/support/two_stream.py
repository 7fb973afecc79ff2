"""Batches laid out sample by sample in plain Python: an oracle that shares nothing with data/collate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from janus_ds.batch import BatchCounts, RowLayout, SpecialTokens, TwoStreamBatch
from janus_ds.stream_mask import Segment

TOY = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=29)


@dataclass(frozen=True)
class Sample:
    """Source and target with bos and eos, and the masked target positions in ascending order."""

    source: list[int]
    target: list[int]
    masked: list[int]


@dataclass(frozen=True)
class Conventions:
    """How rows are made; the defaults are those of the `paper` preset for translation."""

    query_position: str = "predicted"
    start: str = "bos"
    mask: int = TOY.mask
    pad: int = TOY.pad
    eos: int = TOY.eos
    rows: frozenset[str] = field(
        default_factory=lambda: frozenset({"arc", "vis", "cmp", "msk", "arq", "qry"})
    )
    extra_padding: int = 0


def ar_rows(target: list[int], how: Conventions) -> tuple[list[int], list[int], list[int], list[int]]:
    """Content tokens, targets, content positions and query positions of AR."""
    content = target[:-1] if how.start == "bos" else [how.eos, *target[:-1]]
    predicted = target[1:] if how.start == "bos" else list(target)
    positions = list(range(len(content)))
    ahead = 1 if how.start == "bos" and how.query_position == "predicted" else 0
    return content, predicted, positions, [p + ahead for p in positions]


def segment_rows(sample: Sample, how: Conventions) -> dict[str, list[tuple[int, int]]]:
    """(token, position) of every row of a sample, by segment."""
    content, _, at, query_at = ar_rows(sample.target, how)
    gold = [(sample.target[p], p) for p in sample.masked]
    hidden = [(how.mask, p) for p in sample.masked]
    rows = {
        "arc": list(zip(content, at, strict=True)),
        "vis": [(token, p) for p, token in enumerate(sample.target) if p not in sample.masked],
        "cmp": gold,
        "msk": hidden,
        "arq": [(how.mask, query_at[row]) for row in range(len(content))],
        "qry": hidden,
    }
    return {name: value if name in how.rows else [] for name, value in rows.items()}


def _padded(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    cells = [row + [value] * (width - len(row)) for row in rows]
    return torch.tensor(cells, dtype=torch.int64).view(len(rows), width)


def make_batch(samples: list[Sample], how: Conventions | None = None) -> TwoStreamBatch:
    """A batch with padding at the end of every segment."""
    how = how or Conventions()
    rows = [segment_rows(sample, how) for sample in samples]
    names = ("arc", "vis", "cmp", "msk", "arq", "qry")
    longest = {n: max(len(r[n]) for r in rows) for n in names}
    widths: dict[str, Any] = {n: w + how.extra_padding if w else 0 for n, w in longest.items()}
    source_width = max(len(s.source) for s in samples) + how.extra_padding

    def column(part: int, fill: int) -> torch.Tensor:
        cells = [_padded([[x[part] for x in r[n]] for r in rows], widths[n], fill) for n in names]
        return torch.cat(cells, 1)

    slots = widths["msk"]
    # The stream that predicts, and which of AR's rows its rows are.
    ar_width = widths["arq"] or widths["arc"]
    ranks = [list(range(len(ar_rows(s.target, how)[0]))) if ar_width else [] for s in samples]
    shift = 1 if how.start == "bos" else 0
    masked = [s.masked if slots else [] for s in samples]
    ar_of_masked = [[p - shift for p in m] if ar_width else [0] * len(m) for m in masked]
    ar_targets = [[ar_rows(s.target, how)[1][i] for i in r] for s, r in zip(samples, ranks, strict=True)]
    flat = [(b, j, row) for b, ms in enumerate(ar_of_masked) for j, row in enumerate(ms)]
    unmasked = [
        b * ar_width + row
        for b, targets in enumerate(ar_targets)
        for row in range(len(targets))
        if row not in ar_of_masked[b] or not slots
    ]
    return TwoStreamBatch(
        layout=RowLayout(**widths),
        counts=BatchCounts(
            samples=len(samples),
            source_tokens=sum(len(s.source) for s in samples),
            target_tokens=sum(len(s.target) for s in samples),
            ar_tokens=sum(len(t) for t in ar_targets),
            masked_tokens=sum(len(m) for m in masked),
        ),
        sample_id_B=torch.arange(len(samples)),
        source_BS=_padded([s.source for s in samples], source_width, how.pad),
        source_length_B=torch.tensor([len(s.source) for s in samples]),
        row_token_BR=column(0, how.pad),
        row_position_BR=column(1, 0),
        ar_length_B=torch.tensor([len(r["arc"]) for r in rows]),
        visible_length_B=torch.tensor([len(r["vis"]) for r in rows]),
        masked_length_B=torch.tensor([len(m) for m in masked]),
        ar_target_BA=_padded(ar_targets, ar_width, how.pad),
        masked_target_BM=_padded(
            [[s.target[p] for p in m] for s, m in zip(samples, masked, strict=True)], slots, how.pad
        ),
        length_target_B=torch.tensor([len(s.target) - 2 for s in samples]),
        ar_unmasked_U=torch.tensor(unmasked, dtype=torch.int64),
        ar_masked_T=torch.tensor([b * ar_width + row for b, _, row in flat if ar_width], dtype=torch.int64),
        masked_T=torch.tensor([b * slots + j for b, j, _ in flat], dtype=torch.int64),
    )


def long_batch() -> TwoStreamBatch:
    """Ragged samples of hundreds of tokens: some, few and nearly all of them masked."""
    samples = []
    for length, every in ((300, 2), (170, 7), (259, 1)):
        target = [0, *(5 + i % 20 for i in range(length - 2)), 2]
        samples.append(Sample([0, 9, 2], target, list(range(1, length - 1, every))))
    return make_batch(samples, Conventions(extra_padding=5))


def valid_rows(batch: TwoStreamBatch) -> torch.Tensor:
    """True for rows that are no padding, (B, R)."""
    parts = [torch.arange(batch.layout.width(s)) < batch.row_length_B(s)[:, None] for s in Segment]
    return torch.cat(parts, 1)
