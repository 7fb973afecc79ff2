"""What a run is, field by field: frozen dataclasses filled from `launch/recipes/*.yaml`.

`janus-ds explain KEY` prints the text below a field. Fields that are `None` take the
value that the objective's preset bundles (`config/presets.py`).
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from janus_ds.config.fields import (
    STRICT,
    Count,
    FieldSpec,
    NotNegative,
    OneOf,
    Positive,
    Rate,
    Share,
    Whole,
    field_specs,
)
from janus_ds.config.schema_train import DecodeConfig as DecodeConfig
from janus_ds.config.schema_train import TrainConfig as TrainConfig

_Objective = OneOf(
    "paper", "released", "ar", "ar_query", "cmlm", "ar_rdrop", "ar_query_rdrop", "released_finetune"
)
STREAMS = ("ar", "nar", "aux")
"""The distributions that are learned."""
KL_PAIRS = (("ar", "nar"), ("ar", "aux"), ("nar", "aux"), ("ar", "ar"), ("nar", "nar"), ("aux", "aux"))
"""Streams that a KL term pulls together; a stream with itself: over two dropout draws."""
_Masking = OneOf("span_union", "span_overlap", "uniform", "infilling", "infilling_released")


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Shape of the encoder-decoder (post-norm, learned positions, all embeddings tied)."""

    preset: Annotated[str, OneOf("quickstart", "iwslt", "wmt", "bart_base", "bart_large", "1b")] | None = None
    """Shape whose values fill the fields not given: quickstart, iwslt, wmt, bart_base, bart_large, 1b."""
    d_model: Count = 128
    """Width D of every row."""
    encoder_layers: Count = 2
    """Number of encoder layers."""
    decoder_layers: Count = 2
    """Number of decoder layers."""
    ffn_dim: Count = 512
    """Inner width of the feed-forward blocks."""
    heads: Count = 4
    """Attention heads; must divide d_model."""
    activation: Annotated[str, OneOf("relu", "gelu")] = "gelu"
    """relu (NMT Transformer) or gelu (BART, exact erf form)."""
    max_source_positions: Count = 1024
    """Rows of the encoder's position table: the longest source, bos and eos included."""
    max_target_positions: Count = 1024
    """Rows of the decoder's position table: the longest target, bos and eos included."""
    layernorm_embedding: bool = True
    """Layer norm after the embeddings, on every row (BART); off for the NMT Transformer."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(d_model) (NMT Transformer)."""
    dropout: Rate = 0.1
    """Dropout after embeddings and after each sublayer."""
    attention_dropout: Rate = 0.1
    """Dropout on attention weights."""
    activation_dropout: Rate = 0.0
    """Dropout inside the feed-forward block, after the activation."""
    length_classes: Annotated[int, Field(ge=2)] | None = None
    """Classes of the length head; null: 256 where objective.length_convention is with_specials.

    Else as many as max_target_positions.
    """
    init_std: Positive = 0.02
    """Standard deviation of the normal distribution that weights are drawn from."""
    vocab_multiple: Count = 8
    """The embedding table is padded to a multiple of this, so that it divides under tensor parallelism."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where samples come from."""

    path: str | None = None
    """Where the directory of `janus-ds prepare` lies; null: the bundled corpus, prepared on first use.

    A folder, an address (http://, https://, s3://, gs:// or any of fsspec's), or a command that writes a
    file of it to standard output, with {} for the file's name: `pipe:ssh HOST cat DIR/{}`. In an address,
    ${NAME} stands for the environment's value, so that passwords need not be written down. Several with
    weights are mixed: `wiki=0.7,books=0.3`.
    """
    valid_path: str | None = None
    """Directory of validation shards, given in the same way; null: `path`/valid."""
    task: Annotated[str, OneOf("denoise", "pair")] = "denoise"
    """denoise (pretraining: source is the noised target) or pair (source and target are given)."""
    batch: Annotated[str, OneOf("samples", "tokens")] = "samples"
    """What an update holds: samples (train.global_batch of them) or tokens (train.batch_tokens)."""
    block_tokens: Whole = 0
    """Longest target without bos and eos; longer ones are refused by name. 0: as the data was prepared.

    Then tables of positions grow to what the data needs, unless --set gives them. Of distant data as many
    tokens as the model has positions; the bundled corpus has blocks of 30.
    """
    shuffle_window: Count = 8
    """Block shuffle: samples mix inside windows of this many packed members."""
    shuffle_shards: Whole = 0
    """Members mix inside groups of this many shards, which come in mixed order; 0: over all shards.

    Needed for distant data larger than data.cache_gb: without it, one window touches shards from everywhere.
    """
    workers: Whole = 1
    """Prefetching worker processes a rank; 0 reads in the training process."""
    prefetch_steps: Count = 2
    """Steps that each worker prepares ahead."""
    pad_multiple: Count = 8
    """Segment widths are padded to a multiple of this, which bounds the number of distinct shapes.

    For sentences of some 20 tokens, 1 or 2 where shapes cost nothing (train.compile none or head): with 8, a
    fifth of the decoder rows and more are padding.
    """
    cache_dir: str = ""
    """Folder that keeps what is fetched, shared by all processes of a machine; empty: the user's cache."""
    cache_gb: Positive = 50.0
    """Most that fetched shards may take there, in GB; the least recently used go first."""
    read_ahead: Whole = 2
    """Shards fetched before they are needed, in the order of the run; distant data only."""
    retries: Whole = 5
    """Further tries of a transfer that failed or brought damaged bytes, with growing pauses."""
    stall_seconds: Positive = 60.0
    """A transfer that brings nothing for so long has failed."""
    on_damage: Annotated[str, OneOf("stop", "quarantine")] = "stop"
    """What a damaged member (one checksum, many samples) does to a run: stop or quarantine.

    quarantine: its samples are listed in RUN/quarantine.jsonl, and each is replaced by a sample of the next
    whole member, on any number of ranks by the same one.
    """
    max_damage: Share = 0.1
    """Share of the members that may be damaged before quarantine gives up and stops the run."""


