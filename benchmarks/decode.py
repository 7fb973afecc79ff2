"""`python -m benchmarks decode`: our two ways of decoding against each other and against peers.

All decode the same random sources with the same random weights in one process, in turns. Every output is
forced to one length (eos is forbidden until then), so that all do the same work. Plain AR is BART's own
decoding, and its tokens must equal those of transformers.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import cells, choices, cpu_threads, measure, positives
from benchmarks.decode_peers import PEERS, Outputs, Peers, needed
from janus_ds.batch import SpecialTokens
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import DataConfig, DecodeConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import InferenceOptions, prepare_for_inference
from janus_ds.decode.search_settings import SearchSettings
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.progress import table


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
    "ar_over_ar_bf16": ("ar fp32", "ar bf16"),
    "nar4_over_nar4_bf16": ("nar 4, 1 length", "nar 4, 1 length, bf16"),
    "ar_over_nar4": ("ar fp32", "nar 4, 1 length"),
    "ar_bf16_over_nar4_bf16": ("ar bf16", "nar 4, 1 length, bf16"),
    "ar_int8_over_nar4_int8": ("ar int8", "nar 4, 1 length, int8"),
    "janus_over_nar4_one_length": ("janus fp32", "nar 4, 1 length"),
    "janus_over_nar10_one_length": ("janus fp32", "nar 10, 1 length"),
    "janus_over_nar4_five_lengths": ("janus fp32", "nar 4, 5 lengths"),
    "janus_bf16_over_nar4_one_length_bf16": ("janus bf16", "nar 4, 1 length, bf16"),
}


SHARED, ROUNDS = ("device", "threads"), None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="bart_base", help="model and lengths")
    add(
        "--peers",
        type=choices([*PEERS, "none"]),
        default=tuple(PEERS),
        help="hf, ct2, both (default), or none",
    )
    add("--batch", type=positives, help="sentences at a time: 1,16 (default: 1 and the shape's)")
    add("--output-tokens", type=positives, help="lengths of the outputs (default: by shape)")
    only = "jobs whose names contain one of these: ar,janus,transformers"
    add("--only", type=lambda text: tuple(map(str.strip, text.split(","))), default=(), help=only)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases of a shape, and print each when it is done.

    Returns:
        All cases in one result; a ratio's name says its case, without which it is the first one's.

    Raises:
        MissingDependencyError: a peer is not installed.
        CheckpointError: plain AR gives other tokens than transformers, or an output of another length.
    """
    shape = SHAPES[options.shape]
    options.peers = tuple(name for name in options.peers if name != "none")
    for name in options.peers:
        needed(name)
    cases: list[dict[str, Any]] = []
    for batch in options.batch or (1, shape.batch):
        for tokens in options.output_tokens or shape.output_tokens:
            cases.append(bench_case(options, batch, tokens))
            print(_describe(cases[-1]), flush=True)
    ratios = dict(cases[0]["ratios"])
    ratios |= {
        f"{name}_b{case['batch']}_t{case['output_tokens']}": value
        for case in cases
        for name, value in case["ratios"].items()
    }
    shared = ("bench", "shape", "clock", "device", "threads", "hardware", "versions")
    own = [{name: value for name, value in case.items() if name not in shared} for case in cases]
    return {**{name: cases[0][name] for name in shared}, "ratios": ratios, "cases": own}


def describe(result: dict[str, Any]) -> str:
    """Nothing: each case was printed when it was done."""
    return ""


def bench_case(options: argparse.Namespace, batch: int, tokens: int) -> dict[str, Any]:
    """Measure one batch size and one output length in interleaved rounds.

    With more than one sentence at a time, sources are ragged (a quarter of the full length and upward) and
    twice as many.

    Returns:
        `ratios` and `milliseconds` a sentence with median, min and max, how many outputs of each job
        have plain AR's tokens, the shape, hardware and versions.
    """
    shape = SHAPES[options.shape]
    rounds, sources = options.rounds or shape.rounds, _sources(shape, batch)
    with tempfile.TemporaryDirectory() as folder, cpu_threads(options.threads):
        model = _random_model(shape, tokens)
        jobs = _peer_jobs(options, model, sources, batch, Path(folder))
        jobs |= _own_jobs(options, model, sources, batch)
        if not jobs:
            raise UsageError(
                f"no job's name contains {' or '.join(options.only)}",
                "--only",
                "give parts of such names as ar fp32, janus bf16, nar 4, transformers",
            )
        equal = _compare({name: job() for name, job in jobs.items()}, tokens)
        measured = measure(jobs, rounds, options, _RATIOS, len(sources))
    del measured["precision"]
    return {
        "bench": "decode",
        "shape": {"name": options.shape, **asdict(shape)},
        "batch": batch,
        "sentences": len(sources),
        "output_tokens": tokens,
        "rounds": rounds,
        "outputs_equal_to_ar": equal,
        **measured,
    }


def _wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.only or any(part in name for part in options.only)


def _peer_jobs(
    options: argparse.Namespace, model: JanusModel, sources: list[list[int]], batch: int, folder: Path
) -> dict[str, Callable[[], Outputs]]:
    jobs: dict[str, Callable[[], Outputs]] = {}
    if not options.peers:
        return jobs
    peers = Peers(model, _run(model, "ar", "ar"), folder, options.threads, options.device)
    precisions = {"transformers": "float32", "transformers bf16": "bfloat16"}
    for name, precision in precisions.items():
        on_device = options.device == "cuda" or precision == "float32"
        if "hf" in options.peers and on_device and _wanted(options, name):
            jobs[name] = peers.transformers(sources, batch, precision)
    for name, kind in {"ctranslate2 fp32": "float32", "ctranslate2 int8": "int8"}.items():
        if "ct2" in options.peers and _wanted(options, name):
            jobs[name] = peers.ctranslate2(sources, batch, kind)
    return jobs


