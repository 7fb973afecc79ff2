"""What a check of a draft would gain if its call also drafted anew: decoder calls, rows and time at batch 1.

Today a sentence is drafted once by NAR; each further call is a check, and the next drafts are what AR chose
in it. Here each check is joined by NAR rows. They are computed beside it, which gives the tokens and counts
that one call would have; the time of that call is worked out, once as if its NAR rows cost nothing, once at
the price of a row in a check. In fp32 a tie may be decided otherwise than by greedy AR: such outputs are
counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from results import table

from janus_ds.decode.draft import DraftSearch, Proposal, Sentence, draft_plan
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import Target, given_rows
from janus_ds.decode.load import LoadedRun, with_decode
from janus_ds.decode.mask_predict import length_candidates, mask_predict
from janus_ds.decode.model_steps import NarDecoder, most_rows
from janus_ds.model.decoding.cache import ArStream

TODAY = "today: drafted once"
SETTLED = "in the check's call, from what was settled before it"
ASSUMED = "in the check's call, from that and the checked draft"
APART = "in a call of its own after each check"
KINDS = (TODAY, SETTLED, ASSUMED, APART)


@dataclass
class Counts:
    """Calls, their rows, and CPU seconds, all sentences together."""

    checks: int = 0
    check_rows: int = 0
    drafts: int = 0
    draft_rows: int = 0
    differ: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0
    check_seconds: float = 0.0
    """Parts of `seconds`; the rest is NAR's."""


class Redrafted(DraftSearch):
    """Drafting with further NAR rows, one sentence at a time."""

    def __init__(self, run: LoadedRun, source: Sequence[int], kind: str, counts: Counts) -> None:
        config, special, began = run.config, run.special, time.process_time()
        ids = torch.tensor([[special.bos, *source, special.eos]])
        memory = run.model.encode(ids, torch.tensor([ids.shape[1]]))
        counts.encode_seconds += time.process_time() - began
        stream = ArStream.of(config.objective, special)
        super().__init__(run.model, memory, stream, draft_plan(config, special))
        self.kind, self.counts = kind, counts
        self._two_stream, self._most = stream.two_stream, most_rows(config)

    def first_drafts(self, sentences: Sequence[Sentence]) -> list[Proposal]:
        """See :class:`DraftSearch`."""
        found = super().first_drafts(sentences)
        self._count(len(sentences[0].pool[0]) + 2)
        return found

    def _check(self, going: Sequence[Sentence], proposals: Sequence[Proposal]) -> None:
        (sentence,), (proposal,), fresh = going, proposals, []
        if self.kind in (SETTLED, ASSUMED):
            fresh = self._fresh(sentence.inner + proposal.draft * (self.kind == ASSUMED))
        self.counts.check_rows += (len(sentence.pending) + len(proposal.draft)) * (1 + self._two_stream)
        began = time.process_time()
        super()._check(going, proposals)
        self.counts.check_seconds += time.process_time() - began
        self.counts.checks += 1
        if self.kind == APART and sentence.pending:
            fresh = self._fresh(sentence.inner)
        sentence.pool[:0] = fresh

    def _count(self, rows: int) -> None:
        self.counts.drafts += 1
        self.counts.draft_rows += rows

    def _fresh(self, begun: list[int]) -> list[list[int]]:
        """NAR's target that begins so, of the likeliest length; none where the position table ends."""
        plan, memory = self._plan, self._cache.memory
        logits_BK = self._model.length_logits(memory).float()
        length_B1 = length_candidates(logits_BK, "paper", 1, plan.convention, self._most)
        row = (*begun, *[None] * max(1, int(length_B1) - 2 - len(begun)))
        if len(row) + 2 > self._most:
            return []
        self._count(len(row) + 2)
        length_BC, given_RL = given_rows([Target((), (), (row,))], plan.nar)
        (found,) = mask_predict(NarDecoder(self._model, memory), length_BC, plan.nar, given_RL)
        return [list(item.tokens) for item in found]