@dataclass(frozen=True, config=STRICT)
class MaskingConfig:
    """How views are made of a sample (sections 2 and 3.3 of the paper). null: as the preset says."""

    target: Annotated[str, _Masking] | None = None
    """How target tokens are masked.

    span_union (spans until their union reaches the share), span_overlap (the released law), uniform
    (CMLM), infilling (pretraining: the encoder's spans and further ones) or infilling_released.
    """
    target_share: Share | None = None
    """Share of the target to mask: .7 for NMT, .5 for pretraining."""
    source_share: Share | None = None
    """Share of tokens hidden from the encoder in pretraining: .3."""
    poisson: Annotated[float, Field(ge=0.1, le=100)] | None = None
    """Mean of the Poisson law of span lengths: 2 in the paper, 3 in the released pretraining."""
    rotate_share: Share | None = None
    """Share of samples whose encoder input is rotated (released pretraining: .5; paper: 0)."""
    aux_order: Annotated[str, OneOf("left_to_right", "random")] | None = None
    """Order in which AUX predicts the masked tokens: left_to_right, or random (drawn for each sample).

    random makes AUX an any-order model; `released_finetune` uses it.
    """


@dataclass(frozen=True, config=STRICT)
class ObjectiveConfig:
    """Loss weights and conventions (section 3 of the paper, eq. 5). null: as the preset says."""

    preset: Annotated[str, _Objective] = "paper"
    """paper, released, ar, ar_query, cmlm, ar_rdrop, ar_query_rdrop or released_finetune."""
    weight_ar: NotNegative | None = None
    """Weight of the AR loss; 0 leaves its rows out, unless a KL term with AR has a weight."""
    weight_nar: NotNegative | None = None
    """Weight of the NAR loss."""
    weight_aux: NotNegative | None = None
    """Weight of the AUX loss."""
    weight_length: NotNegative | None = None
    """Weight of the length loss; 1 harms badly, keep .1."""
    weight_kl_ar_nar: NotNegative | None = None
    """Weight of K(AR, NAR), the symmetric KL halved."""
    weight_kl_ar_aux: NotNegative | None = None
    """Weight of K(AR, AUX)."""
    weight_kl_nar_aux: NotNegative | None = None
    """Weight of K(NAR, AUX)."""
    weight_kl_ar_ar: NotNegative | None = None
    """Weight of K(AR, AR') over two dropout draws of encoder and decoder (R-Drop); 0: one draw.

    K is the symmetric KL halved, as everywhere here, averaged over all AR tokens. With a weight on this or on
    one of the next two, each sample is computed twice in a step, and the other losses are means over both
    draws. R-Drop's code adds the cross-entropies of both draws to 5 K: that is weight_ar 2 and
    weight_kl_ar_ar 5, a pull of 2.5 K for each unit of cross-entropy (preset ar_rdrop).
    """
    weight_kl_nar_nar: NotNegative | None = None
    """Weight of K(NAR, NAR') over two dropout draws (preset released_finetune: 1)."""
    weight_kl_aux_aux: NotNegative | None = None
    """Weight of K(AUX, AUX') over two dropout draws (preset released_finetune: 1)."""
    encoder_passes: Annotated[int, Field(ge=1, le=2)] = 1
    """Dropout draws of the encoder: 1, or 2 (AR attends to one draw, NAR and AUX to another).

    2 is what the released translation code computes, as two calls of the model. Still one decoder pass; in
    evaluation the encoder always runs once.
    """
    label_smoothing: Rate | None = None
    """Share of the probability spread evenly over the vocabulary: .1 for NMT, 0 for released pretraining."""
    normalise: Annotated[str, OneOf("per_term", "target_tokens")] | None = None
    """per_term (each sum over its own global count) or target_tokens (all over the target tokens)."""
    ar_stream: Annotated[str, OneOf("query", "content")] | None = None
    """query (two streams) or content (the plain single-stream decoder)."""
    ar_query_position: Annotated[str, OneOf("predicted", "previous")] | None = None
    """predicted (the MASK stands at the token it predicts) or previous (released NMT code).

    null, and no preset given: as the run that `init` names.
    """
    decoder_start: Annotated[str, OneOf("bos", "eos_bos")] | None = None
    """bos (NMT: content b y1 .. yN) or eos_bos (BART: content e b w1 .. wn).

    null: as the run that `init` names, or else eos_bos for task denoise and bos for task pair.
    """
    length_convention: Annotated[str, OneOf("inner", "with_specials")] | None = None
    """inner (tokens without b and e) or with_specials (released: with b and e, clamped to the classes)."""
    mask_symbol: Annotated[str, OneOf("mask", "unk")] | None = None
    """mask (the own symbol) or unk (released NMT weights).

    null, and no preset given: as the run that `init` names.
    """
    ramp_start: Whole = 0
    """Update at which the ramps below begin; before it, what they ramp has weight 0."""
    ramp_kl_steps: Whole = 0
    """Updates over which all KL weights rise linearly from 0 to their values; 0: at once."""
    ramp_nar_steps: Whole = 0
    """The same for the weight of the NAR loss."""
    ramp_aux_steps: Whole = 0
    """The same for the weight of the AUX loss."""

    @property
    def kl_pairs(self) -> tuple[tuple[str, str], ...]:
        """The KL terms that have a weight."""
        return tuple(pair for pair in KL_PAIRS if getattr(self, f"weight_kl_{pair[0]}_{pair[1]}"))

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that some weight asks for, their own or that of a KL term; AR first."""
        paired = {name for pair in self.kl_pairs for name in pair}
        return tuple(name for name in STREAMS if name in paired or getattr(self, f"weight_{name}"))

    @property
    def dropout_draws(self) -> int:
        """Times that each sample is computed in a training step: 2 if two draws of a stream are compared."""
        return 2 if any(first == second for first, second in self.kl_pairs) else 1

    @property
    def one_draw(self) -> ObjectiveConfig:
        """The same for evaluation: without dropout two draws are equal, so there is one."""
        return replace(self, weight_kl_ar_ar=0.0, weight_kl_nar_nar=0.0, weight_kl_aux_aux=0.0)


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """AdamW with decoupled decay and the learning-rate schedule."""

    lr: Positive = 5e-4
    """Peak learning rate."""
    beta1: Rate = 0.9
    """Adam's first moment decay."""
    beta2: Rate = 0.98
    """Adam's second moment decay."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; biases and layer norms are exempt."""
    schedule: Annotated[str, OneOf("inverse_sqrt", "polynomial", "constant")] = "inverse_sqrt"
    """inverse_sqrt, polynomial (linear to zero at max_steps) or constant."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up."""
    warmup_init_lr: NotNegative = 1e-7
    """Learning rate at step 0."""
    clip_norm: NotNegative = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole run: what is trained. How it is executed stands in ds_configs/*.json."""

    name: str = "quickstart"
    """Name of the run; its folder is runs/NAME unless --output says otherwise."""
    init: str | None = None
    """Run folder or checkpoint to take weights from, or denoiser, which the package ships; null: random."""
    init_length_head: Annotated[str, OneOf("keep", "new")] = "keep"
    """keep: the length head comes from `init` where it fits; new: it is drawn from train.seed instead.

    GLGE's NAR fine-tuning starts with a new one: a pretraining that did not train lengths, or counted those
    of whole passages, has nothing to say about summaries or questions.
    """
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


FIELDS: dict[str, FieldSpec] = {spec.key: spec for spec in field_specs(RunConfig)}
"""Every field of a run by its dotted key, in the order above."""

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "masking": MaskingConfig,
    "objective": ObjectiveConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "decode": DecodeConfig,
}
"""The sections of a recipe."""

RUN_FILE = "run.json"
"""The record of a run, in its folder."""
RUN_FORMAT_VERSION = 1
"""The form of it that this version writes, and the newest that it reads."""


class Retired(NamedTuple):
    """A key that earlier versions had; recipes, run records and overrides may still hold it at `neutral`."""

    neutral: Any
    """The value that means what is done today."""
    reason: str
    """Why the others went."""
    harmless: bool = False
    """The others learnt the same: a run record may hold them, too."""


RETIRED: dict[str, Retired] = {
    "data.pack_rows": Retired(False, "use data.pad_multiple=1, whose steps took 1.07 times as long", True),
    "objective.ar_loss": Retired("all", "an AR loss on masked tokens alone cost 1.1 to 4.1 BLEU"),
    "objective.aux_share": Retired(1.0, "AUX on a part of the sentences cost 2.1 to 5.8 BLEU"),
    "train.batch_cost": Retired("tokens", "no recipe counted decoder rows instead of tokens"),
    "decode.length_pruning": Retired(False, "candidates that were given up early cost 0.6 to 2.3 BLEU"),
    "decode.rescore_weight": Retired(
        1.0, "a mixture of AR's and NAR's scores cost 1.0 BLEU at equal weights"
    ),
    "decode.rescore_samples": Retired(0, "samples for AR to score: 0.4 BLEU more in 1.7 times the time"),
    "decode.confidence": Retired(None, "decode.threshold settles single tokens by their probability"),
    "decode.redraft": Retired("reuse", "drafting anew was slower than what is left of earlier drafts"),
    "decode.draft_iterations": Retired(0, "refined drafts cost more passes than they saved"),
    "decode.draft_width": Retired(3, "several drafts in a check cost more time than the passes they saved"),
}
