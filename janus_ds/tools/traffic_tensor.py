"""What one rank sends to its tensor-parallel group in one micro-batch, by arithmetic.

From the layers (megatron-core 0.16): a column-parallel layer sums the gradient of its input, a
row-parallel one its output, the vocabulary-parallel embedding its rows. q, k and v are layers of
their own here, so attention sums three gradients of inputs where a fused projection would sum one.
Keys and values are taken of content rows alone, and the last decoder layer computes the predicted rows
only. The losses meet the vocabulary in chunks, two small sums each, and give one gradient of all
hidden rows (`objective/fused_head.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.model.weights import padded_vocab
from janus_ds.objective.fused_head import rows_per_chunk
from janus_ds.tools.traffic import Execution, Sent, pair_names, repeated_names, stream_names

__all__ = ["BatchShape", "tensor_traffic"]

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

    @classmethod
    def of(cls, batch: TwoStreamBatch) -> BatchShape:
        """The shape of a batch."""
        samples, source = batch.source_BS.shape
        return cls(
            samples,
            source,
            batch.layout.packed or batch.layout,
            len(batch.masked_T),
            len(batch.ar_unmasked_U),
        )


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
    streams, layout = stream_names(objective), batch.layout
    chunk = rows_per_chunk(padded_vocab(model, vocab_size) // execution.tensor_size, torch.device(device))
    masked = [name for name in streams if name != "ar"]
    # Streams, KL pairs and tokens of each group of rows that predict the same tokens.
    draws, repeated = objective.dropout_draws, repeated_names(objective)
    pairs = draws * len(pair_names(objective)) + len(repeated)
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
