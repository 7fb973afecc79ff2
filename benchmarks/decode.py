"""`python -m benchmarks decode`: our two ways of decoding against each other and against peers.

All decode the same random sources with the same random weights in one process, in turns. Every output is
forced to one length (eos is kept out until then), so that all do the same work. Plain AR is BART's own
decoding, and its tokens must be those of transformers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    add_device_argument,
    check_device,
    circumstances,
    cpu_threads,
    device_clock,
    interleave,
    launches,
    positive,
    ratio_summary,
    summary,
    write_json,
)
from benchmarks.decode_peers import PEERS, Outputs, Peers, needed
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import DataConfig, DecodeConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.tables import table

if TYPE_CHECKING:
    from janus_ds.batch import SpecialTokens
    from janus_ds.decode.generator import Generator
    from janus_ds.model.janus import JanusModel

__all__ = ["SHAPES", "DecodeShape", "Request", "bench_decode", "main"]


@dataclass(frozen=True)
class DecodeShape:
    """A model and what it decodes; tokens without bos and eos."""

    model: dict[str, Any]
    vocab_size: int
    source_tokens: int
    output_tokens: tuple[int, ...]
    batch: int
    rounds: int


_TINY = {"d_model": 32, "heads": 2, "ffn_dim": 64, "encoder_layers": 1, "decoder_layers": 2}
SHAPES = {
    "tiny": DecodeShape({**MODEL_PRESETS["quickstart"], **_TINY}, 97, 12, (6,), 3, 2),
    # BART always has a norm behind its embeddings, and peers know no other model.
    "iwslt": DecodeShape({**MODEL_PRESETS["iwslt"], "layernorm_embedding": True}, 10152, 25, (25,), 32, 5),
    "bart_base": DecodeShape(dict(MODEL_PRESETS["bart_base"]), 50265, 398, (32, 64), 16, 3),
}
_RATIOS = {
    "transformers_over_ar": ("transformers", "ar fp32"),
    "ctranslate2_over_ar": ("ctranslate2 fp32", "ar fp32"),
    "ctranslate2_int8_over_ar_int8": ("ctranslate2 int8", "ar int8"),
    "transformers_over_janus": ("transformers", "janus fp32"),
    "ctranslate2_over_janus": ("ctranslate2 fp32", "janus fp32"),
    "ctranslate2_int8_over_janus_int8": ("ctranslate2 int8", "janus int8"),
    "janus_over_ar": ("janus fp32", "ar fp32"),
    "janus_over_ar_bf16": ("janus bf16", "ar bf16"),
    "janus_over_ar_int8": ("janus int8", "ar int8"),
    "ar_over_nar4": ("ar fp32", "nar 4, 1 length"),
    "ar_bf16_over_nar4_bf16": ("ar bf16", "nar 4, 1 length, bf16"),
    "ar_int8_over_nar4_int8": ("ar int8", "nar 4, 1 length, int8"),
    "janus_over_nar4_one_length": ("janus fp32", "nar 4, 1 length"),
    "janus_over_nar10_one_length": ("janus fp32", "nar 10, 1 length"),
    "janus_over_nar4_five_lengths": ("janus fp32", "nar 4, 5 lengths"),
    "janus_bf16_over_nar4_one_length_bf16": ("janus bf16", "nar 4, 1 length, bf16"),
}


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        shape: a key of :data:`SHAPES`.
        peers: of hf and ct2.
        batch: sentences at a time; 0: as the shape says. With more than one, sources are ragged (a
            quarter of the full length and upward) and twice as many.
        output_tokens: length of every output; 0: the shape's first.
        rounds: measurements of each job; 0: as the shape says.
        threads: CPU threads. With one, CPU time is taken, else time on the wall.
        only: parts of names of jobs; empty: all.
        device: cpu or cuda.
    """

    shape: str = "bart_base"
    peers: tuple[str, ...] = tuple(PEERS)
    batch: int = 1
    output_tokens: int = 0
    rounds: int = 0
    threads: int = 1
    only: tuple[str, ...] = field(default=())
    device: str = "cpu"