def _own_jobs(
    options: argparse.Namespace, model: JanusModel, sources: list[list[int]], batch: int
) -> dict[str, Callable[[], Outputs]]:
    """Plain AR, JANUS's AR, and NAR with one and with five lengths, in each precision."""
    jobs: dict[str, Callable[[], Outputs]] = {}
    for kind in ("fp32", "bf16") if options.device == "cuda" else ("fp32", "bf16", "int8"):
        runs = {f"ar {kind}": _run(model, "ar", "ar"), f"janus {kind}": _run(model, "paper", "ar")}
        for iterations in (4,) if kind == "int8" else (0, 1, 4, 10):
            for lengths, word in ((1, "1 length"), (5, "5 lengths")):
                name = f"nar {iterations}, {word}" + ("" if kind == "fp32" else f", {kind}")
                runs[name] = _run(model, "paper", "nar", iterations=iterations, length_beam=lengths)
        chosen = {name: run for name, run in runs.items() if _wanted(options, name)}
        if chosen:
            settings = InferenceOptions("bf16" if kind == "bf16" else "fp32", int8=kind == "int8")
            prepared = prepare_for_inference(copy.deepcopy(model).to(options.device), settings)
            jobs |= {name: _job(prepared, run, sources, batch) for name, run in chosen.items()}
    return jobs


def _run(model: JanusModel, preset: str, mode: str, **decode: Any) -> RunConfig:
    """A run of the model; every AR output has the length that its length head is sure of."""
    return RunConfig(
        model=model.config,
        data=DataConfig(task="pair"),
        objective=ObjectiveConfig(preset=preset, decoder_start="eos_bos"),
        decode=DecodeConfig(mode=mode, beam=5, max_length=_tokens(model), beam_stop="transformers", **decode),
    )


def _job(model: JanusModel, run: RunConfig, sources: list[list[int]], batch: int) -> Callable[[], Outputs]:
    class ForcedLength(Generator):
        """A generator whose AR outputs all have the longest length that is allowed."""

        def _search_settings(self) -> SearchSettings:
            settings = super()._search_settings()
            # The last step forces eos all the same.
            return replace(settings, forbidden=(*settings.forbidden, settings.eos))

    generator = ForcedLength(model, None, run, batch_sentences=batch)
    return lambda: [candidates[0].tokens for candidates in generator.generate_ids(sources)]


class _KnownLength(torch.nn.Module):
    """A length head that is sure of one length."""

    def __init__(self, classes: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.logits_K = -(torch.arange(classes) - tokens - 0.1).abs().float()

    def forward(self, states_BSD: torch.Tensor, valid_BS: torch.Tensor) -> torch.Tensor:
        return self.logits_K.to(states_BSD.device).expand(len(states_BSD), -1)


def _tokens(model: JanusModel) -> int:
    head: Any = model.length_head
    return int(head.tokens)


def _random_model(shape: DecodeShape, tokens: int) -> JanusModel:
    """Weights under which outputs do not repeat one token, and a length head sure of `tokens`."""
    torch.manual_seed(1)
    special = SpecialTokens(0, 1, 2, 3, shape.vocab_size - 1, shape.vocab_size)
    model = JanusModel(ModelConfig(**shape.model), special, ParallelLayers()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "positions" in name:
                weight.normal_(0.0, 1.0)
            elif "layers" in name and weight.dim() == 2:
                weight.normal_(0.0, 0.7 / weight.shape[1] ** 0.5)
            elif name.startswith("embedding"):
                weight.normal_(0.0, 3.0 / weight.shape[1] ** 0.5)
    model.length_head = _KnownLength(len(model.length_head.weight), tokens)  # type: ignore[assignment]
    return model.requires_grad_(False)


def _sources(shape: DecodeShape, batch: int) -> list[list[int]]:
    draw, full = np.random.default_rng(1), shape.source_tokens
    lengths = [full] if batch == 1 else sorted(draw.integers(full // 4, full + 1, 2 * batch), reverse=True)
    return [draw.integers(4, shape.vocab_size - 1, int(length)).tolist() for length in lengths]


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


def _describe(case: dict[str, Any]) -> str:
    head = (
        f"{case['shape']['name']}: batch {case['batch']}, {case['sentences']} sources of up to "
        f"{case['shape']['source_tokens']} tokens, {case['output_tokens']} output tokens; "
        f"{case['device']}, {case['threads']} thread(s), {case['clock']} time, {case['rounds']} rounds"
    )
    rows: list[tuple[str, ...]] = [("job", "ms/sentence", "min", "max", "tokens of plain AR")]
    for name, ms in case["milliseconds"].items():
        rows.append((name, *cells(ms), case["outputs_equal_to_ar"].get(name, "")))
    rows.append(("ratio", "median", "min", "max", ""))
    rows += [(name, *cells(ratio, 2), "") for name, ratio in case["ratios"].items()]
    for name, calls in case["launches"].items():
        rows.append((f"{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in calls.items()), "", "", "", ""))
    return f"{head}\n{table(rows)}\n"
