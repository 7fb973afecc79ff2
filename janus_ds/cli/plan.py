"""`python -m janus_ds plan`: what a run needs and how long it is, before anything is started."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from janus_ds.cli.arguments import new_parser, recipe_path
from janus_ds.cli.plan_messages import Projection, add_execution_arguments, describe_communication
from janus_ds.cli.traffic import SHARDED
from janus_ds.config.load import add_recipe_arguments, load_run_config
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.errors import UsageError
from janus_ds.model.weights import parameter_shapes
from janus_ds.tables import bytes_text, count_text, table

__all__ = ["PartSize", "checkpoint_bytes", "main", "model_parts", "state_bytes"]

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
    run = load_run_config(recipe, parsed.overrides)
    data = parsed.data or run.data.path
    manifest = _manifest(data, run) if data else None
    vocab_size, origin = _vocabulary(run, parsed.vocab, manifest)
    if parsed.ranks < 1:
        raise UsageError(f"there cannot be {parsed.ranks} ranks", "--ranks", "give a number above 0")
    projection = Projection.of(parsed, run, vocab_size, manifest)
    parts = model_parts(run.model, vocab_size)
    print(f"run {run.name} ({recipe})")
    print(f"objective {run.objective.preset}\n")
    print(describe_model(parts, vocab_size, origin))
    print()
    print(describe_memory(parts, run.train.keep_last, parsed.ranks))
    print()
    print(describe_communication(projection))
    print()
    print(describe_length(run, manifest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("plan", "Parameters, memory, checkpoint size, messages and length of a run.")
    add_recipe_arguments(parser)
    parser.add_argument("--data", help="directory made by launch/prepare_data.py; or as data.path")
    parser.add_argument("--vocab", type=int, help="vocabulary size, where there is no data yet")
    parser.add_argument("--ranks", type=int, default=8, help="processes of the run (default: 8)")
    add_execution_arguments(parser)
    return parser


def _manifest(location: str, run: RunConfig) -> Manifest:
    """The manifest of the data; of several sources, with the sums of their splits."""
    place = open_data(location, run.data)
    splits = dict(place.manifest.splits)
    for name, first in splits.items():
        parts = [manifest.splits[name] for manifest in place.manifests if name in manifest.splits]
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
    unit = "tokens of the longer side" if train.batch_cost == "tokens" else "decoder rows"
    lines = ["length of the run", f"  {train.max_steps:,} steps x up to {train.batch_tokens:,} {unit}"]
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        return "\n".join([*lines, "  epochs: give --data to know the size of the data"])
    mean = totals.tokens / totals.samples / (2 if run.data.task == "pair" else 1) + 2
    lines.append(f"  data: {count_text(totals.samples)} samples, {mean:.0f} tokens a side with bos and eos")
    if train.batch_cost == "tokens":
        epochs = train.max_steps * train.batch_tokens / mean / totals.samples
        lines.append(f"  = about {epochs:.1f} epochs, fewer by what is padding")
    return "\n".join(lines)


_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
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

    Args:
        parameters: on one tensor-parallel rank.
        stage: ZeRO stage.
        precision: fp32, bf16 or fp16.
        data_size: data-parallel ranks.
    """
    weight = _WEIGHT_BYTES[precision]
    if stage == 0:
        return parameters * (2 * weight + _ADAM_BYTES) if precision == "fp32" else None
    states = _MASTER_BYTES + _ADAM_BYTES
    shared = {1: states, 2: states + weight, 3: states + 2 * weight}[stage]
    whole = 2 * weight + states - shared
    return parameters * (whole + shared / data_size)


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint on any ranks, in any stage and precision: weights and moments in fp32."""
    return parameters * (_MASTER_BYTES + _ADAM_BYTES)