def main(arguments: Sequence[str]) -> int:
    """Measure one shape, print a table a case, write JSON if asked."""
    parser = new_parser("bench decode", "Decoding, against plain AR, transformers and CTranslate2.")
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="bart_base", help="model and lengths")
    add("--peers", default="hf,ct2", help="hf, ct2, both (default), or none")
    add("--batch", default="", help="sentences at a time, such as 1,16 (default: 1 and the shape's own)")
    add("--output-tokens", default="", help="lengths of the outputs (default: by shape)")
    add("--rounds", type=positive, default=0, help="measurements of each job (default: by shape)")
    add("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    add("--only", default="", help="jobs whose names hold one of these, such as ar,janus,transformers")
    add_device_argument(parser)
    add("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    setting = SHAPES[parsed.shape]
    peers = () if parsed.peers == "none" else tuple(_words(parsed.peers))
    for name in peers:
        needed(name)
    only = tuple(_words(parsed.only))
    cases = []
    for batch in _numbers(parsed.batch, "--batch") or (1, setting.batch):
        for tokens in _numbers(parsed.output_tokens, "--output-tokens") or setting.output_tokens:
            request = Request(
                parsed.shape, peers, batch, tokens, parsed.rounds, parsed.threads, only, parsed.device
            )  # fmt: skip
            cases.append(bench_decode(request))
            print(_describe(cases[-1]), flush=True)
    if parsed.json is not None:
        write_json(parsed.json, _together(cases))
    return 0


def bench_decode(request: Request) -> dict[str, Any]:
    """Measure one batch size and one output length in interleaved rounds.

    Returns:
        `ratios` and `milliseconds` a sentence with median, min and max, how many outputs of each job
        have plain AR's tokens, the shape, hardware and versions.

    Raises:
        CheckpointError: plain AR gives other tokens than transformers, or an output of another length.
    """
    check_device(request.device)
    setting = SHAPES[request.shape]
    tokens = request.output_tokens or setting.output_tokens[0]
    sources = _sources(setting, request.batch)
    with tempfile.TemporaryDirectory() as folder, cpu_threads(request.threads):
        jobs = _jobs(request, tokens, sources, Path(folder))
        outputs = {name: job() for name, job in jobs.items()}
        equal = _compare(outputs, tokens)
        clock_name, clock = device_clock(request.device, request.threads)
        seconds = interleave(jobs, request.rounds or setting.rounds, clock)
        on_device = {name: launches(job) for name, job in jobs.items()} if request.device == "cuda" else {}
    pairs = {name: pair for name, pair in _RATIOS.items() if set(pair) <= set(seconds)}
    return {
        "bench": "decode",
        "shape": {"name": request.shape, **asdict(setting)},
        "batch": request.batch,
        "sentences": len(sources),
        "output_tokens": tokens,
        "rounds": request.rounds or setting.rounds,
        "ratios": {name: ratio_summary(seconds[a], seconds[b]) for name, (a, b) in pairs.items()},
        "milliseconds": {
            name: summary([1e3 * s / len(sources) for s in taken]) for name, taken in seconds.items()
        },
        "outputs_equal_to_ar": equal,
        "launches": on_device,
        "clock": clock_name,
        "device": request.device,
        "threads": request.threads,
        **circumstances(),
    }


def _jobs(
    request: Request, tokens: int, sources: list[list[int]], folder: Path
) -> dict[str, Callable[[], Outputs]]:
    """Everything that is measured, by name."""
    from janus_ds.model.inference import InferenceOptions

    setting = SHAPES[request.shape]
    model = _random_model(setting, tokens)
    plain, janus = (_run(model, name, tokens) for name in ("ar", "paper"))
    jobs: dict[str, Callable[[], Outputs]] = {}

    def wanted(name: str) -> bool:
        return not request.only or any(part in name for part in request.only)

    on_gpu = request.device == "cuda"
    peers = Peers(model, plain, folder, request.threads, request.device) if request.peers else None
    if peers and "hf" in request.peers:
        for name, precision in {"transformers": "float32", "transformers bf16": "bfloat16"}.items():
            if wanted(name) and (on_gpu or precision == "float32"):
                jobs[name] = peers.transformers(sources, request.batch, precision)
    for kind in ("fp32", "int8"):
        name = f"ctranslate2 {kind}"
        if peers and "ct2" in request.peers and wanted(name):
            jobs[name] = peers.ctranslate2(sources, request.batch, "float32" if kind == "fp32" else kind)
    for kind in ("fp32", "bf16") if on_gpu else ("fp32", "bf16", "int8"):
        options = InferenceOptions("bf16" if kind == "bf16" else "fp32", int8=kind == "int8")
        own = {
            f"ar {kind}": replace_decode(plain, mode="ar"),
            f"janus {kind}": replace_decode(janus, mode="ar"),
        }
        own |= _parallel_jobs(janus, "" if kind == "fp32" else f", {kind}", kind == "int8")
        chosen = {name: run for name, run in own.items() if wanted(name)}
        prepared = _prepared(model, options, request.device) if chosen else model
        jobs |= {name: _job(prepared, run, sources, request.batch) for name, run in chosen.items()}
    return jobs


def _parallel_jobs(run: RunConfig, suffix: str, few: bool) -> dict[str, RunConfig]:
    """NAR with one and with five lengths."""
    jobs = {}
    for iterations in (4,) if few else (0, 1, 4, 10):
        for lengths in (1, 5):
            name = f"nar {iterations}, {lengths} length{'s' if lengths > 1 else ''}{suffix}"
            jobs[name] = replace_decode(run, mode="nar", iterations=iterations, length_beam=lengths)
    return jobs


def replace_decode(run: RunConfig, **changes: Any) -> RunConfig:
    """The run with other decoding options."""
    return replace(run, decode=replace(run.decode, **changes))


def _run(model: JanusModel, preset: str, tokens: int) -> RunConfig:
    return RunConfig(
        model=model.config,
        data=DataConfig(task="pair"),
        objective=ObjectiveConfig(preset=preset, decoder_start="eos_bos"),
        decode=DecodeConfig(mode="ar", beam=5, max_length=tokens, beam_stop="transformers"),
    )


def _prepared(model: JanusModel, options: Any, device: str) -> JanusModel:
    from janus_ds.model.inference import prepare_for_inference

    return prepare_for_inference(copy.deepcopy(model).to(device), options)


def _job(model: JanusModel, run: RunConfig, sources: list[list[int]], batch: int) -> Callable[[], Outputs]:
    generator = _forced(model, run, batch)
    return lambda: [candidates[0].tokens for candidates in generator.generate_ids(sources)]


def _forced(model: JanusModel, run: RunConfig, batch: int) -> Generator:
    """A generator whose AR outputs all have the longest length that is allowed."""
    from janus_ds.decode.beam_search import SearchSettings
    from janus_ds.decode.generator import Generator

    class ForcedLength(Generator):
        def _search_settings(self) -> SearchSettings:
            settings = super()._search_settings()
            # The last step forces eos all the same.
            return replace(settings, forbidden=(*settings.forbidden, settings.eos))

    return ForcedLength(model, None, model.special, run, batch_sentences=batch)


def _random_model(setting: DecodeShape, tokens: int) -> JanusModel:
    """Weights under which outputs are no repetition of one token, and a length head sure of its length."""
    import torch

    from janus_ds.model.janus import JanusModel
    from janus_ds.parallel.layers import DenseLayers

    torch.manual_seed(1)
    model = JanusModel(ModelConfig(**setting.model), _special(setting), DenseLayers()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "positions" in name:
                weight.normal_(0.0, 1.0)
            elif "layers" in name and weight.dim() == 2:
                weight.normal_(0.0, 0.7 / weight.shape[1] ** 0.5)
            elif name.startswith("embedding"):
                weight.normal_(0.0, 3.0 / weight.shape[1] ** 0.5)
    classes = len(model.length_head.weight)
    logits_K = -(torch.arange(classes) - tokens - 0.1).abs().float()

    class KnownLength(torch.nn.Module):
        def forward(self, states_BSD: torch.Tensor, valid_BS: torch.Tensor) -> torch.Tensor:
            return logits_K.to(states_BSD.device).expand(len(states_BSD), -1)

    model.length_head = KnownLength()  # type: ignore[assignment]
    return model.requires_grad_(False)


def _special(setting: DecodeShape) -> SpecialTokens:
    from janus_ds.batch import SpecialTokens

    return SpecialTokens(0, 1, 2, 3, setting.vocab_size - 1, setting.vocab_size)


def _sources(setting: DecodeShape, batch: int) -> list[list[int]]:
    import numpy as np

    draw = np.random.default_rng(1)
    full = setting.source_tokens
    lengths = [full] if batch == 1 else sorted(draw.integers(full // 4, full + 1, 2 * batch), reverse=True)
    return [draw.integers(4, setting.vocab_size - 1, int(length)).tolist() for length in lengths]


def _compare(outputs: dict[str, Outputs], tokens: int) -> dict[str, str]:
    """How many outputs of each AR job are those of plain AR in fp32."""
    for name, found in outputs.items():
        if not name.startswith("nar") and any(len(output) != tokens for output in found):
            raise CheckpointError(
                f"{name} gave outputs of {sorted({len(output) for output in found})} tokens, not {tokens}",
                "bench decode", "report it: the measured work is not equal",
            )  # fmt: skip
    ours = outputs.get("ar fp32")
    if ours is None:
        return {}
    if outputs.get("transformers", ours) != ours:
        same = sum(a == b for a, b in zip(outputs["transformers"], ours, strict=True))
        raise CheckpointError(
            f"plain AR gives transformers' tokens for {same} of {len(ours)} sentences only",
            "bench decode", "report it: the two must be equal",
        )  # fmt: skip
    return {
        name: f"{sum(a == b for a, b in zip(found, ours, strict=True))} of {len(ours)}"
        for name, found in outputs.items()
        if not name.startswith(("nar", "janus"))
    }


def _together(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """All cases in one result; a ratio's name says its case, without which it is the first one's."""
    ratios = dict(cases[0]["ratios"])
    ratios |= {
        f"{name}_b{case['batch']}_t{case['output_tokens']}": value
        for case in cases
        for name, value in case["ratios"].items()
    }
    shared = ("bench", "shape", "clock", "device", "threads", "hardware", "versions")
    own = [{name: value for name, value in case.items() if name not in shared} for case in cases]
    return {**{name: cases[0][name] for name in shared}, "ratios": ratios, "cases": own}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    if not all(word.isdigit() and int(word) for word in _words(text)):
        raise UsageError(f"{text!r} is not a list of numbers", option, "give numbers above 0, such as 1,16")
    return tuple(int(word) for word in _words(text))


def _describe(case: dict[str, Any]) -> str:
    head = (
        f"{case['shape']['name']}: batch {case['batch']}, {case['sentences']} sources of up to "
        f"{case['shape']['source_tokens']} tokens, {case['output_tokens']} output tokens; "
        f"{case['device']}, {case['threads']} thread(s), {case['clock']} time, {case['rounds']} rounds"
    )
    equal = case["outputs_equal_to_ar"]
    rows: list[tuple[str, ...]] = [("job", "ms/sentence", "min", "max", "tokens of plain AR")]
    for name, ms in case["milliseconds"].items():
        rows.append((name, *(f"{ms[k]:.1f}" for k in ("median", "min", "max")), equal.get(name, "")))
    rows.append(("ratio", "median", "min", "max", ""))
    for name, ratio in case["ratios"].items():
        rows.append((name, *(f"{ratio[k]:.2f}" for k in ("median", "min", "max")), ""))
    for name, calls in case["launches"].items():
        rows.append((f"{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in calls.items()), "", "", "", ""))
    return f"{head}\n{table(rows)}\n"
