"""What one rank sends in one training step, by arithmetic: ZeRO's part and the step's own agreements.

The size of a message is that of the whole tensor: of what is summed, of what a reduce-scatter takes,
of what an all-gather gives; what goes over a wire follows from it. The formulas follow
what DeepSpeed 0.19 does, which is not always what papers say:

- stages 1 and 2 sum gradients by all-reduce, not by reduce-scatter, since every bucket holds parts of
  several ranks (`use_multi_rank_bucket_allreduce`, its default): twice the bytes over the wire;
- stage 2 does so for every micro-batch, stages 0 and 1 once a step;
- weights are gathered in stages 1 and 2 in one call a parameter group, padded to a multiple of twice
  the ranks, whatever `allgather_bucket_size` says;
- stage 3 gathers a parameter once for forward and backward together as long as what is used in between
  is below `stage3_max_reuse_distance`, else twice; each is padded to a multiple of the ranks;
- gradients of bf16 are taken to be added up in fp32 (`data_types.grad_accum_dtype`): stage 1 is then another
  optimizer of DeepSpeed's, all ranks hold the whole gradient, and need no message for its norm;
- gradient clipping sums one number a parameter group, in stage 3 in float64; a flag says whether 16-bit
  gradients overflow, in stage 3 only those of fp16; with tensor parallelism in stages 1 and 2 fp32's, too.

A test counts the collectives of real runs against these sums. Not in them: the first two steps after a
start in stage 3, in which DeepSpeed notes the order of modules, steps that are skipped (the ranks then
name the samples), validations and saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from janus_ds.batch import BatchCounts, RowLayout
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.model.weights import padded_vocab, parameter_shapes
from janus_ds.objective.fused_head import rows_per_chunk

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNMENT = 2
"""DeepSpeed pads flat groups of stages 1 and 2 to multiples of this times the ranks."""
_UNPARTITIONED_BUCKET = 500_000_000
"""Numbers that stage 0 sums at a time, and stage 1 in bf16."""
SHARDED = (
    *(f".{layer}.{kind}" for layer in ("q", "k", "v", "fc1") for kind in ("weight", "bias")),
    *(".out.weight", ".fc2.weight", "embedding.weight"),
)
"""Ends of names of parameters of which each tensor-parallel rank holds a part."""
_COUNTS = len(fields(BatchCounts))


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind that a rank takes part in, in one step.

    Args:
        operation: all-reduce, all-gather or reduce-scatter.
        group: data, tensor or world.
    """

    what: str
    operation: str
    group: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class Execution:
    """What of the DeepSpeed file and the launch decides about messages.

    Args:
        bucket: `reduce_bucket_size`, in numbers.
        prefetch: `stage3_prefetch_bucket_size`.
        persistence: `stage3_param_persistence_threshold`; parameters of at most so many numbers stay whole.
        reuse: `stage3_max_reuse_distance`.
        recompute: `train.activation_checkpointing`.
    """

    stage: int = 0
    precision: str = "fp32"
    micro_batches: int = 1
    data_size: int = 1
    tensor_size: int = 1
    bucket: int = 50_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    reuse: int = 1_000_000_000
    recompute: bool = False

    @property
    def element(self) -> int:
        """Bytes of a weight, a gradient or an activation in a message."""
        return _BYTES[self.precision]

    @property
    def whole_gradients(self) -> bool:
        """Whether each data-parallel rank holds all sums of gradients beside its part of the optimizer."""
        return (self.stage, self.precision) == (1, "bf16")


