"""What a run says of itself: the banner at its start, at its end the summary and the next command."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from janus_ds import __version__
from janus_ds.config.locations import public_location
from janus_ds.decode.load import trained_modes
from janus_ds.model.weights import parameter_shapes
from janus_ds.observe.progress import duration
from janus_ds.parallel.topology import Topology
from janus_ds.train.loop.state import Meters

if TYPE_CHECKING:
    from janus_ds.train.loop.build_run import Run


def announce_start(run: Run, topology: Topology, step: int) -> None:
    """Say what is trained, from what, with what and how; the first rank only."""
    if not topology.is_main:
        return
    model, data, train, execution = run.config.model, run.config.data, run.config.train, run.execution
    vocabulary = run.tokenizer.special.vocab_size
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model, vocabulary).values())
    size, held_out = run.train.source.samples, run.valid.source.samples
    by_tokens = data.batch == "tokens"
    spread = (
        f"{execution.accumulation} accumulation x {execution.data_size} data-parallel"
        if by_tokens
        else f"{execution.micro_batch} micro x {execution.accumulation} accumulation "
        f"x {execution.data_size} data-parallel"
    )
    batch = f"{train.batch_tokens:,} tokens" if by_tokens else f"{train.global_batch:,} samples"
    epochs = "" if by_tokens else f" ({train.max_steps * train.global_batch / size:.1f} epochs)"
    threads = f", threads {torch.get_num_threads()}" if topology.device.type == "cpu" else ""
    place = public_location(data.path or "")
    rows = [
        (
            "model",
            f"{parameters / 1e6:.1f} M parameters: {model.encoder_layers}+{model.decoder_layers} layers, "
            f"width {model.d_model}, vocabulary {vocabulary:,}",
        ),
        ("weights", f"from {run.config.init}" if run.config.init else f"new, from seed {train.seed}"),
        ("data", f"{place}: {size:,} samples to train on, {held_out:,} held out"),
        ("steps", f"{train.max_steps:,}{epochs}" + (f", going on from {step:,}" if step else "")),
        ("batch", f"{batch} = {spread}"),
        ("ranks", f"{topology.world_size}" + _parallel(topology) + f" on {topology.device.type}{threads}"),
        ("engine", f"{execution.precision}, ZeRO {execution.zero_stage}" + ", offload" * execution.offload),
        ("folder", f"{run.folder}"),
    ]
    _say(f"janus_ds {__version__}: {run.config.name}", rows)


def announce_end(run: Run, topology: Topology, step: int, meters: Meters) -> None:
    """Say what a complete run did, where it lies, and what can be done next; the first rank only."""
    if not topology.is_main:
        return
    folder = shlex.quote(str(run.folder))
    epochs = meters.samples / max(1, run.train.source.samples)
    trained = f"{meters.samples:,} samples ({epochs:.1f} epochs), {meters.tokens:,} tokens"
    rows = [("trained", f"{trained} in {duration(meters.seconds)} of steps")]
    if meters.skipped_steps:
        rows.append(("skipped", f"{meters.skipped_steps:,} steps; their reasons: metrics.jsonl"))
    if meters.best_step:
        rows.append(("best", f"step {meters.best_step:,}, in {run.folder / 'checkpoints' / 'best'}"))
    modes = [mode for mode in ("ar", "nar") if mode in trained_modes(run.config.objective)]
    rows += [
        ("folder", str(run.folder)),
        ("next", f"janus-ds decode --checkpoint {folder} --mode {','.join(modes)} --heldout 3"),
        ("", f"janus-ds report {folder}"),
    ]
    _say(f"complete after step {step:,}", rows)


def _parallel(topology: Topology) -> str:
    if topology.tensor_size == 1:
        return ""
    return f" = {topology.data_size} data-parallel x {topology.tensor_size} tensor-parallel"


def _say(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if sys.stderr is not None:
        sys.stderr.write("\n".join([title, *(f"  {name:<9}{text}" for name, text in rows)]) + "\n")
        sys.stderr.flush()
