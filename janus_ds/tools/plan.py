"""`python -m janus_ds plan`: what a run needs and how long it is, before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from janus_ds.config.load import add_recipe_arguments, load_run_config
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.errors import UsageError
from janus_ds.tools.common import bytes_text, count_text, new_parser, recipe_path, table
from janus_ds.tools.model_size import PartSize, checkpoint_bytes, model_parts, state_bytes
from janus_ds.tools.plan_communication import (
    Projection,
    add_machine_arguments,
    describe_communication,
    describe_scaling,
)

__all__ = ["describe_length", "describe_memory", "describe_model", "main"]

_TENSOR_SIZES = (1, 2, 4)
_ASSUMED_VOCABULARY = {"quickstart": 2000}
_BART_VOCABULARY = 50265


def main(arguments: Sequence[str]) -> int:
    """Print parameters, memory, checkpoint size, messages, scaling and length of a run."""
    parsed = _parser().parse_args(arguments)
    recipe = recipe_path(parsed.recipe)
    run = load_run_config(recipe, parsed.overrides)
    data = parsed.data or run.data.path
    manifest = _manifest(data, run) if data else None
    vocab_size, origin = _vocabulary(run, parsed.vocab, manifest)
    if parsed.ranks < 1:
        raise UsageError(f"there cannot be {parsed.ranks} ranks", "--ranks", "give a number above 0")
    if parsed.nodes is not None:
        if parsed.nodes < 1:
            raise UsageError(f"there cannot be {parsed.nodes} nodes", "--nodes", "give a number above 0")
        parsed.ranks = parsed.nodes * parsed.devices
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
    if parsed.nodes is not None:
        print(describe_scaling(projection, parsed.nodes))
        print()
    print(describe_length(run, manifest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("plan", "Parameters, memory, checkpoint size, messages, scaling and length of a run.")
    add_recipe_arguments(parser)
    parser.add_argument("--data", help="directory made by launch/prepare_data.py; or as data.path")
    parser.add_argument("--vocab", type=int, help="vocabulary size, where there is no data yet")
    parser.add_argument(
        "--ranks", type=int, default=8, help="processes of the run (default: 8, or as --nodes)"
    )
    add_machine_arguments(parser)
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
    rows: list[tuple[str, ...]] = [
        (
            "  precision",
            "TP",
            "ranks on data",
            "ZeRO 0",
            "ZeRO 1",
            "ZeRO 2",
            "ZeRO 3",
        )
    ]
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