def rank_parameters(model: ModelConfig, vocab_size: int, tensor_size: int = 1) -> list[tuple[int, bool]]:
    """Size of each parameter of one tensor-parallel rank, and whether it decays: matrices do."""
    return [
        (math.prod(shape) // (tensor_size if name.endswith(SHARDED) else 1), len(shape) > 1)
        for name, shape in parameter_shapes(model, vocab_size).items()
    ]


def zero_traffic(parameters: Sequence[tuple[int, bool]], execution: Execution) -> list[Sent]:
    """Gradients, weights and norms of one step; `parameters` as from :func:`rank_parameters`."""
    sizes = [size for size, _ in parameters]
    # Two groups of the optimizer.
    groups = [sum(size for size, decays in parameters if decays == which) for which in (True, False)]
    found = [*_gradients(sizes, groups, execution), *_weights(sizes, groups, execution), *_norms(execution)]
    ranks = {"data": execution.data_size, "tensor": execution.tensor_size}
    return [sent for sent in found if ranks[sent.group] > 1]


def agreements(objective: ObjectiveConfig, execution: Execution) -> list[Sent]:
    """The step's own: may it go on, counts to divide by, is the loss finite, and the figures it logs."""
    found = []
    if execution.data_size * execution.tensor_size > 1:
        found.append(Sent("asked to stop?", "all-reduce", "world", 1, 8))
        found.append(Sent("bad losses, and their sum", "all-reduce", "world", 1, 16))
    if execution.data_size > 1:
        found.append(Sent("counts of the step", "all-reduce", "data", 1, 8 * _COUNTS))
        # Total, length, and of each stream the loss with and without smoothing, and the KL terms.
        figures = 2 + 2 * len(objective.streams) + len(objective.kl_pairs)
        found.append(Sent("figures of the step", "all-reduce", "data", 1, 8 * figures))
    return found


def _gradients(sizes: Sequence[int], groups: Sequence[int], execution: Execution) -> Iterator[Sent]:
    passes = execution.micro_batches if execution.stage >= 2 else 1
    whole = execution.whole_gradients
    if whole:
        sizes = [_padded(group, _ALIGNMENT * execution.data_size) for group in groups]
    limit = execution.bucket if execution.stage and not whole else _UNPARTITIONED_BUCKET
    calls = passes * _buckets(sizes, limit)
    scattered = execution.stage == 3
    total = sum(_padded(size, execution.data_size) for size in sizes) if scattered else sum(sizes)
    operation = "reduce-scatter" if scattered else "all-reduce"
    yield Sent("gradients", operation, "data", calls, passes * total * execution.element)


def _weights(sizes: Sequence[int], groups: Sequence[int], execution: Execution) -> Iterator[Sent]:
    if execution.stage in (1, 2):
        unit = _ALIGNMENT * execution.data_size
        size = sum(_padded(group, unit) for group in groups) * execution.element
        yield Sent("weights after the update", "all-gather", "data", len(groups), size)
    if execution.stage < 3:
        return
    fetched = [size for size in sizes if size > execution.persistence]
    kept = [size for size in sizes if size <= execution.persistence]
    # Each is used in forward and backward; what lies in between is at most twice all of them.
    times = 1 if 2 * sum(sizes) <= execution.reuse else 2
    if fetched:
        padded = sum(_padded(size, execution.data_size) for size in fetched)
        # The first module's own, then what is fetched ahead of use.
        calls = execution.micro_batches * times * (1 + -(-(padded - fetched[0]) // execution.prefetch))
        size = execution.micro_batches * times * padded * execution.element
        yield Sent("weights for forward and backward", "all-gather", "data", calls, size)
    if kept:
        size = sum(_padded(size, execution.data_size) for size in kept) * execution.element
        yield Sent("small weights after the update", "all-gather", "data", len(kept), size)


def _norms(execution: Execution) -> Iterator[Sent]:
    # Stage 0: our own look at the norm and DeepSpeed's clipping; else one for each parameter group.
    size = 8 if execution.stage == 3 else 4
    looks = execution.precision == "fp16" or (execution.precision == "bf16" and execution.stage < 3)
    looks |= execution.tensor_size > 1 and execution.stage in (1, 2)
    if execution.whole_gradients:
        yield Sent("gradient norms", "all-reduce", "tensor", 1, size)
        return
    for group in ("data", "tensor"):
        yield Sent("gradient norms", "all-reduce", group, 2, 2 * size)
        if looks:
            yield Sent("overflow?", "all-reduce", group, 1, 1)


def _buckets(sizes: Sequence[int], limit: int) -> int:
    """Buckets that sizes fill one after the other; exact where all fit into one."""
    count, filled = 1, 0
    for size in reversed(sizes):
        if filled and filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


_LOSS_BYTES = 4
"""Losses are computed in float32 in every precision."""


@dataclass(frozen=True)
class BatchShape:
    """Widths and counts of one micro-batch, padding included in the widths.

    Args:
        samples: B.
        source: source tokens S.
        layout: widths of the row segments.
        masked: tokens that NAR and AUX predict.
        unmasked: further tokens that AR predicts.
    """

    samples: int
    source: int
    layout: RowLayout
    masked: int
    unmasked: int


def tensor_traffic(
    model: ModelConfig,
    vocab_size: int,
    objective: ObjectiveConfig,
    batches: Sequence[BatchShape],
    execution: Execution,
    device: str = "cuda",
) -> list[Sent]:
    """Sums over the tensor-parallel group in the micro-batches of one step; none for a group of one."""
    if execution.tensor_size == 1:
        return []
    found: dict[str, Sent] = {}
    for batch in batches:
        parts = [*_layers(model, batch, execution, objective.encoder_passes)]
        parts += _losses(model, vocab_size, objective, batch, execution, device)
        for part in parts:
            before = found.get(part.what, replace(part, calls=0, bytes=0))
            found[part.what] = replace(part, calls=before.calls + part.calls, bytes=before.bytes + part.bytes)
    return list(found.values())


def _layers(model: ModelConfig, batch: BatchShape, execution: Execution, passes: int) -> list[Sent]:
    """Rows of width D that the layers sum, as counts of rows; the encoder makes `passes` passes."""
    layout = batch.layout
    source, rows, content = batch.source, layout.rows, layout.content_rows
    predicted = rows - layout.predicted_start
    computed = [*[rows] * (model.decoder_layers - 1), predicted]
    # Outputs: attention and feed-forward; the decoder has two attentions.
    forward = [source] * (2 * passes * model.encoder_layers) + [width for width in computed for _ in range(3)]
    # Inputs: q, k, v, fc1; in the decoder q, cross q, fc1 of the rows, k and v of content and source.
    backward = [source] * (passes * (4 * model.encoder_layers + 2 * model.decoder_layers))
    backward += [width for width in computed for _ in range(3)] + [content] * (2 * model.decoder_layers)
    if execution.recompute:
        backward += forward
    unit = batch.samples * model.d_model * execution.element

    def sent(what: str, widths: list[int]) -> Sent:
        return Sent(what, "all-reduce", "tensor", len(widths), unit * sum(widths))

    return [
        sent("embeddings", [source + rows]),
        sent("layers forward", forward),
        sent("layers backward", backward),
    ]


def _losses(
    model: ModelConfig,
    vocab_size: int,
    objective: ObjectiveConfig,
    batch: BatchShape,
    execution: Execution,
    device: str,
) -> list[Sent]:
    streams, layout = objective.streams, batch.layout
    chunk = rows_per_chunk(padded_vocab(model, vocab_size) // execution.tensor_size, torch.device(device))
    masked = [name for name in streams if name != "ar"]
    # Streams, KL pairs and tokens of each group of rows that predict the same tokens.
    draws = objective.dropout_draws
    repeated = [first for first, second in objective.kl_pairs if first == second]
    pairs = draws * (len(objective.kl_pairs) - len(repeated)) + len(repeated)
    groups = [(draws * len(streams), pairs, batch.masked // draws)] if masked else []
    if "ar" in streams:
        tokens = batch.unmasked + (0 if masked else batch.masked)
        groups.append((draws, int("ar" in repeated), tokens // draws))
    calls = numbers = 0
    for count, pairs, tokens in groups:
        calls += 2 * -(-tokens // max(1, max(chunk, len(streams)) // count))
        numbers += (count + 3 * count + 2 * pairs) * tokens
    widths = {"ar": layout.arq or layout.arc, "nar": layout.msk, "aux": layout.qry}
    hidden = batch.samples * sum(widths[name] for name in streams) * model.d_model
    return [
        Sent("losses over the vocabulary", "all-reduce", "tensor", calls, _LOSS_BYTES * numbers),
        Sent("gradient of hidden rows", "all-reduce", "tensor", 1, _LOSS_BYTES * hidden),
    ]


def wire_bytes(sent: Sent, execution: Execution) -> float:
    """Bytes that leave one rank if rings are used, which send the least."""
    world = execution.data_size * execution.tensor_size
    size = {"tensor": execution.tensor_size, "data": execution.data_size}.get(sent.group, world)
    share = (size - 1) / size
    return sent.bytes * share * (2 if sent.operation == "all-reduce" else 1)
