"""`janus-ds plan`: what a run needs and how long it is, before anything is started."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from janus_ds.batch import RowLayout
from janus_ds.cli.arguments import new_parser, recipe_path
from janus_ds.cli.traffic import (
    SHARDED,
    BatchShape,
    Execution,
    agreements,
    rank_parameters,
    tensor_traffic,
    wire_bytes,
    zero_traffic,
)
from janus_ds.config.deepspeed_file import solve_batch
from janus_ds.config.load import add_recipe_arguments, load_run_config
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.data.masking.span_laws import expected_share
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.errors import ConfigError, UsageError
from janus_ds.model.weights import parameter_shapes
from janus_ds.observe.progress import bytes_text, count_text, table

_TENSOR_SIZES = (1, 2, 4)
_PARTS = {
    "embedding": "token embedding (tied)",
    "encoder.positions": "positions",
    "encoder.embedding_norm": "positions",
    "decoder.positions": "positions",
    "decoder.embedding_norm": "positions",
    "encoder.layers": "encoder layers",
    "decoder.layers": "decoder layers",
    "length_head": "length head",
}
"""Parts of a model by the start of a parameter's name."""
_ASSUMED_VOCABULARY = {"quickstart": 2000}
_BART_VOCABULARY = 50265


def main(arguments: Sequence[str]) -> int:
    """Print parameters, memory, checkpoint size, messages and length of a run."""
    parsed = _parser().parse_args(arguments)
    recipe = recipe_path(parsed.recipe)
    run = load_run_config(recipe, [*parsed.overrides, *([f"data.path={parsed.data}"] if parsed.data else [])])
    manifest = _manifest(run.data.path, run) if run.data.path else None
    vocab_size, origin = _vocabulary(run, parsed.vocab, manifest)
    execution = _execution(parsed, run)
    parts = model_parts(run.model, vocab_size)
    print(f"run {run.name} ({recipe})")
    print(f"objective {run.objective.preset}\n")
    print(describe_model(parts, vocab_size, origin))
    print()
    print(describe_memory(parts, run.train.keep_last, parsed.ranks))
    print()
    print(describe_communication(run, vocab_size, execution, manifest))
    print()
    print(describe_length(run, manifest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("plan", "Parameters, memory, checkpoint size, messages and length of a run.")
    add_recipe_arguments(parser)
    parser.add_argument("--data", help="directory made by `janus-ds prepare`; or as data.path")
    parser.add_argument("--vocab", type=int, help="vocabulary size, where there is no data yet")
    parser.add_argument("--ranks", type=int, default=8, help="processes of the run (default: 8)")
    add = parser.add_argument
    add("--tensor-parallel", type=int, default=1, help="ranks that share a model (default: 1)")
    add("--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="(default: bf16)")
    return parser


def _execution(parsed: argparse.Namespace, run: RunConfig) -> Execution:
    ranks, tensor = parsed.ranks, parsed.tensor_parallel
    if ranks < 1:
        raise UsageError(f"there cannot be {ranks} ranks", "--ranks", "give a number above 0")
    if tensor < 1 or ranks % tensor:
        what = f"groups of {tensor} do not fit {ranks} ranks"
        raise UsageError(what, "--tensor-parallel", "give a size that divides the ranks")
    return Execution(
        precision=parsed.precision,
        data_size=ranks // tensor,
        tensor_size=tensor,
        recompute=run.train.activation_checkpointing,
    )


def _manifest(location: str, run: RunConfig) -> Manifest:
    """The manifest of the data; of several sources, with the sums of their splits."""
    place = open_data(location, run.data)
    splits = dict(place.manifest.splits)
    for name, first in splits.items():
        parts = [s.manifest.splits[name] for s in place.sources if name in s.manifest.splits]
        splits[name] = SplitTotals(
            shards=sum(part.shards for part in parts),
            samples=sum(part.samples for part in parts),
            tokens=sum(part.tokens for part in parts),
            index_sha256=first.index_sha256,
        )
    return replace(place.manifest, splits=splits)


def _vocabulary(run: RunConfig, given: int | None, manifest: Manifest | None) -> tuple[int, str]:
    if given is not None:
        if given < 1:
            raise UsageError(f"a vocabulary cannot have {given} symbols", "--vocab", "give a number above 0")
        return given, "--vocab"
    if manifest is not None:
        return manifest.vocab_size, "the data's manifest"
    assumed = _ASSUMED_VOCABULARY.get(run.model.preset or "", _BART_VOCABULARY)
    return assumed, "assumed; give --data or --vocab"


def describe_model(parts: list[PartSize], vocab_size: int, origin: str) -> str:
    """Parameters by part."""
    total = sum(part.total for part in parts)
    rows = [("parameters", "", "share")]
    rows += [(f"  {part.name}", f"{part.total:,}", f"{part.total / total:.1%}") for part in parts]
    rows.append(("  all", f"{total:,}", ""))
    return f"{table(rows)}\n  vocabulary {vocab_size:,} ({origin})"


def describe_memory(parts: list[PartSize], keep_last: int, ranks: int) -> str:
    """Memory of one rank by precision, tensor-parallel size and ZeRO stage; size of checkpoints."""
    lines = [f"memory a rank for weights, gradients and AdamW states, on {ranks} ranks"]
    head = ("  precision", "TP", "ranks on data", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
    rows: list[tuple[str, ...]] = [head]
    total = sum(part.total for part in parts)
    for precision in ("fp32", "bf16", "fp16"):
        for tensor_size in (size for size in _TENSOR_SIZES if ranks % size == 0):
            own = sum(part.on_rank(tensor_size) for part in parts)
            data_size = ranks // tensor_size
            sizes = [state_bytes(own, stage, precision, data_size) for stage in range(4)]
            cells = ["refused" if size is None else bytes_text(size) for size in sizes]
            rows.append((f"  {precision}", str(tensor_size), str(data_size), *cells))
    lines.append(table(rows))
    lines.append(
        "  Activations, communication buckets and the device's own needs come on top. 16 bit with ZeRO 0 is\n"
        "  refused: see ds_configs/README.md.\n"
        f"checkpoint: {bytes_text(checkpoint_bytes(total))} whatever the ranks, stage and precision;\n"
        f"  {keep_last} (train.keep_last) and the one being written lie on disk. As much host memory\n"
        "  is taken on the first rank's machine while one is written."
    )
    return "\n".join(lines)


def describe_communication(
    run: RunConfig, vocab_size: int, execution: Execution, manifest: Manifest | None
) -> str:
    """Bytes that one rank sends in one step, by kind, in every ZeRO stage."""
    ranks = execution.data_size * execution.tensor_size
    place = f"{ranks} ranks, TP {execution.tensor_size}, {execution.precision}"
    head = f"messages of one rank in one step ({place})"
    try:
        samples, accumulation = solve_batch(run, execution.data_size)
    except ConfigError:
        return f"{head}: the global batch cannot be shared by {execution.data_size} data-parallel ranks"
    length, origin = _mean_length(run, manifest)
    shape = _batch_shape(run, length, samples, execution.data_size * accumulation)
    parameters = rank_parameters(run.model, vocab_size, execution.tensor_size)
    kinds: dict[str, list[str]] = {}
    wires = []
    for stage in range(4):
        if stage == 0 and execution.precision != "fp32":
            wires.append("refused")
            continue
        staged = replace(execution, micro_batches=accumulation, stage=stage)
        sents = [
            *zero_traffic(parameters, staged),
            *tensor_traffic(run.model, vocab_size, run.objective, [shape] * accumulation, staged),
            *agreements(run.objective, staged),
        ]
        for sent in sents:
            row = kinds.setdefault(f"  {sent.what} ({sent.operation}, {sent.group})", ["-"] * 4)
            row[stage] = f"{bytes_text(sent.bytes)} in {sent.calls}"
        wires.append(bytes_text(sum(wire_bytes(sent, staged) for sent in sents)))
    rows = [("  kind", *(f"ZeRO {stage}" for stage in range(4)), "")]
    rows += [(kind, *cells, "projected") for kind, cells in kinds.items()]
    rows.append(("  over the wire from one rank, by rings", *wires, "projected"))
    return "\n".join(
        [
            head,
            f"  {accumulation} micro-batches of {shape.samples} samples, {length} source and "
            f"{length} target tokens ({origin})",
            table(rows),
            "  A message is as large as the whole tensor. ZeRO 3 sends more in the first two steps.",
        ]
    )


def _mean_length(run: RunConfig, manifest: Manifest | None) -> tuple[int, str]:
    """Tokens of a side of a sample, bos and eos included, and where the number comes from."""
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        return run.data.block_tokens + 2, "full blocks; give --data to know the data's mean"
    sides = 2 if run.data.task == "pair" else 1
    return round(totals.tokens / totals.samples / sides) + 2, "the data's mean"


def _batch_shape(run: RunConfig, length: int, samples: int, parts: int) -> BatchShape:
    """A micro-batch of samples with this many tokens on each side; of token batches, one of `parts`."""
    streams = run.objective.streams
    ar = length - 1 if "ar" in streams else 0
    masked = round(expected_share(run.masking) * (length - 2)) if {"nar", "aux"} & set(streams) else 0
    aux = masked if "aux" in streams else 0
    layout = RowLayout(
        arc=ar,
        vis=length - masked if masked else 0,
        cmp=aux,
        msk=masked,
        arq=ar if run.objective.ar_stream == "query" else 0,
        qry=aux,
    )
    if run.data.batch == "tokens":
        samples = max(1, round(run.train.batch_tokens / length / parts))
    samples *= run.objective.dropout_draws
    return BatchShape(samples, length, layout, masked * samples, max(ar - masked, 0) * samples)


def describe_length(run: RunConfig, manifest: Manifest | None) -> str:
    """Steps, samples, target tokens and epochs of a run."""
    if run.data.batch == "tokens":
        return _token_length(run, manifest)
    samples = run.train.max_steps * run.train.global_batch
    lines = ["length of the run", f"  {run.train.max_steps:,} steps x {run.train.global_batch:,} samples"]
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        most = samples * run.data.block_tokens
        lines.append(f"  = {count_text(samples)} samples, at most {count_text(most)} target tokens")
        lines.append("  epochs: give --data to know the size of the data")
        return "\n".join(lines)
    mean = totals.tokens / totals.samples
    what = "target tokens" if run.data.task == "denoise" else "source and target tokens"
    lines.append(f"  = {count_text(samples)} samples, {count_text(samples * mean)} {what}")
    there = f"{count_text(totals.samples)} samples, {count_text(totals.tokens)} tokens"
    lines.append(f"  data: {there}, {mean:.0f} a sample")
    lines.append(f"  = {samples / totals.samples:.2f} epochs")
    return "\n".join(lines)


def _token_length(run: RunConfig, manifest: Manifest | None) -> str:
    """The same with batches of tokens, whose number of samples is not known before the data is read."""
    train = run.train
    most = f"{train.batch_tokens:,} tokens of the longer side"
    lines = ["length of the run", f"  {train.max_steps:,} steps x up to {most}"]
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        return "\n".join([*lines, "  epochs: give --data to know the size of the data"])
    mean = totals.tokens / totals.samples / (2 if run.data.task == "pair" else 1) + 2
    lines.append(f"  data: {count_text(totals.samples)} samples, {mean:.0f} tokens a side with bos and eos")
    epochs = train.max_steps * train.batch_tokens / mean / totals.samples
    return "\n".join([*lines, f"  = about {epochs:.1f} epochs, fewer by what is padding"])


_MASTER_BYTES, _ADAM_BYTES = 4, 8


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part: those that tensor parallelism shards, and those on every rank."""

    name: str
    sharded: int
    replicated: int

    @property
    def total(self) -> int:
        """Parameters of the part in the whole model."""
        return self.sharded + self.replicated

    def on_rank(self, tensor_size: int) -> int:
        """Parameters of the part on one tensor-parallel rank."""
        return self.sharded // tensor_size + self.replicated


def model_parts(config: ModelConfig, vocab_size: int) -> list[PartSize]:
    """The parts of a model with their numbers of parameters."""
    sizes = {part: [0, 0] for part in _PARTS.values()}
    for name, shape in parameter_shapes(config, vocab_size).items():
        part = next(_PARTS[start] for start in _PARTS if name.startswith(start))
        sizes[part][not name.endswith(SHARDED)] += math.prod(shape)
    return [PartSize(part, sharded, replicated) for part, (sharded, replicated) in sizes.items()]


def state_bytes(parameters: int, stage: int, precision: str, data_size: int) -> float | None:
    """Bytes of weights, gradients and AdamW states on one rank; None where it is not supported.

    DeepSpeed keeps an fp32 copy of the weights beside Adam's two moments from stage 1 on, in fp32
    as well. Stage 1 shares out these 12 bytes a parameter, stage 2 gradients too, stage 3 weights too.
    """
    weight = 4 if precision == "fp32" else 2
    if stage == 0:
        return parameters * (2 * weight + _ADAM_BYTES) if precision == "fp32" else None
    states = _MASTER_BYTES + _ADAM_BYTES
    shared = {1: states, 2: states + weight, 3: states + 2 * weight}[stage]
    whole = 2 * weight + states - shared
    return parameters * (whole + shared / data_size)


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint on any ranks, in any stage and precision: weights and moments in fp32."""
    return parameters * (_MASTER_BYTES + _ADAM_BYTES)
