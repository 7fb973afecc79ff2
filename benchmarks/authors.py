"""A training step as the released code is built, written from the method: what ours is measured against.

Two forward calls, each with an encoder pass of its own; content and query streams as two tensors that
each project the encoder states' keys and values, and of which the second projects the content's again;
dense masks (B, L, L) under bmm, masked_fill and a float32 softmax; every layer on all rows; the vocabulary
on the whole NAR content stream though only its MASK rows are scored; a log-softmax for each loss, and one
and a softmax more for each direction of each KL pair, all kept for the backward pass.

Kinder than the released code in one thing: masks are compared at once, not filled in by Python loops with
a device synchronisation a sample. Works on the weights of a :class:`JanusModel`, for batches of the
`paper` preset without padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model.attention import MultiHeadAttention
from janus_ds.model.janus import JanusModel
from janus_ds.model.transformer import DecoderLayer, EncoderLayer
from janus_ds.stream_mask import Segment


class AuthorsLikeStep:
    """Losses of a batch from the weights of `model`.

    Args:
        model: weights, dropout rates and mode.
        objective: resolved; two KL pairs, each term over its own count.
    """

    def __init__(self, model: JanusModel, objective: ObjectiveConfig) -> None:
        self.model = model
        self.objective = objective

    def __call__(self, batch: TwoStreamBatch) -> Tensor:
        """The weighted total of the `paper` preset's terms."""
        w, smoothing = self.objective, float(self.objective.label_smoothing or 0.0)
        ar, _ = self._streams(batch, [Segment.ARC], [Segment.ARQ])
        aux, nar, states = self._nar_streams(batch)
        gold = batch.masked_target_BM
        total = ar.new_zeros(())
        for weight, logits, target in (
            (w.weight_ar, ar, batch.ar_target_BA),
            (w.weight_nar, nar, gold),
            (w.weight_aux, aux, gold),
        ):
            total = total + float(weight or 0.0) * smoothed_loss(logits, target, smoothing)
        index_BM1 = (batch.ar_masked_T % ar.shape[1]).view(*gold.shape, 1)
        ar_masked = ar.gather(1, index_BM1.expand(-1, -1, ar.shape[-1]))
        pairs = [(w.weight_kl_ar_nar, ar_masked, nar), (w.weight_kl_ar_aux, ar_masked, aux)]
        for weight, first, second in [*pairs, (w.weight_kl_nar_aux, nar, aux)]:
            if weight:
                total = total + weight * two_way_kl(first, second).sum() / gold.numel()
        if w.weight_length:
            valid = torch.ones_like(batch.source_BS, dtype=torch.bool)
            logits = self.model.length_head(states, valid)
            total = total + w.weight_length * F.cross_entropy(_single(logits), batch.length_target_B)
        return total

    def _nar_streams(self, batch: TwoStreamBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of AUX and NAR, and the encoder states of the second forward call."""
        content = [Segment.VIS, Segment.MSK, Segment.CMP]
        query, states = self._streams(batch, content, [Segment.QRY])
        content_logits = self._last_content_logits
        vis = batch.layout.vis
        return query, content_logits[:, vis : vis + batch.layout.msk], states

    def _streams(
        self, batch: TwoStreamBatch, content: list[Segment], query: list[Segment]
    ) -> tuple[Tensor, Tensor]:
        """One forward call: encoder, two streams, vocabulary. Returns query logits and encoder states."""
        model = self.model
        states = self._encode(batch.source_BS)
        x, y = (self._rows(batch, segments) for segments in (content, query))
        x_mask, y_mask = (_visible(batch, rows, content) for rows in (content, query))
        for layer in model.decoder.decoder_layers():
            new_x = self._layer(layer, x, x, x_mask, states)
            y = self._layer(layer, y, x, y_mask, states)
            x = new_x
        if Segment.MSK in content:
            self._last_content_logits = model.logits(x)
        return model.logits(y), states

    def _rows(self, batch: TwoStreamBatch, segments: list[Segment]) -> Tensor:
        columns = _columns(batch, segments)
        tokens, positions = batch.row_token_BR[:, columns], batch.row_position_BR[:, columns]
        return self.model.decoder.input_rows(self.model.embedding(tokens), positions)

    def _encode(self, source_BS: Tensor) -> Tensor:
        encoder = self.model.encoder
        position_S = torch.arange(source_BS.shape[1], device=source_BS.device)
        x = encoder.input_rows(self.model.embedding(source_BS), position_S)
        for layer in encoder.layers:
            assert isinstance(layer, EncoderLayer)
            attended = _attend(layer.self_attention, x, x, None)
            x = layer.feed_forward(layer.residual(x, attended, layer.self_attention_norm))
        return x

    def _layer(self, layer: DecoderLayer, x: Tensor, content: Tensor, mask: Tensor, states: Tensor) -> Tensor:
        x = layer.residual(x, _attend(layer.self_attention, x, content, mask), layer.self_attention_norm)
        cross = _attend(layer.cross_attention, x, states, None)
        return layer.feed_forward(layer.residual(x, cross, layer.cross_attention_norm))


def smoothed_loss(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy from whole logits, the mean over targets."""
    log_p = F.log_softmax(_single(logits), dim=-1)
    nll = -log_p.gather(-1, target[..., None]).sum()
    spread = -log_p.sum() / log_p.shape[-1]
    return ((1 - smoothing) * nll + smoothing * spread) / target.numel()


def _visible(batch: TwoStreamBatch, rows: list[Segment], keys: list[Segment]) -> Tensor:
    """What each row sees, (B, rows, keys), as one matrix a sample."""
    seen = batch.layout.visible(_columns(batch, rows), _columns(batch, keys), batch.source_BS.device)
    return seen.repeat(len(batch.sample_id_B), 1, 1)


def _columns(batch: TwoStreamBatch, segments: list[Segment]) -> Tensor:
    """The columns of some segments, on the batch's device."""
    every_R = torch.arange(batch.layout.rows, device=batch.source_BS.device)
    return torch.cat([every_R[batch.layout.columns(segment)] for segment in segments])


def _attend(attention: MultiHeadAttention, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Projections, bmm, masked_fill, softmax in float32, dropout, bmm, output projection."""
    q, (k, v) = attention.queries(x), attention.keys_values(keys)
    size, heads, _, width = q.shape
    q, k, v = (part.flatten(0, 1) for part in (q * width**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(size, heads, x.shape[1], keys.shape[1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = F.softmax(_single(scores), dim=-1).to(scores.dtype)
    weights = F.dropout(weights, attention.dropout, attention.training)
    out = torch.bmm(weights.flatten(0, 1), v).view(size, heads, x.shape[1], width)
    return attention.merge(out.transpose(1, 2))


def two_way_kl(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of both directions, un-reduced, each from softmaxes of its own."""
    forward = F.kl_div(F.log_softmax(_single(first), -1), F.softmax(_single(second), -1), reduction="none")
    backward = F.kl_div(F.log_softmax(_single(second), -1), F.softmax(_single(first), -1), reduction="none")
    return (forward + backward) / 2


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
