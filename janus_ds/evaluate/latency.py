"""Milliseconds a sentence as the paper's Tables 2, 4 and 5 count them: one sentence at a time.

What is timed is decoding alone: encoder, length prediction, all decoder passes and the choice of the best
candidate. Tokenising, loading and the text of the output are not. Two things to compare with: our AR, and
transformers' AR.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from janus_ds.decode.load import DTYPES, InferenceOptions, LoadedRun
from janus_ds.evaluate.hf_folders import write_hf
from janus_ds.model.janus import JanusModel
from janus_ds.progress import table

DecodeOne = Callable[[Sequence[int]], int]
"""Decodes one source (token ids without bos and eos) and tells the number of tokens of the output."""

Progress = Callable[[str, int, int], None]
WARM_UP, ROUNDS = 20, 3
"""Sentences decoded before, not counted; and times that all systems are measured."""
_NINETY_FIVE = 0.95
OURS, THEIRS = "ar", "hf-ar"


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
    most = max(0, min(count, wanted))
    return [number * count // most for number in range(most)]


def timed_sources(sources: Sequence[Sequence[int]], wanted: int) -> list[Sequence[int]]:
    """At most `wanted` sources, spread over those that are not empty: of an empty one nothing is decoded."""
    whole = [source for source in sources if source]
    return [whole[number] for number in spread_over(len(whole), wanted)]


def device_name(device: torch.device | str) -> str:
    """What is timed on: the GPU's name, or the CPU's threads."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"cpu, threads {torch.get_num_threads()}"


def precision_of(model: JanusModel, options: InferenceOptions) -> str:
    """The precision that a prepared model decodes in: fp32, bf16, float64 or int8."""
    (name,) = (name for name, dtype in DTYPES.items() if dtype == model.output_weight.dtype)
    return "int8" if options.int8 else name


def measure(
    systems: Mapping[str, DecodeOne],
    sources: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    warm_up: int = WARM_UP,
    rounds: int = ROUNDS,
) -> dict[str, Latency]:
    """Time systems on the same sentences, one after the other: a machine that slows down does so for all.

    Args:
        device: where they decode; a GPU is waited for before each look at the clock.
        progress: called with "latency", and the numbers of finished sentences and of all.
    """
    found = {name: Latency() for name in systems}
    done, total = 0, rounds * len(systems) * len(sources)
    for decode in systems.values():
        for source in sources[:warm_up]:
            decode(source)
    for _ in range(rounds):
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


@dataclass(frozen=True)
class LatencyReport:
    """Times of all systems.

    Attributes:
        systems: in the order of the table.
        conditions: what they were measured on and with.
        notes: what a reader must know.
    """

    systems: dict[str, Latency]
    conditions: dict[str, Any]
    notes: list[str]

    def speed_up(self, name: str, base: str) -> float | None:
        """How many times as fast as `base`; None where that was not measured."""
        if base not in self.systems:
            return None
        return self.systems[base].mean / self.systems[name].mean

    def as_dict(self) -> dict[str, Any]:
        """The form of `scores.json`."""
        systems = {
            name: {
                **latency.as_dict(),
                "speed_up_over_our_ar": self.speed_up(name, OURS),
                "speed_up_over_hf_ar": self.speed_up(name, THEIRS),
            }
            for name, latency in self.systems.items()
        }
        return {"conditions": self.conditions, "systems": systems, "notes": self.notes}

    def lines(self) -> list[str]:
        """The table, with its conditions above and its notes below."""
        rows: list[tuple[str, ...]] = [
            ("system", "ms/sample", "median", "p95", "tokens", "x our AR", "x HF AR")
        ]
        for name, latency in self.systems.items():
            found = latency.as_dict()
            cells = [f"{found[key]:.1f}" for key in ("ms_per_sentence", "median_ms", "p95_ms", "mean_tokens")]
            ratios = [self.speed_up(name, base) for base in (OURS, THEIRS)]
            rows.append((name, *cells, *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)))
        what = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        return [f"latency: {what}", table(rows), *(f"note: {note}" for note in self.notes)]


def hf_ar(
    run: LoadedRun,
    folder: Path,
    lengths: Mapping[tuple[int, ...], int] | None,
    device: torch.device | str,
) -> DecodeOne:
    """A run's model in transformers, in the same precision (int8: fp32), decoding one source at a time with
    the run's search settings.

    Args:
        run: its shape must be one of BART's.
        folder: empty; the exported model goes there.
        lengths: tokens to write for each source; None: as many as the model wants.
    """
    write_hf(run, folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Its own types take no str for a device.
    model: Any = transformers.BartForConditionalGeneration.from_pretrained(folder)
    model, special = model.to(device, run.model.output_weight.dtype).eval(), run.special
    # The start token and eos count, and bos where the decoder starts with eos.
    more = 3 if run.config.objective.decoder_start == "eos_bos" else 2

    def decode(ids: Sequence[int]) -> int:
        source_1S = torch.tensor([[special.bos, *ids, special.eos]], device=device)
        options = {}
        if lengths is not None:
            whole = lengths[tuple(ids)] + more
            options = {"max_length": whole, "min_length": whole - 1}
        with torch.no_grad():
            found = model.generate(input_ids=source_1S, attention_mask=torch.ones_like(source_1S), **options)
        structural = (special.bos, special.pad, special.eos)
        return sum(token not in structural for token in found[0].tolist())

    return decode
