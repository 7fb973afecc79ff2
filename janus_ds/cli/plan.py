"""`janus-ds plan`: what a run needs and how long it is, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from janus_ds.batch import RowLayout
from janus_ds.checkpoint.tensors import snapshot_bytes
from janus_ds.cli.arguments import (
    add_ranks_arguments,
    add_recipe_arguments,
    at_least,
    data_ranks,
    given_overrides,
    new_parser,
    not_empty,
)
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
from janus_ds.config.deepspeed import check_shares
from janus_ds.config.deepspeed_file import solve_batch
from janus_ds.config.fields import FaultList
from janus_ds.config.load import read_run_config
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.data.masking.span_laws import expected_share
from janus_ds.data.stream.open_dataset import DataPlace, check_task, open_data
from janus_ds.errors import ConfigError
from janus_ds.model.weights import parameter_shapes
from janus_ds.progress import bytes_text, count_text, table

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

_Parts = Mapping[str, tuple[int, int]]
"""Parameters of each part of a model: those that tensor parallelism shards, and those on every rank."""


class _SourceSize(NamedTuple):
    """Training data of one source, and its share of the samples of a batch."""

    name: str
    share: float
    samples: int
    tokens: int


_Sizes = Sequence[_SourceSize]
"""All sources; none where they are not known or hold no sample."""


def main(arguments: Sequence[str]) -> int:
    """Print parameters, memory, checkpoint size, messages and length of a run."""
    parser = new_parser("plan", "Parameters, memory, checkpoint size, messages and length of a run.")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--data", type=not_empty, help="directory made by `janus-ds prepare`; or as data.path"
    )
    parser.add_argument("--vocab", type=at_least(1), help="vocabulary size, where there is no data yet")
    add_ranks_arguments(parser, 8)
    parser.add_argument(
        "--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="of messages (default: bf16)"
    )
    parsed = parser.parse_args(arguments)
    faults = FaultList()
    run = read_run_config(parsed.recipe, given_overrides(parsed), faults, parsed.mode)
    tensor_size, data_size = parsed.tensor_parallel, data_ranks(parsed)
    check_shares(run.model, tensor_size, faults)
    faults.raise_if_any()
    assumed = _ASSUMED_VOCABULARY.get(run.model.preset or "", _BART_VOCABULARY)
    vocab_size, origin = assumed, "assumed; give --data or --vocab"
    sources: _Sizes = ()
    if run.data.path:
        place = open_data(run.data.path, run.data)
        check_task(place.manifest.task, run.data.task, place.sources[0].name)
        sources = _sizes(place)
        vocab_size, origin = place.manifest.vocab_size, "the data's manifest"
    if parsed.vocab is not None:
        vocab_size, origin = parsed.vocab, "--vocab"
    execution = Execution(
        precision=parsed.precision,
        data_size=data_size,
        tensor_size=tensor_size,
        recompute=run.train.activation_checkpointing,
    )
    sizes = model_parts(run.model, vocab_size)
    print(f"run {run.name} ({parsed.recipe})\nobjective {run.objective.preset}\n")
    print(f"{_model_table(sizes)}\n  vocabulary {vocab_size:,} ({origin})\n")
    print(_memory(sizes, run, parsed.ranks, tensor_size) + "\n")
    print(_communication(run, vocab_size, execution, sources) + "\n")
    print("\n".join(_length(run, sources)))
    return 0


def _sizes(place: DataPlace) -> _Sizes:
    found = [(source, source.manifest.splits.get("train")) for source in place.sources]
    if not all(part and part.samples for _, part in found):
        return ()
    weight = sum(source.weight for source in place.sources)
    return [_SourceSize(s.name, s.weight / weight, part.samples, part.tokens) for s, part in found if part]


def _mean_tokens(sizes: _Sizes) -> float:
    """Tokens of a sample, as sources are mixed."""
    return sum(source.share * source.tokens / source.samples for source in sizes)


def _model_table(parts: _Parts) -> str:
    """Parameters by part."""
    total = sum(map(sum, parts.values()))
    rows = [(f"  {name}", f"{sum(part):,}", f"{sum(part) / total:.1%}") for name, part in parts.items()]
    return table([("parameters", "", "share"), *rows, ("  all", f"{total:,}", "")])


def _memory(parts: _Parts, run: RunConfig, ranks: int, tensor_size: int) -> str:
    """Memory of one rank by precision, tensor-parallel size and ZeRO stage; size of checkpoints.

    Args:
        tensor_size: shown as well as the usual ones that can share the model.
    """
    tensor_sizes = []
    for size in sorted({*_TENSOR_SIZES, tensor_size}):
        check_shares(run.model, size, faults := FaultList())
        tensor_sizes += [size] if ranks % size == 0 and not faults.faults else []
    rows: list[tuple[str, ...]] = [
        ("  precision", "TP", "ranks on data", *(f"ZeRO {stage}" for stage in range(4)))
    ]
    for precision in ("fp32", "bf16", "fp16"):
        for tensor_size in tensor_sizes:
            own = sum(sharded // tensor_size + replicated for sharded, replicated in parts.values())
            data_size = ranks // tensor_size
            sizes = [state_bytes(own, stage, precision, data_size) for stage in range(4)]
            cells = ["refused" if size is None else bytes_text(size) for size in sizes]
            rows.append((f"  {precision}", str(tensor_size), str(data_size), *cells))
    whole = sum(map(sum, parts.values()))
    return (
        f"memory a rank for weights, gradients and AdamW states, on {ranks} ranks\n{table(rows)}\n"
        "  Gradients are added up in fp32, but in fp16 where it is the precision. With offload all but the\n"
        "  weights lies in host memory. Activations, communication buckets and the device's own needs come\n"
        "  on top, and on the first rank, which decodes samples at validations, all weights in fp32:\n"
        f"  {bytes_text(_MASTER_BYTES * whole)}. 16 bit with ZeRO 0 is refused: see ds_configs/README.md.\n"
        f"checkpoint: {bytes_text(snapshot_bytes(whole))} whatever the ranks, "
        "stage and precision;\n"
        f"  {_on_disk(parts, run)} lie on disk. As much host memory\n"
        "  is taken on the first rank's machine while one is written."
    )


def _on_disk(parts: _Parts, run: RunConfig) -> str:
    train = run.train
    kept = f"{train.keep_last} (train.keep_last) and the one being written"
    if train.keep_every:
        kept = f"{train.max_steps // train.keep_every} (train.keep_every), {kept}"
    # Weights alone, in fp32.
    best = bytes_text(_MASTER_BYTES * sum(map(sum, parts.values())))
    return kept if train.keep_best == "none" else f"{kept}, and {best} in checkpoints/best,"


def _communication(run: RunConfig, vocab_size: int, execution: Execution, sizes: _Sizes) -> str:
    """Bytes that one rank sends in one step, by kind, in every ZeRO stage."""
    ranks = execution.data_size * execution.tensor_size
    place = f"{ranks} ranks, TP {execution.tensor_size}, {execution.precision}"
    head = f"messages of one rank in one step ({place})"
    try:
        samples, accumulation = solve_batch(run, execution.data_size)
    except ConfigError:
        return f"{head}: the global batch cannot be shared by {execution.data_size} data-parallel ranks"
    length, origin = run.data.block_tokens + 2, "full blocks; give --data to know the data's mean"
    if sizes:
        length, origin = round(_side_tokens(run, sizes)), "the data's mean"
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
    return (
        f"{head}\n  {accumulation} micro-batches of {shape.samples // run.objective.dropout_draws} samples, "
        f"{length} source and {length} target tokens ({origin})\n{table(rows)}\n"
        "  A message is as large as the whole tensor. ZeRO 3 sends more in the first two steps."
    )


def _side_tokens(run: RunConfig, sizes: _Sizes) -> float:
    """Mean tokens of a side of a sample, bos and eos included."""
    return _mean_tokens(sizes) / (2 if run.data.task == "pair" else 1) + 2


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


def _length(run: RunConfig, sizes: _Sizes) -> list[str]:
    """Steps, samples, target tokens and epochs of a run.

    With batches of tokens, the number of samples is not known before the data is read.
    """
    train, data = run.train, run.data
    by_tokens, seen = data.batch == "tokens", train.max_steps * train.global_batch
    longer = f"up to {train.batch_tokens:,} tokens of the longer side"
    batch = longer if by_tokens else f"{train.global_batch:,} samples"
    lines = ["length of the run", f"  {train.max_steps:,} steps x {batch}"]
    if not sizes:
        most = f"at most {count_text(seen * data.block_tokens)} target tokens"
        lines += [] if by_tokens else [f"  = {count_text(seen)} samples, {most}"]
        return [*lines, "  epochs: give --data to know the size of the data"]
    samples, tokens = sum(s.samples for s in sizes), sum(s.tokens for s in sizes)
    if by_tokens:
        side = _side_tokens(run, sizes)
        epochs = train.max_steps * train.batch_tokens / side / samples
        lines.append(f"  data: {count_text(samples)} samples, {side:.0f} tokens a side with bos and eos")
        return [*lines, f"  = at most {epochs:.1f} epochs: of a pair its longer side counts, with padding"]
    mean = _mean_tokens(sizes)
    what = "target tokens" if data.task == "denoise" else "source and target tokens"
    lines.append(f"  = {count_text(seen)} samples, {count_text(seen * mean)} {what}")
    lines.append(f"  data: {count_text(samples)} samples, {count_text(tokens)} tokens, {mean:.0f} a sample")
    if len(sizes) == 1:
        return [*lines, f"  = {seen / samples:.2f} epochs"]
    return [*lines, *(f"  = {seen * s.share / s.samples:.2f} epochs of {s.name}" for s in sizes)]


_MASTER_BYTES, _ADAM_BYTES = 4, 8


def model_parts(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, int]]:
    """Parameters of each part of a model: those that tensor parallelism shards, and those on every rank."""
    parts = {part: [0, 0] for part in _PARTS.values()}
    for name, shape in parameter_shapes(config, vocab_size).items():
        part = next(_PARTS[start] for start in _PARTS if name.startswith(start))
        parts[part][not name.endswith(SHARDED)] += math.prod(shape)
    return {name: (sharded, replicated) for name, (sharded, replicated) in parts.items()}


def state_bytes(parameters: int, stage: int, precision: str, data_size: int) -> float | None:
    """Bytes of weights, gradients and AdamW states on one rank; None where it is not supported.

    DeepSpeed keeps an fp32 copy of the weights beside Adam's two moments from stage 1 on, in fp32
    as well. Stage 1 shares out these 12 bytes a parameter, stage 2 gradients too, stage 3 weights too.
    Gradients of bf16 are added up in fp32 (`data_types.grad_accum_dtype`), in stage 1 beside those in bf16.
    """
    weight, summed = 4 if precision == "fp32" else 2, 2 if precision == "fp16" else 4
    if stage == 0:
        return parameters * (weight + summed + _ADAM_BYTES) if precision == "fp32" else None
    states = _MASTER_BYTES + _ADAM_BYTES
    shared = {1: states, 2: states + summed, 3: states + summed + weight}[stage]
    whole = weight + summed + states - shared
    if stage == 1 and summed != weight:
        whole += weight
    return parameters * (whole + shared / data_size)
