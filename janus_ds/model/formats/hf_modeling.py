"""JANUS for transformers: one model that writes token by token (AR), all at once (NAR), or NAR judged by AUX.

    model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer(["Guten Morgen."], return_tensors="pt")
    rows = model.generate(**inputs)                                  # AR: all options of transformers
    rows = model.generate(**inputs, mode="nar", iterations=4)        # mask-predict, five decoder passes
    rows = model.generate(**inputs, mode="aux")
    print(tokenizer.batch_decode(rows, skip_special_tokens=True))

Written by `janus-ds convert --to hf`; needs torch and transformers, and is meant for decoding: losses are not
computed here. It is the method of "JANUS: Joint Autoregressive and Non-autoregressive Training with Auxiliary
Loss for Sequence Generation" (EMNLP 2022), whose decoder works on two streams of rows: content rows give keys
and values, query rows hold MASK and predict.

Sources are padded at the end. Shape letters: B sentences, C length candidates, R = B * C rows, S source
tokens, T target tokens, L longest candidate, P predicted places, D width, H heads, E width of a head,
V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

_CHUNK_ROWS = 1024
"""Places that are projected to the vocabulary at a time."""


class JanusConfig(PretrainedConfig):
    """The model's shape as in the recipe, and what decoding needs to know; `config.json` names all of it.

    Attributes:
        modes: ways of decoding that the model was trained for: ar, nar, aux.
        two_stream: AR predicts from query rows, `query_offset` positions behind their content rows.
        query_token_id: MASK, in query rows and in NAR's targets.
        special_token_ids: never predicted by NAR and AUX.
        length_specials: specials that a class of the length head does not count: 2 or 0.
        nar_score: "paper" or "released": which lengths are tried, and how candidates are scored.
        iterations, length_beam: of NAR, unless `generate` is told otherwise.
        longest: most rows of a NAR candidate, bos and eos included.
    """

    model_type = "janus"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "num_hidden_layers": "decoder_layers",
        "max_position_embeddings": "max_target_positions",
    }

    def __init__(self, **kwargs: Any) -> None:
        shape = {"vocab_size": 8, "d_model": 8, "heads": 1, "ffn_dim": 8, "activation": "gelu"}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "length_classes": 8, "init_std": 0.02}
        inputs = {"layernorm_embedding": True, "scale_embedding": False}
        positions = {"max_source_positions": 8, "max_target_positions": 8, "longest": 8}
        symbols = {"query_token_id": 4, "special_token_ids": (0, 1, 2, 3, 4), "length_specials": 2}
        ways = {"modes": ("ar",), "two_stream": False, "query_offset": 0}
        search = {"nar_score": "paper", "iterations": 4, "length_beam": 5}
        for part in (shape, layers, inputs, positions, symbols, ways, search):
            for name, default in part.items():
                setattr(self, name, kwargs.pop(name, default))
        super().__init__(**{"is_encoder_decoder": True, **kwargs})


class Attention(nn.Module):
    """Multi-head attention; rows that give keys and values are passed apart."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.d_model, config.d_model) for _ in range(4))

    def split(self, x_BTD: Tensor) -> Tensor:
        """By heads: (B, H, T, E)."""
        return x_BTD.view(*x_BTD.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows."""
        return self.split(self.k(x_BSD)), self.split(self.v(x_BSD))

    def forward(self, x_BTD: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None) -> Tensor:
        """What rows attend to; `mask` is boolean, True where visible."""
        out = F.scaled_dot_product_attention(self.split(self.q(x_BTD)), k_BHSE, v_BHSE, mask)
        merged: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return merged


class Layer(nn.Module):
    """Post-norm: every sublayer is norm(x + f(x)); a decoder's has cross-attention as well."""

    def __init__(self, config: JanusConfig, number: int, decoder: bool) -> None:
        super().__init__()
        self.number = number
        self.self_attention = Attention(config)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        if decoder:
            self.cross_attention = Attention(config)
            self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.activation = F.relu if config.activation == "relu" else F.gelu

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The last sublayer."""
        out: Tensor = self.ffn_norm(x_BTD + self.fc2(self.activation(self.fc1(x_BTD))))
        return out

    def encode(self, x_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        """Encoder states after this layer."""
        attended = self.self_attention(x_BSD, *self.self_attention.keys_values(x_BSD), mask_B11S)
        return self.feed_forward(self.self_attention_norm(x_BSD + attended))

    def decode(self, x_BTD: Tensor, content: int, mask: Tensor, source: Source, cache: Any) -> Tensor:
        """Decoder rows after this layer; the first `content` of them give keys and values."""
        k, v = self.self_attention.keys_values(x_BTD[:, :content])
        if cache is not None:
            k, v = cache.self_attention_cache.update(k, v, self.number)
        x_BTD = self.self_attention_norm(x_BTD + self.self_attention(x_BTD, k, v, mask))
        if cache is not None and cache.is_updated.get(self.number):
            kept = cache.cross_attention_cache.layers[self.number]
            k, v = kept.keys, kept.values
        else:
            k, v = self.cross_attention.keys_values(source.states_BSD)
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.number)
                cache.is_updated[self.number] = True
        x_BTD = self.cross_attention_norm(x_BTD + self.cross_attention(x_BTD, k, v, source.mask_B11S))
        return self.feed_forward(x_BTD)


class Source:
    """An encoded batch: states, and which of them are no padding."""

    def __init__(self, states_BSD: Tensor, mask_BS: Tensor | None, copies: int = 1) -> None:
        mask_BS = states_BSD.new_ones(states_BSD.shape[:2]) if mask_BS is None else mask_BS
        self.states_BSD = states_BSD.repeat_interleave(copies, 0)
        self.valid_BS = mask_BS.bool().repeat_interleave(copies, 0)
        self.mask_B11S = self.valid_BS[:, None, None]

    def select(self, row_B: Tensor) -> Source:
        """Some sentences only."""
        return Source(self.states_BSD[row_B], self.valid_BS[row_B])


class Stack(nn.Module):
    """What enters the first layer, and all layers of one side."""

    def __init__(self, config: JanusConfig, positions: int, layers: int, decoder: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(positions, config.d_model)
        self.embedding_norm = nn.LayerNorm(config.d_model) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(Layer(config, number, decoder) for number in range(layers))
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0

    def enter(self, embedded_BTD: Tensor, position_T: Tensor) -> Tensor:
        """Scale, positions, norm."""
        position_T = position_T.clamp_max(self.positions.num_embeddings - 1)
        x_BTD = torch.add(self.positions(position_T), embedded_BTD, alpha=self.scale)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)


class Encoder(Stack):
    """The encoder, with the embedding that all of the model shares."""

    main_input_name = "input_ids"

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config, config.max_source_positions, config.encoder_layers, decoder=False)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Encoder states."""
        width, table = input_ids.shape[1], self.positions.num_embeddings
        if width > table:
            raise ValueError(f"the source has {width} tokens, and the model reads {table} at most")
        x_BSD = self.enter(self.embedding(input_ids), torch.arange(width, device=input_ids.device))
        mask_B11S = Source(x_BSD, attention_mask).mask_B11S
        for layer in self.layers:
            x_BSD = layer.encode(x_BSD, mask_B11S)
        return BaseModelOutput(last_hidden_state=x_BSD)


class JanusForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model; see the head of this file."""

    config_class = JanusConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Stack(config, config.max_target_positions, config.decoder_layers, decoder=True)
        self.length_head = nn.Linear(config.d_model, config.length_classes, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """What `generate` encodes with."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; it is the output layer as well."""
        return self.encoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another embedding."""
        self.encoder.embedding = value

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, in float32 at least."""
        logits = F.linear(hidden, self.encoder.embedding.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def rows(
        self, token_BT: Tensor, position_T: Tensor, content: int, mask: Tensor, source: Source, past: Any
    ) -> Tensor:
        """One pass of the decoder over all rows: hidden rows, (B, T, D)."""
        x_BTD = self.decoder.enter(self.encoder.embedding(token_BT), position_T)
        for layer in self.decoder.layers:
            x_BTD = layer.decode(x_BTD, content, mask, source, past)
        return x_BTD

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """AR logits of the token after each of `decoder_input_ids`."""
        encoder_outputs = encoder_outputs or self.encoder(input_ids, attention_mask)
        source = Source(encoder_outputs[0], attention_mask)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids are needed; to decode text, call generate")
        width = decoder_input_ids.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        column = torch.arange(past + width, device=decoder_input_ids.device)
        position, token = column[past:], decoder_input_ids
        seen = column <= position[:, None]
        if self.config.two_stream:
            token = torch.cat([token, torch.full_like(token, self.config.query_token_id)], 1)
            position = torch.cat([position, position + self.config.query_offset])
            seen = seen.repeat(2, 1)
        hidden = self.rows(token, position, width, seen[None, None], source, past_key_values)
        return Seq2SeqLMOutput(
            logits=self.logits(hidden[:, -width:]),
            past_key_values=past_key_values,
            encoder_last_hidden_state=source.states_BSD,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        mode: str | None = None,
        iterations: int | None = None,
        length_beam: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode in one of the model's modes.

        Args:
            inputs: source ids, (B, S), also as `input_ids`; with `attention_mask` where they are padded.
            mode: "ar" (all else goes to transformers), "nar" or "aux"; None: the first that was trained.
            iterations: of "nar": refinements after the first pass.
            length_beam: of "nar" and "aux": lengths that are tried.

        Returns:
            ids, (B, T), with special symbols; of NAR and AUX bos first, eos behind each output, then pad.

        Raises:
            ValueError: a mode that was not trained, or options that a mode does not know.
        """
        mode = mode or self.config.modes[0]
        if mode not in self.config.modes:
            raise ValueError(f"mode {mode!r}: this model was trained for {', '.join(self.config.modes)}")
        if mode == "ar":
            if iterations is not None or length_beam is not None:
                raise ValueError("iterations and length_beam belong to the modes nar and aux")
            return super().generate(inputs, **kwargs)
        if mode == "aux" and iterations is not None:
            raise ValueError("iterations belong to the mode nar")
        source_BS, mask_BS = kwargs.pop("input_ids", inputs), kwargs.pop("attention_mask", None)
        if kwargs:
            raise ValueError(f"mode {mode} knows no {', '.join(kwargs)}")
        states_BSD = self.encoder(source_BS, mask_BS)[0]
        length_BC = self._lengths(Source(states_BSD, mask_BS), length_beam or self.config.length_beam)
        source = Source(states_BSD, mask_BS, length_BC.shape[1])
        targets = _Targets(self, source, length_BC.clamp_min(3) if mode == "aux" else length_BC)
        if mode == "aux":
            return targets.judged()
        return targets.refined(self.config.iterations if iterations is None else iterations)

    def _lengths(self, source: Source, beam: int) -> Tensor:
        """Lengths to try, bos and eos included, (B, C)."""
        share_BS = source.valid_BS.to(source.states_BSD.dtype)
        share_BS = share_BS / share_BS.sum(1, keepdim=True).clamp_min(1.0)
        logits_BK = self.length_head(torch.bmm(share_BS[:, None], source.states_BSD).squeeze(1))
        specials, longest = self.config.length_specials, self.config.longest
        if self.config.nar_score == "paper":
            best_BC = logits_BK.topk(min(beam, logits_BK.shape[1]), dim=1).indices
            return (best_BC + specials).clamp(3, longest)
        offset_C = torch.arange(beam, device=logits_BK.device) - beam // 2
        return (logits_BK.argmax(1, keepdim=True) + specials + offset_C).clamp(2, longest)


class _Targets:
    """All length candidates of all sentences, at first bos, MASK ..., eos; and how sure each token is."""

    def __init__(self, model: JanusForConditionalGeneration, source: Source, length_BC: Tensor) -> None:
        self.model, self.source, self.config = model, source, model.config
        self.candidates = length_BC.shape[1]
        self.length_R1 = length_BC.flatten()[:, None]
        self.column_L = torch.arange(int(length_BC.max()), device=length_BC.device)
        self.inner_RL = (self.column_L > 0) & (self.column_L < self.length_R1 - 1)
        self.valid_RL = self.column_L < self.length_R1
        token_RL = torch.full(self.valid_RL.shape, self.config.pad_token_id, device=length_BC.device)
        token_RL[:, 0] = self.config.bos_token_id
        token_RL = token_RL.masked_fill(self.column_L == self.length_R1 - 1, self.config.eos_token_id)
        self.token_RL = token_RL.masked_fill(self.inner_RL, self.config.query_token_id)
        self.score_RL = torch.zeros(token_RL.shape, device=length_BC.device)

    def refined(self, iterations: int) -> Tensor:
        """Mask-predict (Ghazvininejad et al., 2019): predict all, then the least sure ones again."""
        released = self.config.nar_score == "released"
        inner_R = self.inner_RL.sum(1)
        for step in range(iterations + 1):
            masked_RL = (self.token_RL == self.config.query_token_id) & self.inner_RL
            if not masked_RL.any():
                break
            self._predict(self._nar_hidden, masked_RL, () if released else self.config.special_token_ids)
            if step < iterations:
                share = torch.tensor(1.0 - (step + 1) / (iterations + 1), dtype=torch.float32)
                self._mask_again((inner_R.float() * share.to(inner_R.device)).long())
        return self._best(self.length_R1[:, 0] if released else inner_R)

    def judged(self) -> Tensor:
        """NAR drafts, AUX checks: what AUX would have written itself stands, and one token more a pass."""
        blank_RL, special = self.token_RL, self.config.special_token_ids
        self._predict(self._nar_hidden, self.inner_RL, special)
        inner_R, settled_R1 = self.inner_RL.sum(1), torch.ones_like(self.length_R1)
        while (open_RL := self.inner_RL & (self.column_L > settled_R1)).any():
            before_RL = self.token_RL
            self._predict(partial(self._aux_hidden, blank_RL), open_RL, special)
            # Columns before the first difference; with bos in column 0, as many inner tokens are settled.
            agreed_R = (self.token_RL == before_RL).long().cumprod(1).sum(1)
            settled_R1 = torch.minimum(agreed_R, inner_R)[:, None]
        return self._best(inner_R)

    def _nar_hidden(self, row_X: Tensor) -> Tensor:
        mask, width, source = self.valid_RL[row_X, None, None], len(self.column_L), self.source.select(row_X)
        return self.model.rows(self.token_RL[row_X], self.column_L, width, mask, source, None)

    def _aux_hidden(self, blank_RL: Tensor, row_X: Tensor) -> Tensor:
        """AUX's query rows: row j sees bos, eos, MASK from place j on, and the draft before it."""
        i_L1, j_L = self.column_L[:, None], self.column_L
        inner_X1L, valid_X1L = self.inner_RL[row_X, None], self.valid_RL[row_X, None]
        shown_X1L, blank_XL = valid_X1L & ~inner_X1L, blank_RL[row_X]
        every = torch.ones_like(i_L1 == j_L)
        original = torch.cat([valid_X1L & every, inner_X1L & ~every], 2)
        content = torch.cat([shown_X1L | (inner_X1L & (j_L > i_L1)), inner_X1L & (j_L <= i_L1)], 2)
        query = torch.cat([shown_X1L | (inner_X1L & (j_L >= i_L1)), inner_X1L & (j_L < i_L1)], 2)
        ask_XL = torch.full_like(blank_XL, self.config.query_token_id)
        token, width = torch.cat([blank_XL, self.token_RL[row_X], ask_XL], 1), len(j_L)
        mask, source = torch.cat([original, content, query], 1)[:, None], self.source.select(row_X)
        return self.model.rows(token, j_L.repeat(3), 2 * width, mask, source, None)[:, 2 * width :]

    def _predict(self, hidden: Any, place_RL: Tensor, forbidden: tuple[int, ...]) -> None:
        """The likeliest token of some places, and its log-probability; a pass over the rows that have any."""
        row_X = place_RL.any(1).nonzero()[:, 0]
        blocked = torch.tensor(list(forbidden), dtype=torch.long, device=place_RL.device)
        tokens, scores = [], []
        for hidden_XD in hidden(row_X)[place_RL[row_X]].split(_CHUNK_ROWS):
            logits_XV = self.model.logits(hidden_XD)
            best_X, token_X = logits_XV.index_fill(1, blocked, float("-inf")).max(1)
            tokens.append(token_X)
            scores.append(best_X - logits_XV.logsumexp(1))
        self.token_RL = self.token_RL.masked_scatter(place_RL, torch.cat(tokens))
        self.score_RL = self.score_RL.masked_scatter(place_RL, torch.cat(scores).to(self.score_RL.dtype))

    def _mask_again(self, count_R: Tensor) -> None:
        """Mask the least sure inner tokens of each row, so many."""
        order_RL = self.score_RL.masked_fill(~self.inner_RL, float("inf")).sort(dim=1, stable=True).indices
        first_RL = self.column_L < count_R[:, None]
        again_RL = torch.zeros_like(first_RL).scatter(1, order_RL, first_RL)
        self.token_RL = self.token_RL.masked_fill(again_RL, self.config.query_token_id)

    def _best(self, divisor_R: Tensor) -> Tensor:
        """The candidate of each sentence with the best mean log-probability."""
        mean_BC = (self.score_RL.sum(1) / divisor_R.clamp(min=1)).view(-1, self.candidates)
        first_B = torch.arange(len(mean_BC), device=mean_BC.device) * self.candidates
        return self.token_RL[first_B + mean_BC.argmax(1)]
