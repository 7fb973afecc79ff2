"""What a run is, field by field: frozen dataclasses filled from `launch/recipes/*.yaml`.

`python -m janus_ds explain KEY` prints the text below a field. Fields that are `None` take the
value that the objective's preset bundles (`config/presets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from janus_ds.config.decode_schema import DecodeConfig

__all__ = [
    "DataConfig",
    "DecodeConfig",
    "MaskingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder-decoder (post-norm, learned positions, all embeddings tied)."""

    preset: str | None = None
    """Shape whose values fill the fields not given: quickstart, iwslt, wmt, bart_base, bart_large, 1b."""
    d_model: int = 128
    """Width D of every row."""
    encoder_layers: int = 2
    """Number of encoder layers."""
    decoder_layers: int = 2
    """Number of decoder layers."""
    ffn_dim: int = 512
    """Inner width of the feed-forward blocks."""
    heads: int = 4
    """Attention heads; must divide d_model."""
    activation: str = "gelu"
    """relu (NMT Transformer) or gelu (BART, exact erf form)."""
    max_source_positions: int = 1024
    """Rows of the encoder's position table: the longest source, bos and eos included."""
    max_target_positions: int = 1024
    """Rows of the decoder's position table: the longest target, bos and eos included."""
    layernorm_embedding: bool = True
    """Layer norm after the embeddings, on every row (BART); off for the NMT Transformer."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(d_model) (NMT Transformer)."""
    dropout: float = 0.1
    """Dropout after embeddings and after each sublayer."""
    attention_dropout: float = 0.1
    """Dropout on attention weights."""
    activation_dropout: float = 0.0
    """Dropout inside the feed-forward block, after the activation."""
    length_classes: int | None = None
    """Classes of the length head; None: 256 under the `released` convention, else max_target_positions."""
    init_std: float = 0.02
    """Standard deviation of the normal distribution that weights are drawn from."""
    vocab_multiple: int = 8
    """The embedding table is padded to a multiple of this, so that it divides under tensor parallelism."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    path: str | None = None
    """Where launch/prepare_data.py's directory lies; None: the bundled corpus, prepared on first use.

    A folder, an address (http://, https://, s3://, gs:// or any of fsspec's), or a command that writes a
    file of it to standard output, with {} for the file's name: `pipe:ssh HOST cat DIR/{}`. In an address,
    ${NAME} stands for the environment's value, so that passwords need not be written down. Several with
    weights are mixed: `wiki=0.7,books=0.3`.
    """
    valid_path: str | None = None
    """Directory of validation shards, given in the same way; None: `path`/valid."""
    task: str = "denoise"
    """denoise (pretraining: source is the noised target) or pair (source and target are given)."""
    batch: str = "samples"
    """What an update holds: samples (train.global_batch of them) or tokens (train.batch_tokens)."""
    block_tokens: int = 126
    """Longest target without bos and eos; longer blocks are refused by name."""
    shuffle_window: int = 8
    """Block shuffle: samples mix inside windows of this many packed members."""
    shuffle_shards: int = 0
    """Members mix inside groups of this many shards, which come in mixed order; 0: over all shards.

    Needed for distant data larger than data.cache_gb: without it, one window touches shards from everywhere.
    """
    workers: int = 1
    """Prefetching worker processes a rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that each worker prepares ahead."""
    pad_multiple: int = 8
    """Segment widths are padded to a multiple of this, which bounds the number of distinct shapes.

    For sentences of some 20 tokens, 1 or 2 where shapes cost nothing (train.compile none or head): with 8, a
    fifth of the decoder rows and more are padding (`python -m janus_ds bench data --shape pairs` counts it).
    """
    pack_rows: bool = False
    """Rows of all samples of a batch one after the other, without padding between them.

    Only attention spreads them into samples. Worth it where lengths differ: samples as they come, or sources
    whose lengths differ from their targets'. `pad_multiple` then fills up the sum, not each sample. Measured
    on CPUs only; not with train.compile graphs, since every batch has its own shape.
    """
    cache_dir: str = ""
    """Folder that keeps what is fetched, shared by all processes of a machine; empty: the user's cache."""
    cache_gb: float = 50.0
    """Most that fetched shards may take there, in GB; the least recently used go first."""
    read_ahead: int = 2
    """Shards fetched before they are needed, in the order of the run; distant data only."""
    retries: int = 5
    """Further tries of a transfer that failed or brought damaged bytes, with growing pauses."""
    stall_seconds: float = 60.0
    """A transfer that brings nothing for so long has failed."""
    on_damage: str = "stop"
    """What a damaged member (one checksum, many samples) does to a run: stop or quarantine.

    quarantine: its samples are listed in RUN/quarantine.jsonl, and each is replaced by a sample of the next
    whole member, on any number of ranks by the same one.
    """
    max_damage: float = 0.1
    """Share of the members that may be damaged before quarantine gives up and stops the run."""


@dataclass(frozen=True)
class MaskingConfig:
    """How views are made of a sample (sections 2 and 3.3 of the paper). None: as the preset says."""

    target: str | None = None
    """How target tokens are masked.

    span_union (spans until their union reaches the share), span_overlap (the released law), uniform
    (CMLM), infilling (pretraining: the encoder's spans and further ones) or infilling_released.
    """
    target_share: float | None = None
    """Share of the target to mask: .7 for NMT, .5 for pretraining."""
    source_share: float | None = None
    """Share of tokens hidden from the encoder in pretraining: .3."""
    poisson: float | None = None
    """Mean of the Poisson law of span lengths: 2 in the paper, 3 in the released pretraining."""
    rotate_share: float | None = None
    """Share of samples whose encoder input is rotated (released pretraining: .5; paper: 0)."""
    aux_order: str | None = None
    """Order in which AUX predicts the masked tokens: left_to_right, or random (drawn for each sample).

    random makes AUX an any-order model; `released_finetune` uses it.
    """


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss weights and conventions (section 3 of the paper, eq. 5). None: as the preset says."""

    preset: str = "paper"
    """paper, released, ar, ar_query, cmlm, ar_rdrop, ar_query_rdrop or released_finetune."""
    weight_ar: float | None = None
    """Weight of the AR loss; 0 leaves its rows out."""
    weight_nar: float | None = None
    """Weight of the NAR loss."""
    weight_aux: float | None = None
    """Weight of the AUX loss."""
    weight_length: float | None = None
    """Weight of the length loss; 1 harms badly, keep .1."""
    weight_kl_ar_nar: float | None = None
    """Weight of K(AR, NAR), the symmetric KL halved."""
    weight_kl_ar_aux: float | None = None
    """Weight of K(AR, AUX)."""
    weight_kl_nar_aux: float | None = None
    """Weight of K(NAR, AUX)."""
    weight_kl_ar_ar: float | None = None
    """Weight of K(AR, AR') over two dropout draws of encoder and decoder (R-Drop); 0: one draw.

    K is the symmetric KL halved, as everywhere here, averaged over all AR tokens. With a weight on this or on
    one of the next two, each sample is computed twice in a step, and the other losses are means over both
    draws. R-Drop's code adds the cross-entropies of both draws to 5 K: that is weight_ar 2 and
    weight_kl_ar_ar 5, a pull of 2.5 K for each unit of cross-entropy (preset ar_rdrop).
    """
    weight_kl_nar_nar: float | None = None
    """Weight of K(NAR, NAR') over two dropout draws (preset released_finetune: 1)."""
    weight_kl_aux_aux: float | None = None
    """Weight of K(AUX, AUX') over two dropout draws (preset released_finetune: 1)."""
    encoder_passes: int = 1
    """Dropout draws of the encoder: 1, or 2 (AR attends to one draw, NAR and AUX to another).

    2 is what the released translation code computes, as two calls of the model. Still one decoder pass; in
    evaluation the encoder always runs once.
    """
    label_smoothing: float | None = None
    """Share of the probability spread evenly over the vocabulary: .1 for NMT, 0 for released pretraining."""
    normalise: str | None = None
    """per_term (each sum over its own global count) or target_tokens (all over the target tokens)."""
    ar_stream: str | None = None
    """query (two streams) or content (the plain single-stream decoder)."""
    ar_query_position: str | None = None
    """predicted (the MASK stands at the token it predicts) or previous (released NMT code)."""
    decoder_start: str | None = None
    """bos (NMT: content b y1 .. yN) or eos_bos (BART: content e b w1 .. wn).

    None: as the run that `init` names, or else eos_bos for task denoise and bos for task pair.
    """
    length_convention: str | None = None
    """inner (tokens without b and e) or with_specials (released: with b and e, clamped to the classes)."""
    mask_symbol: str | None = None
    """mask (the own symbol) or unk (released NMT weights)."""
    ar_loss: str = "all"
    """Tokens that the AR loss is summed over: all, or masked (the masked ones and eos).

    masked computes that many AR query rows fewer, about half of them. It changes the estimator: masked
    tokens are not drawn evenly along a sentence, and nothing corrects for it. Validation counts all tokens.
    """
    aux_share: float = 1.0
    """Share of the sentences that AUX and all KL terms are trained on; the others have no AUX rows.

    Drawn as masks are, by seed, epoch and sample. Below 1 it changes the estimator: the same mean from fewer
    sentences, so noisier. Validation uses all sentences.
    """
    ramp_start: int = 0
    """Update at which the ramps below begin; before it, what they ramp has weight 0."""
    ramp_kl_steps: int = 0
    """Updates over which all KL weights rise linearly from 0 to their values; 0: at once."""
    ramp_nar_steps: int = 0
    """The same for the weight of the NAR loss."""
    ramp_aux_steps: int = 0
    """The same for the weight of the AUX loss."""

    @property
    def dropout_draws(self) -> int:
        """Times that each sample is computed in a training step: 2 if two draws of a stream are compared."""
        return 2 if self.weight_kl_ar_ar or self.weight_kl_nar_nar or self.weight_kl_aux_aux else 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with decoupled decay and the learning-rate schedule."""

    lr: float = 5e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.98
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and layer norms are exempt."""
    schedule: str = "inverse_sqrt"
    """inverse_sqrt, polynomial (linear to zero at max_steps) or constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    warmup_init_lr: float = 1e-7
    """Learning rate at step 0."""
    clip_norm: float = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what happens along it."""

    seed: int = 1
    """Seed of weights, order, masks and dropout."""
    global_batch: int = 32
    """Samples an update, over all ranks and micro-batches (data.batch samples)."""
    batch_tokens: int = 4096
    """Tokens an update, over all ranks and micro-batches, padding included (data.batch tokens)."""
    batch_groups: int = 1
    """Groups of samples of like length that an update is put together from.

    Samples of a group have about the same length, groups come in mixed order: with several, an update
    sees several lengths. Each is train.batch_tokens / train.batch_groups large.
    """
    batch_cost: str = "tokens"
    """What train.batch_tokens counts: tokens or rows.

    tokens: the longer side of a pair with bos and eos, as fairseq's --max-tokens; the same samples an
    update whatever the objective. rows: decoder rows, 3 N + 2 M for JANUS with M masked tokens expected
    and N for ar, which follow memory and time.
    """
    max_steps: int = 300
    """Updates of the run."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    valid_every: int = 100
    """Steps between validations; 0: only at the end."""
    valid_samples: int = 256
    """Samples of the validation split that are used."""
    save_every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """The newest so many checkpoints stay on disk."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay as well; 0: none.

    A multiple of train.save_every, since there are no others. The weights of the best validation stay
    apart from both, in checkpoints/best (train.keep_best).
    """
    max_failed_saves: int = 3
    """Checkpoints in a row that may fail before the run ends with an error.

    A full disk, or storage that is gone, is a warning; training goes on, the checkpoint before stays
    whole, and the next save tries again. The last save of a run must succeed.
    """
    sample_every: int = 0
    """Steps between decoded samples in TensorBoard; 0: with each validation."""
    valid_bleu: str = "none"
    """Modes whose outputs are scored with each validation (task pair): none, ar, nar, or ar,nar.

    By BLEU, or by the metric of another valid_task.
    """
    valid_task: str = "nmt"
    """Task whose metric scores them: nmt, or a task of GLGE.

    nmt: BLEU. cnndm, gigaword, xsum, msnews: mean of ROUGE-1, -2 and -L (their OVERALL). squadqg, msqg: mean
    of ROUGE-L and BLEU-4 (OVERALL without METEOR, which needs Java). coqa: F1. personachat: BLEU-2.
    """
    valid_bleu_samples: int = 0
    """Sentences of the validation set that are decoded for it, from the first; 0: all."""
    valid_bleu_iterations: int = 4
    """NAR refinement iterations in it; AR is decoded greedily."""
    keep_best: str = "none"
    """What decides which weights checkpoints/best holds: none, loss (held out), or the score of ar or nar."""
    patience: int = 0
    """Validations in a row without a better one after which the run ends; 0: never.

    Better is what improves the figure of keep_best or the score of any mode of valid_bleu.
    """
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite, or with a spike, before the run gives up."""
    max_overflows: int = 40
    """fp16: steps in a row whose gradient overflows before the run gives up.

    An overflow halves the dynamic loss scale and is no fault; a streak is. At the scale's minimum
    (fp16.min_loss_scale) the run gives up at once.
    """
    spike_action: str = "warn"
    """What a spike of the loss does: off, warn, skip (the step does not count) or stop (the run ends).

    A spike is a loss above median + train.spike_factor deviations of the last train.spike_window losses that
    counted, over all ranks. skip and stop act before the update; train.max_bad_steps of them end the run.
    """
    spike_factor: float = 10.0
    """Deviations (1.4826 x the median absolute deviation, at least 1 % of the median) above the median."""
    spike_window: int = 100
    """Losses that a spike is measured against; none is seen before there are so many."""
    stall_minutes: float = 10.0
    """Minutes without progress on any rank after which a watchdog ends the run with exit code 76; 0: never.

    It names the ranks that the others wait for and writes stacks to RUN/stacks/rankN.txt. The first step of a
    start, validations and saves get three times as long. A launcher or Slurm starts the run again.
    """
    time_limit: float = 0.0
    """Minutes after which a start saves and ends with exit code 75; 0: none.

    In a Slurm job whose end is known (SLURM_JOB_END_TIME), a run stops two minutes before it anyway.
    """
    activation_checkpointing: bool = False
    """Recompute layers in the backward pass (non-reentrant) to save memory."""
    compile: str = "none"
    """What torch.compile makes faster: none, head, model or graphs.

    head: the mathematics of the losses, one walk over the logits where there were many. model: the model
    too, forward and backward. graphs: the compiled model as CUDA graphs. Needs a C++ compiler (Triton on a
    GPU); without one the run says so and goes on uncompiled. The first steps take a minute longer.
    """
    attention_backend: str = "auto"
    """How decoder rows attend to one another: auto, dense, grouped or flex. All compute the same.

    dense: one call under one mask, fastest for short sentences (up to 48 tokens). grouped: a call a group
    of rows, masks only where needed. flex (experimental): FlexAttention, one call that skips what no row
    sees; training on GPUs only, no attention dropout, and not measured yet, so never chosen by itself.
    auto: dense for short sentences, else grouped.
    """


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what is trained. How it is executed stands in ds_configs/*.json."""

    name: str = "quickstart"
    """Name of the run; its folder is runs/NAME unless --output says otherwise."""
    init: str | None = None
    """Run folder or checkpoint to take weights from; None: random."""
    init_length_head: str = "keep"
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
