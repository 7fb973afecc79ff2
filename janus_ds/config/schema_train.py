"""The sections `train` and `decode` of a run: what happens along it, and how text is generated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from janus_ds.config.fields import STRICT, Count, NotNegative, OneOf, Positive, Whole

_Task = OneOf("nmt", "cnndm", "gigaword", "xsum", "msnews", "squadqg", "msqg", "coqa", "personachat")
_TokenOrNone = Annotated[int, Field(ge=-1)]


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Length of the run and what happens along it."""

    seed: Whole = 1
    """Seed of weights, order, masks and dropout."""
    global_batch: Count = 32
    """Samples an update, over all ranks and micro-batches (data.batch samples)."""
    batch_tokens: Count = 4096
    """Tokens an update, over all ranks and micro-batches, padding included (data.batch tokens).

    Of a pair its longer side with bos and eos counts, as in fairseq's --max-tokens: the same samples an
    update whatever the objective.
    """
    batch_groups: Count = 1
    """Groups of samples of like length that an update is put together from.

    Samples of a group have about the same length, groups come in mixed order: with several, an update
    sees several lengths. Each is train.batch_tokens / train.batch_groups large.
    """
    max_steps: Count = 300
    """Updates of the run."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    monitor: Annotated[str, OneOf("none", "wandb")] = "none"
    """Where the scalars go besides: none or wandb.

    wandb: needs the extra janus_ds[wandb]; WANDB_MODE=offline keeps them in RUN/wandb, its other variables
    and `wandb login` count as always. What fails there is a warning: a run never ends for its monitor.
    """
    valid_every: Whole = 100
    """Steps between validations; 0: only at the end."""
    valid_samples: Count = 256
    """Samples of the validation split that are used."""
    save_every: Count = 100
    """Steps between checkpoints; one is always written at the end."""
    keep_last: Count = 2
    """The newest so many checkpoints stay on disk."""
    keep_every: Whole = 0
    """Checkpoints of steps that are a multiple of this stay as well; 0: none.

    A multiple of train.save_every, since there are no others. The weights of the best validation stay
    apart from both, in checkpoints/best (train.keep_best).
    """
    max_failed_saves: Count = 3
    """Checkpoints in a row that may fail before the run ends with an error.

    A full disk, or storage that is gone, is a warning; training goes on, the checkpoint before stays
    whole, and the next save tries again. The last save of a run must succeed.
    """
    sample_every: Whole = 0
    """Steps between decoded samples in TensorBoard; 0: with each validation."""
    valid_bleu: Annotated[str, OneOf("none", "ar", "nar", "ar,nar")] = "none"
    """Modes whose outputs are scored with each validation (task pair): none, ar, nar, or ar,nar.

    By BLEU, or by the metric of another valid_task.
    """
    valid_task: Annotated[str, _Task] = "nmt"
    """Task whose metric scores them: nmt, or a task of GLGE.

    nmt: BLEU. cnndm, gigaword, xsum, msnews: mean of ROUGE-1, -2 and -L (their OVERALL). squadqg, msqg: mean
    of ROUGE-L and BLEU-4 (OVERALL without METEOR, which needs Java). coqa: F1. personachat: BLEU-2.
    """
    valid_bleu_samples: Whole = 0
    """Sentences of the validation set that are decoded for it, from the first; 0: all."""
    valid_bleu_iterations: Whole = 4
    """NAR refinement iterations in it; AR is decoded greedily."""
    keep_best: Annotated[str, OneOf("none", "loss", "ar", "nar")] = "none"
    """What decides which weights checkpoints/best holds: none, loss (held out), or the score of ar or nar."""
    patience: Whole = 0
    """Validations in a row without a better one after which the run ends; 0: never.

    Better is what improves the figure of keep_best or the score of any mode of valid_bleu.
    """
    max_bad_steps: Count = 5
    """Steps in a row with a loss or gradient that is not finite, or with a spike, before the run gives up."""
    max_overflows: Count = 40
    """fp16: steps in a row whose gradient overflows before the run gives up.

    An overflow halves the dynamic loss scale and is no fault; a streak is. At the scale's minimum
    (fp16.min_loss_scale) the run gives up at once.
    """
    spike_action: Annotated[str, OneOf("off", "warn", "skip", "stop")] = "warn"
    """What a spike of the loss does: off, warn, skip (the step does not count) or stop (the run ends).

    A spike is a loss above median + train.spike_factor deviations of the last train.spike_window losses that
    counted, over all ranks. skip and stop act before the update; train.max_bad_steps of them end the run.
    """
    spike_factor: Positive = 10.0
    """Deviations (1.4826 x the median absolute deviation, at least 1 % of the median) above the median."""
    spike_window: Annotated[int, Field(ge=8, le=10_000)] = 100
    """Losses that a spike is measured against; none is seen before there are so many."""
    stall_minutes: NotNegative = 10.0
    """Minutes without progress on any rank after which a watchdog ends the run with exit code 76; 0: never.

    It names the ranks that the others wait for and writes stacks to RUN/stacks/rankN.txt. The first step of a
    start, validations and saves get three times as long. A launcher or Slurm starts the run again.
    """
    time_limit: NotNegative = 0.0
    """Minutes after which a start saves and ends with exit code 75; 0: none.

    In a Slurm job whose end is known (SLURM_JOB_END_TIME), a run stops two minutes before it anyway.
    """
    activation_checkpointing: bool = False
    """Recompute layers in the backward pass (non-reentrant) to save memory."""
    compile: Annotated[str, OneOf("none", "head", "model")] = "none"
    """What torch.compile makes faster: none, head or model.

    head: the mathematics of the losses, one walk over the logits where there were many. model: the model
    too, forward and backward. Needs a C++ compiler (Triton on a GPU); without one the run says so and goes on
    uncompiled. The first steps take a minute longer.
    """
    attention_backend: Annotated[str, OneOf("auto", "dense", "grouped")] = "auto"
    """How decoder rows attend to one another: auto, dense or grouped. All compute the same.

    dense: one call under one mask, fastest for short sentences (up to 48 tokens). grouped: a call a group
    of rows, masks only where needed. auto: dense for short sentences, else grouped.
    """


@dataclass(frozen=True, config=STRICT)
class DecodeConfig:
    """How text is generated (section 3.4 of the paper)."""

    mode: Annotated[str, OneOf("ar", "nar", "draft", "aux")] = "nar"
    """ar, nar, draft or aux.

    draft: NAR drafts and AR checks, the output is that of AR with beam 1 (needs both). aux: NAR drafts and
    AUX checks, the output is what AUX writes token by token (needs AUX).
    """
    prefix: str = ""
    """AR: text that every output begins with."""
    beam: Annotated[int, Field(ge=1, le=1000)] = 5
    """AR beam, up to 1000; 1 is greedy, as the modes draft and aux always are."""
    beam_stop: Annotated[str, OneOf("fairseq", "transformers", "never")] = "fairseq"
    """fairseq, transformers or never: when the search ends and what forced tokens cost.

    never: as transformers with its early_stopping "never".
    """
    early_stopping: bool = False
    """beam_stop transformers only: end a search as soon as `beam` hypotheses are finished."""
    length_penalty: NotNegative = 1.0
    """Exponent of the length in the AR score."""
    max_length: Whole = 0
    """Longest output in tokens; 0: as the position table allows."""
    min_length: Whole = 0
    """AR: shortest output in tokens."""
    no_repeat_ngram_size: Whole = 0
    """AR: a sequence of so many tokens occurs once in an output; 0: as often as it likes."""
    repetition_penalty: Positive = 1.0
    """AR: factor that makes log-probabilities of tokens worse that the output has already; 1: none.

    As in transformers: of log-probabilities in a beam, of logits in greedy search and sampling.
    """
    forced_bos: _TokenOrNone | None = None
    """AR: id of the token that every output begins with; -1: none; null: bos after eos (BART), else none."""
    forced_eos: _TokenOrNone | None = None
    """AR: id of the token that an output of the greatest length ends with; -1: any; null: eos."""
    forbid: str = "specials"
    """AR: tokens that are never written: specials (bos, pad, unk and mask), none, or ids such as "3 101"."""
    iterations: Annotated[int, Field(ge=0, le=1000)] | None = 4
    """NAR refinement iterations, up to 1000; decoder passes are one more. null, by `threshold`: no limit."""
    length_beam: Annotated[int, Field(ge=1, le=1000)] = 5
    """Length candidates of NAR and of mode aux, up to 1000."""
    aux_order: Annotated[str, OneOf("left_to_right", "certain")] = "left_to_right"
    """Mode aux: left_to_right, or certain: what NAR is surest of is written first.

    certain needs a model that was trained with `masking.aux_order: random`.
    """
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """NAR: a pass settles every token of a higher probability, and at least one, until none is masked.

    Takes the place of mask-predict's schedule; `iterations` then limits the passes. null: the schedule.
    """
    nar_score: Annotated[str, OneOf("paper", "released")] | None = None
    """NAR candidates and their score, of mode aux the lengths alone; null: as the objective's preset says.

    paper (the likeliest lengths, mean over inner tokens, special symbols forbidden) or released
    (neighbours of the likeliest length, sum divided by the length with b and e, nothing forbidden).
    """
    rescore: Annotated[str, OneOf("ar")] | None = None
    """NAR: `ar` lets AR score the candidates of mask-predict, in one pass of the same weights."""
    temperature: NotNegative = 0.0
    """Above 0, exact samples at this temperature: of AR's distribution (modes ar, draft) or AUX's (aux).

    Mode ar draws `beam` samples of each input token by token; by rejection sampling, draft draws one and aux
    one of each of `length_beam` lengths.
    """
    top_k: Whole = 0
    """Samples: draw from so many of the likeliest tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples: draw from the likeliest tokens that have this probability together."""
    seed: Whole = 1
    """Of the samples."""
