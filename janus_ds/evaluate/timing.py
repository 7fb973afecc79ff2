"""Milliseconds a sentence as the paper's Tables 2, 4 and 5 count them: one sentence at a time.

What is timed is decoding alone: encoder, length prediction, all decoder passes and the choice of the best
candidate. Tokenising, loading and the text of the output are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

DecodeOne = Callable[[Sequence[int]], int]
"""Decodes one source (token ids without bos and eos) and tells the number of tokens of the output."""

Progress = Callable[[str, int, int], None]
_NINETY_FIVE = 0.95


@dataclass(frozen=True)
class LatencyPlan:
    """How speed is measured.

    Attributes:
        samples: sentences of each round.
        warm_up: sentences decoded before, not counted.
        rounds: times that all systems are measured, one after the other, so that a machine that slows down
            does so for all.
    """

    samples: int = 50
    warm_up: int = 20
    rounds: int = 3


@dataclass
class Latency:
    """Times of one system."""

    milliseconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Milliseconds a sentence."""
        return fmean(self.milliseconds)

    def as_dict(self) -> dict[str, float]:
        """Mean, median and 95th percentile in ms, and the mean length of the outputs in tokens."""
        ordered = sorted(self.milliseconds)
        return {
            "ms_per_sentence": self.mean,
            "median_ms": median(ordered),
            "p95_ms": ordered[min(len(ordered) - 1, int(_NINETY_FIVE * len(ordered)))],
            "mean_tokens": fmean(self.tokens),
        }


def spread_over(count: int, wanted: int) -> list[int]:
    """Numbers of at most `wanted` of `count` sentences, evenly from all over a set: its first sentences need
    not be typical."""
    if wanted < 1:
        return []
    return list(range(0, count, max(1, count // wanted)))[:wanted]


def measure(
    systems: Mapping[str, DecodeOne],
    sources: Sequence[Sequence[int]],
    plan: LatencyPlan,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Time systems on the same sentences.

    Args:
        device: where they decode; a GPU is waited for before each look at the clock.
        progress: called with "latency", and the numbers of finished sentences and of all.
    """
    found = {name: Latency() for name in systems}
    done, total = 0, plan.rounds * len(systems) * len(sources)
    for decode in systems.values():
        for source in sources[: plan.warm_up]:
            decode(source)
    for _ in range(plan.rounds):
        for name, decode in systems.items():
            for source in sources:
                _wait_for(device)
                start = time.perf_counter()
                tokens = decode(source)
                _wait_for(device)
                found[name].milliseconds.append(1000 * (time.perf_counter() - start))
                found[name].tokens.append(tokens)
                done += 1
                if progress is not None:
                    progress("latency", done, total)
    return found


def _wait_for(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