def draft_calls(run: LoadedRun, sources: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Calls, rows and milliseconds of a sentence: greedy AR, drafting of today, and with further NAR rows."""
    greedy = Generator(
        run.model, run.text, run.special, with_decode(run.config, {"mode": "ar", "beam": 1}), 1
    )
    run = replace(run, config=with_decode(greedy.config, {"mode": "draft"}))
    counts, steps, alone = {kind: Counts() for kind in KINDS}, 0, 0.0
    greedy.generate_ids(sources[:2])
    for source in sources:
        began = time.process_time()
        ((wanted,),) = greedy.generate_ids([source])
        alone += time.process_time() - began
        steps += wanted.passes
        for kind, sums in counts.items():
            began = time.process_time()
            with torch.inference_mode():
                (found,) = Redrafted(run, source, kind, sums).run()
            sums.seconds += time.process_time() - began
            sums.differ += found.tokens != wanted.tokens
    each = 1 + ArStream.of(run.config.objective, run.special).two_stream
    return worked_out(counts, {"calls": steps, "rows": each * steps, "ms": 1e3 * alone}, len(sources))


def worked_out(counts: Mapping[str, Counts], greedy: Mapping[str, float], sentences: int) -> dict[str, Any]:
    """Means of a sentence; the price of a row is that of a check's rows beyond those of a greedy step."""
    today = counts[TODAY]
    check = 1e3 * today.check_seconds / today.checks
    step = (greedy["ms"] - 1e3 * today.encode_seconds) / greedy["calls"]
    more = today.check_rows / today.checks - greedy["rows"] / greedy["calls"]
    price = max(0.0, (check - step) / more)
    first = 1e3 * (today.seconds - today.check_seconds)
    ways: dict[str, Any] = {"greedy AR": dict(greedy)}
    for kind, sums in counts.items():
        ways[kind] = {"calls": sums.checks + sentences, "rows": sums.check_rows + sums.draft_rows}
        if kind in (TODAY, APART):
            ways[kind] |= {"calls": sums.checks + sums.drafts, "ms": 1e3 * sums.seconds}
            continue
        free = first + sums.checks * check
        ways[kind] |= {"ms_free": free, "ms": free + price * (sums.draft_rows - today.draft_rows)}
    draft = first - 1e3 * today.encode_seconds
    return {
        "sentences": sentences,
        "differ": today.differ,
        "ms": {"step": round(step, 3), "check": round(check, 3), "first_draft": round(draft / sentences, 3)},
        "row_us": round(1e3 * price, 2),
        "ways": {way: {k: round(v / sentences, 2) for k, v in item.items()} for way, item in ways.items()},
    }


def paragraph(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures, and what follows from them, in Markdown."""
    ways, ms = found["ways"], found["ms"]
    rows = [
        [way, f"{x['calls']:.2f}", f"{x['rows']:.0f}", f"{x.get('ms_free', x['ms']):.1f}", f"{x['ms']:.1f}"]
        for way, x in ways.items()
    ]
    greedy, today, joined = ways["greedy AR"], ways[TODAY], ways[SETTLED]
    saved = today["calls"] - joined["calls"]
    yield (
        f"Would a check pay that also drafts anew (`--draft-calls {found['sentences']}`; batch 1, means of a "
        f"sentence, {found['differ']} outputs other than greedy AR's)? A step of greedy AR takes "
        f"{ms['step']:.2f} ms, a check {ms['check']:.2f}, the first draft, a NAR pass, "
        f"{ms['first_draft']:.2f}, each further row {found['row_us']:.0f} microseconds. NAR rows in the "
        f"check's call save {saved:.2f} of {today['calls']:.2f} calls: {joined['ms_free']:.1f} ms if they "
        f"cost nothing, {joined['ms']:.1f} at that price, against {today['ms']:.1f} as it is built and "
        f"{greedy['ms']:.1f} of greedy AR."
    )
    yield ""
    yield from table(["next drafts", "calls", "rows", "ms, NAR rows free", "ms"], rows)
