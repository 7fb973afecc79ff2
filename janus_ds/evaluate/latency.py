"""Speed of AR and NAR side by side, with two things to compare with: our AR, and transformers' AR."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from janus_ds.config.modes import trained_modes, with_decode
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.errors import CheckpointError
from janus_ds.evaluate.evaluation import (
    EvalRequest,
    Progress,
    one_by_one,
    systems_of,
)
from janus_ds.evaluate.hf_folders import write_hf
from janus_ds.evaluate.timing import DecodeOne, Latency, LatencyPlan, measure, spread_over
from janus_ds.model.decoding.inference import prepare_for_inference
from janus_ds.observe.progress import table

_OURS, _THEIRS = "ar", "hf-ar"


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
                "speed_up_over_our_ar": self.speed_up(name, _OURS),
                "speed_up_over_hf_ar": self.speed_up(name, _THEIRS),
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
            ratios = [self.speed_up(name, base) for base in (_OURS, _THEIRS)]
            rows.append((name, *cells, *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)))
        what = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        return [f"latency: {what}", table(rows), *(f"note: {note}" for note in self.notes)]


def measure_glge(
    request: EvalRequest,
    run: LoadedRun,
    sources: Sequence[Sequence[int]],
    plan: LatencyPlan,
    ar_checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time every system of a request, and both kinds of AR, one sentence at a time; the sentences are taken
    evenly from all over the split.
    """
    chosen = [sources[i] for i in spread_over(len(sources), plan.samples)]
    notes: list[str] = []
    base = run if ar_checkpoint is None else _other_run(ar_checkpoint, run, request)
    generators = systems_of(request, run)
    if base is not run or "ar" in trained_modes(base.config.objective):
        decode = with_decode(base.config, {**request.decode, "mode": "ar"})
        # In front, and in the place of the run's own AR if another one is the base.
        generators = {_OURS: Generator(base.model, base.text, base.special, decode)} | {
            name: generator for name, generator in generators.items() if name != _OURS
        }
        notes += [f"{_OURS} is the run {base.config.name}"] if base is not run else []
    else:
        notes.append("the run was not trained for AR; --ar-checkpoint RUN gives it something to compare with")
    systems: dict[str, DecodeOne] = {name: partial(one_by_one, made) for name, made in generators.items()}
    with tempfile.TemporaryDirectory(prefix="janus-hf-") as folder:
        peer = _peer(base, request, systems, chosen, Path(folder), notes)
        if peer is not None:  # the AR systems first
            ours = {name: decode for name, decode in systems.items() if name == _OURS}
            systems = {**ours, _THEIRS: peer, **systems}
        found = measure(systems, chosen, plan, request.device, progress)
    return LatencyReport(found, _conditions(request, run, plan, len(chosen)), notes)


def _other_run(path: Path, run: LoadedRun, request: EvalRequest) -> LoadedRun:
    other = load_run(path, None, request.device)
    prepare_for_inference(other.model, request.inference)
    if getattr(other.codec(), "fingerprint", None) != getattr(run.codec(), "fingerprint", None):
        raise CheckpointError(
            "the two runs have different vocabularies",
            f"{run.folder} and {other.folder}",
            "give an --ar-checkpoint that was trained with the same tokenizer",
        )
    return other


def _peer(
    base: LoadedRun,
    request: EvalRequest,
    systems: Mapping[str, DecodeOne],
    sources: Sequence[Sequence[int]],
    folder: Path,
    notes: list[str],
) -> DecodeOne | None:
    """transformers' AR of the base; None, with a note, where there cannot be one."""
    if importlib.util.find_spec("transformers") is None:
        notes.append("transformers is not installed, so there is no HF AR: pip install 'janus_ds[hf]'")
        return None
    base = replace(base, config=with_decode(base.config, {**request.decode, "mode": "ar"}))
    same_weights = base.config.objective.ar_stream == "content" and _OURS in systems
    lengths: dict[tuple[int, ...], int] | None = None
    if not same_weights:
        name = _OURS if _OURS in systems else list(systems)[-1]
        lengths = {tuple(source): systems[name](source) for source in sources}
    try:
        peer = hf_ar(base, folder, lengths, request.device)
    except CheckpointError as error:
        notes.append(f"there is no HF AR: {error.what}")
        return None
    version = importlib.metadata.version("transformers")
    if same_weights:
        notes.append(f"{_THEIRS}: generate of transformers {version} with the weights of {_OURS}")
    else:
        notes.append(
            f"{_THEIRS}: a BART of the same shape in transformers {version}, held to the lengths of "
            f"{name}'s outputs, since these weights were not trained for plain AR, which is all that it has"
        )
    return peer


def _conditions(request: EvalRequest, run: LoadedRun, plan: LatencyPlan, samples: int) -> dict[str, Any]:
    device = torch.device(request.device)
    decode = with_decode(run.config, request.decode).decode
    cuda = device.type == "cuda"
    return {
        "batch": 1,
        "samples": samples,
        "rounds": plan.rounds,
        "warm-up": min(plan.warm_up, samples),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, threads {torch.get_num_threads()}",
        "precision": "fp32",
        "beam": decode.beam,
        "length beam": decode.length_beam,
        "torch": torch.__version__,
    }


def hf_ar(
    run: LoadedRun,
    folder: Path,
    lengths: Mapping[tuple[int, ...], int] | None,
    device: torch.device | str,
) -> DecodeOne:
    """A run's model in transformers, decoding one source at a time with the run's search settings.

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
    model, special = model.to(device).eval(), run.special
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
