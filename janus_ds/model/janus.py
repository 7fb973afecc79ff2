"""JANUS: one encoder, one decoder, both ways of decoding (Figure 2 of the paper).

In training, one pass over all decoder rows gives the hidden rows of AR, NAR and AUX; the objective turns
them into losses, so that nothing of vocabulary size exists here. In decoding, the same layers run on the
rows of one step: :meth:`JanusModel.encode`, then :meth:`ar_block`, :meth:`nar_rows` or
:meth:`aux_rows`, then :meth:`logits`.

Shape letters: B samples, S source tokens, R decoder rows, C content rows, D width, K beams, T tokens of a
block, N length candidates, L target tokens, P picked rows, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.batch import PredictedRows, SpecialTokens, TwoStreamBatch
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import ConfigError, DataError
from janus_ds.model.attention import KeysValues, RowsOfBatch, additive_mask
from janus_ds.model.decoding.cache import ArStream, EncoderOutput, KVCache, new_cache
from janus_ds.model.decoding.cpu_kernels import PreparedProduct
from janus_ds.model.decoding.native_step import SeenRows
from janus_ds.model.decoding.steps import (
    AuxAttention,
    AuxPool,
    AuxRows,
    BlockRows,
    CachedRows,
    CandidateAttention,
    PickedRows,
)
from janus_ds.model.transformer import Decoder, Encoder, LengthHead, Recompute, recompute_with
from janus_ds.model.weights import padded_vocab
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.stream_mask import Segment


class JanusModel(nn.Module):
    """Encoder, two-stream decoder, length head, one tied embedding.

    Args:
        recompute: activation checkpointing of every layer (non-reentrant).
        attention_backend: of decoder rows in training, see `train.attention_backend`.
    """

    def __init__(
        self,
        config: ModelConfig,
        special: SpecialTokens,
        parallel: ParallelLayers,
        recompute: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.special = special
        self.padded_vocab = padded_vocab(config, special.vocab_size)
        self.attention_backend = attention_backend
        self._vocabulary: PreparedProduct | None = None
        self._parallel = parallel
        self._recompute: Recompute | None = recompute_with(parallel) if recompute else None
        self.embedding = parallel.vocab_embedding(self.padded_vocab, config.d_model, std=config.init_std)
        self.encoder = Encoder(config, parallel)
        self.decoder = Decoder(config, parallel)
        classes = config.length_classes or config.max_target_positions
        self.length_head = LengthHead(config.d_model, classes, config.init_std)
        self._zero_padding_rows()

    def forward(self, batch: TwoStreamBatch, encoder_passes: int = 1) -> PredictedRows:
        """Hidden rows to predict from, for all rows of the batch in one pass of the decoder.

        Args:
            encoder_passes: dropout draws of the encoder in training. With 2, AR rows attend to the first
                draw, all other rows and the length head to the second. In evaluation the encoder runs once.
        """
        self._check_lengths(batch)
        source_BSD, rows_BRD = self._embed_together(batch.source_BS, batch.row_token_BR)
        valid_BS = _valid(batch.source_length_B, batch.source_BS.shape[1])
        mask = additive_mask(valid_BS[:, None, None], source_BSD.dtype)
        recompute = self._recompute if self.training else None
        passes = encoder_passes if self.training else 1
        states = tuple(self.encoder(source_BSD, mask, recompute) for _ in range(passes))
        rows = RowsOfBatch.build(batch, rows_BRD.dtype, self.attention_backend)
        x_BRD = self.decoder.input_rows(rows_BRD, batch.row_position_BR)
        hidden_BTD = self.decoder(x_BRD, rows, states, mask, recompute)

        layout = batch.layout

        def columns(segment: Segment) -> Tensor | None:
            if not layout.width(segment):
                return None
            start = layout.start(segment) - layout.predicted_start
            return hidden_BTD[:, start : start + layout.width(segment)]

        return PredictedRows(
            ar_BAD=columns(Segment.ARQ if layout.arq else Segment.ARC),
            nar_BMD=columns(Segment.MSK),
            aux_BMD=columns(Segment.QRY),
            length_logits_BK=self.length_head(states[-1], valid_BS),
            output_weight=self.output_weight,
        )

    @property
    def output_weight(self) -> Tensor:
        """The tied embedding table, (padded vocabulary, D), or this rank's rows of it."""
        return cast(Tensor, self.embedding.weight)

    # Decoding. The caller puts the model into eval mode and switches gradients off.

    def encode(self, source_BS: Tensor, source_length_B: Tensor) -> EncoderOutput:
        """Encode a batch of sources once for all that follows."""
        self._check_source(source_BS.shape[1], source_length_B)
        valid_BS = _valid(source_length_B, source_BS.shape[1])
        embedded_BSD = self.embedding(source_BS)
        valid_B11S = valid_BS[:, None, None]
        mask = None if bool(valid_BS.all()) else additive_mask(valid_B11S, embedded_BSD.dtype)
        states_BSD = self.encoder(embedded_BSD, mask)
        if self.decoder.native is not None:
            self.decoder.native.prepare()
        source = tuple(layer.kept_keys_values(states_BSD) for layer in self.decoder.decoder_layers())
        return EncoderOutput(states_BSD, valid_BS, mask, source)

    def length_logits(self, memory: EncoderOutput) -> Tensor:
        """Logits of the length head, shape (B, classes)."""
        logits: Tensor = self.length_head(memory.states_BSD, memory.valid_BS)
        return logits

    def nar_rows(
        self,
        memory: EncoderOutput,
        token_BNL: Tensor,
        length_BN: Tensor,
        picked: tuple[Tensor, int],
        kept: list[KeysValues] | None = None,
    ) -> Tensor:
        """One mask-predict pass over N length candidates of each sentence.

        Args:
            token_BNL: targets with bos and eos in target order, masked where to be predicted; padded at
                the end.
            length_BN: tokens of each candidate, bos and eos included.
            picked: flat indices (b x N + n) x L + l of the rows wanted, ascending, and the largest number of
                them in a candidate. The last layer computes these rows only.
            kept: takes keys and values of all rows, layer by layer, for :meth:`AuxPool.build`.

        Returns:
            hidden rows, (P, D): give them to :meth:`logits`.
        """
        sentences, candidates, width = token_BNL.shape
        position_L = torch.arange(width, device=token_BNL.device)
        valid = position_L < length_BN.flatten()[:, None]
        # Padding may reach past the table; its positions do not matter.
        position_L = position_L.clamp_max(self.config.max_target_positions - 1)
        embedded = self.embedding(token_BNL.flatten(1))
        mask = additive_mask(valid[:, None, None], embedded.dtype)
        rows = CandidateAttention(candidates * width, 0, mask, candidates, kept=kept)
        x = self.decoder.input_rows(embedded, position_L.repeat(candidates))
        native = self.decoder.native
        if native is not None and native.takes(x, width):
            x_XLD = x.view(-1, width, x.shape[2])
            wanted, pool = native.bidirectional(x_XLD, mask, memory, picked[0])
            if kept is not None:
                kept.extend(pool)
            return wanted
        *layers, last = zip(self.decoder.decoder_layers(), memory.source, strict=True)
        for layer, source in layers:
            x = layer(x, rows, (source,), memory.mask_B11S)
        chosen = PickedRows.build(*picked, (sentences, candidates, width))
        x = last[0](chosen.behind(x), rows.of_picked(), (last[1],), memory.mask_B11S)
        hidden: Tensor = x.flatten(0, 1)[chosen.place_P]
        return hidden

    def aux_rows(
        self,
        memory: EncoderOutput,
        pool: AuxPool,
        token_BNL: Tensor,
        settled_BN: Tensor,
        block: int,
        mask: int,
    ) -> Tensor:
        """One AUX pass over N candidates of each sentence (section 3.1 of the paper).

        Args:
            pool: of the candidates; gold tokens before the last settled one are in it. Changed in place.
            token_BNL: targets with tokens at all masked places; AUX row j sees those before it.
            settled_BN: masked places of each candidate that are settled, at least 1.
            block: T, places to predict from there on.
            mask: what stands for an unknown token.

        Returns:
            hidden rows, (B x N, T, D): give them to :meth:`logits`.
        """
        rows = AuxRows.build(pool, token_BNL, settled_BN, block, mask)
        position_BR = rows.position_BR.clamp_max(self.config.max_target_positions - 1)
        x = self.decoder.input_rows(self.embedding(rows.token_BR), position_BR)
        last, candidates = len(self.decoder.layers) - 1, token_BNL.shape[1]
        native = self.decoder.native
        if native is not None and native.takes(x):
            # (B, content and query, N, T, D) -> rows of each candidate
            x = x.unflatten(1, (2, candidates, block)).transpose(1, 2).reshape(-1, 2 * block, x.shape[2])
            seen = SeenRows(block, pool.keys[0].shape[2], rows.mask_X1QN, rows.column_XT)
            x = native(x, list(zip(pool.keys, pool.values, strict=True)), seen, memory)
            return x.view(-1, block, x.shape[1])
        for number, layer in enumerate(self.decoder.decoder_layers()):
            first = rows.content if number == last else 0
            kept = pool.keys[number], pool.values[number]
            attention = AuxAttention(rows.content, first, rows.mask_X1QN, candidates, *kept, rows.column_XT)
            x = layer(x, attention, (memory.source[number],), memory.mask_B11S)
        hidden: Tensor = x.view(-1, block, x.shape[2])
        return hidden

    def start_cache(self, memory: EncoderOutput, stream: ArStream, beams: int, max_steps: int) -> KVCache:
        """An empty cache for a search of at most `max_steps` tokens with K beams a sentence."""
        last = max_steps + (stream.query_offset if stream.two_stream else 0)
        _check_table(last, self.config.max_target_positions, "target")
        return new_cache(memory, stream, beams, max_steps)

    def ar_block(self, cache: KVCache, token_BKT: Tensor, parent_BK: Tensor | None = None) -> Tensor:
        """Append a block of tokens to every beam and give the hidden rows that predict what follows each.

        The content row of a sentence's token t stands at position t. A step of a two-stream model is one
        pass over K x T content rows and K x T query rows; the last layer computes the query rows only.
        Sentences may stand at different points, and a ragged block is padded with any tokens: call
        :meth:`KVCache.accept` afterwards with the number of tokens that each sentence keeps (for one
        beam; beams of a sentence keep equally many).

        Args:
            cache: from :meth:`start_cache`; changed in place.
            token_BKT: the next tokens (the start symbol at first).
            parent_BK: the beam slot that each beam continues; None: its own slot.

        Returns:
            hidden rows, (B, K, T, D); row t has seen the block's tokens 0 .. t.
        """
        if parent_BK is not None:
            cache.follow(parent_BK)
        sentences, beams, block = token_BKT.shape
        rows = BlockRows.build(
            cache, token_BKT, self.config.max_target_positions, cache.memory.states_BSD.dtype
        )
        x = self.decoder.input_rows(self.embedding(rows.token_BQ), rows.position_Q)
        layers, last = self.decoder.decoder_layers(), len(self.decoder.layers) - 1
        native = self.decoder.native
        if native is not None and native.takes(x):
            seen = SeenRows(rows.content, rows.end, rows.mask_B1QN, rows.column_BR)
            x, layers = native(x, list(zip(cache.keys, cache.values, strict=True)), seen, cache.memory), []
        for number, layer in enumerate(layers):
            first = rows.content if cache.stream.two_stream and number == last else 0
            cached = CachedRows(rows.content, first, cache.keys[number], cache.values[number], rows)
            x = layer(x, cached, (cache.memory.source[number],), cache.memory.mask_B11S)
        cache.advance(block)
        hidden: Tensor = x.view(sentences, block, beams, -1).transpose(1, 2)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary without its padding rows, (..., V), in float32 at least."""
        if self._parallel.size > 1:
            raise ConfigError(
                "text is not decoded under tensor parallelism",
                f"--tensor-parallel {self._parallel.size}",
                "decode from a checkpoint in one process: its weights are whole",
            )
        weight = self.output_weight[: self.special.vocab_size]
        product = self._vocabulary
        logits = F.linear(hidden, weight) if product is None else product(hidden, [weight], [None])
        return logits if logits.dtype == torch.float64 else logits.float()

    def prepare_products(self, int8: bool) -> None:
        """Let :meth:`logits` use a packed weight; called by `decoding.cpu_kernels.prepare`."""
        self._vocabulary = PreparedProduct(int8)

    def _embed_together(self, source_BS: Tensor, row_BR: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of source and rows from one lookup: one gradient of the table's size, not two."""
        flat = self.embedding(torch.cat([source_BS.flatten(), row_BR.flatten()]))
        source, rows = flat.split([source_BS.numel(), row_BR.numel()])
        return source.view(*source_BS.shape, -1), rows.view(*row_BR.shape, -1)

    def _check_lengths(self, batch: TwoStreamBatch) -> None:
        self._check_source(batch.source_BS.shape[1], batch.source_length_B)
        layout, table = batch.layout, self.config.max_target_positions
        # Asks the device only where the width alone does not settle it.
        if max(layout.arc + 1, layout.vis + layout.msk) > table:
            _check_table(int(batch.row_position_BR.max()) + 1, table, "target")

    def _check_source(self, width: int, source_length_B: Tensor) -> None:
        table = self.config.max_source_positions
        if width > table:
            _check_table(int(source_length_B.max()), table, "source")

    def _zero_padding_rows(self) -> None:
        """Rows of the table that stand for no token start at zero: pad, and those beyond the vocabulary."""
        weight = self.output_weight
        first = self._parallel.rank * weight.shape[0]
        with torch.no_grad():
            for row in (self.special.pad, *range(self.special.vocab_size, self.padded_vocab)):
                if first <= row < first + weight.shape[0]:
                    weight[row - first].zero_()


def _valid(length_B: Tensor, width: int) -> Tensor:
    """True for real tokens, (B, width)."""
    return torch.arange(width, device=length_B.device) < length_B[:, None]


def _check_table(longest: int, table: int, side: str) -> None:
    if longest > table:
        raise DataError(
            f"a {side} of {longest} tokens does not fit the position table of {table}",
            f"model.max_{side}_positions",
            "cut the text into shorter pieces, or train a model with a longer table",
        )
