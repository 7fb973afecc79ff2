"""Wrapper around DeepSpeed; the only caller of `deepspeed.initialize`.

What the rest of the package sees: forward a micro-batch, go backward, update, save, load, whole
weights. Dropout is seeded before each micro-batch from (seed, step, micro-batch, data-parallel rank), so a
step is a function of weights and step number, and a checkpoint needs no random state.

One micro-batch is one module call (:class:`TrainingStep`), of which `train.compile` compiles parts: `head`
the chunk mathematics of the loss (`objective.chunk_math`), `model` forward and backward of encoder and
decoder as well. Shapes come in buckets (`data.pad_multiple`), and the compiler takes them as unknown from the
second one on. Nothing but rounding changes, and dropout, which compiled code draws by another rule.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.checkpoint.tensors import Snapshot, open_saved
from janus_ds.config.deepspeed import ExecutionConfig
from janus_ds.config.schema import OptimConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.chunk_math import compiler_is_at_hand
from janus_ds.objective.janus_objective import JanusObjective, LossReport
from janus_ds.parallel.tensor_parallel import ParallelLayers, deepspeed_mpu
from janus_ds.parallel.topology import Topology
from janus_ds.train.master_state import MasterState


class TrainingStep(nn.Module):
    """Model and objective: a batch in, named losses out.

    Args:
        encoder_passes: dropout draws of the encoder (`objective.encoder_passes`).
    """

    def __init__(self, model: JanusModel, objective: JanusObjective, encoder_passes: int = 1) -> None:
        super().__init__()
        self._encoder_passes = encoder_passes
        self.model = model
        self.objective = objective

    def forward(
        self, batch: TwoStreamBatch, counts: BatchCounts, factors: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total of a micro-batch and its terms without gradient.

        Plain containers, not a dataclass: DeepSpeed looks for tensors in tuples and dicts only,
        and misses its hooks on anything else.

        Args:
            counts: counts of the whole step, over all micro-batches and ranks.
            factors: ramps of loss weights at this step.
        """
        report = self.objective(self.model(batch, self._encoder_passes), batch, counts, factors)
        return report.total, {name: value.detach() for name, value in report.terms.items()}


logger = logging.getLogger(__name__)

_SHAPES = 64
"""Compiled variants that one function may have before it runs uncompiled."""


def compile_step(step: TrainingStep, what: str, device: torch.device, backend: str = "inductor") -> None:
    """Make `step` compile at its first call; without a compiler, say so and leave it as it is."""
    if what == "none":
        return
    if not compiler_is_at_hand(device):
        logger.warning(
            "train.compile is %s, but there is no compiler for %s here (g++, or Triton on a GPU): "
            "the step runs uncompiled",
            what,
            device.type,
        )
        return
    step.objective.compiled_head = True
    if what == "head":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    # Not the model as a whole: it hands out its tied table, whose gradient would come in two ways.
    for part in (step.model.encoder, step.model.decoder):
        part.compile(backend=backend)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    applied: bool
    """False where a gradient is not finite, so that all weights are as before."""
    grad_norm: float
    """Global norm before clipping, without loss scale."""
    loss_scale: float
    """The scale that the step was computed with."""
    scaled: bool = False
    """fp16: a gradient that is not finite may come of too high a loss scale."""
    exhausted: bool = False
    """The update was left out, and the loss scale cannot come down any further."""


class TrainingEngine:
    """A training step under DeepSpeed, in any ZeRO stage, precision and tensor-parallel size.

    Args:
        step: model and objective, with the weights to start from, equal on all data-parallel ranks.
    """

    def __init__(
        self,
        step: TrainingStep,
        optim: OptimConfig,
        execution: ExecutionConfig,
        topology: Topology,
        parallel: ParallelLayers,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").addFilter(_not_about_dataclasses)
        # DeepSpeed still calls collectives by the names that torch is about to retire.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        self.topology = topology
        self._parallel = parallel
        self._stage = execution.zero_stage
        # DeepSpeed divides by both; losses here are parts of a sum over the whole step already.
        self._factor = execution.accumulation * execution.data_size
        self._mpu = deepspeed_mpu() if topology.tensor_size > 1 else None
        self._engine: Any = deepspeed.initialize(
            model=step,
            optimizer=_adamw(step, optim, topology.device, execution),
            config=execution.engine,
            mpu=self._mpu,
            dist_init_required=False,
        )[0]
        if self._stage == 3:
            # The objective reads the tied table outside of the module that owns it.
            deepspeed.zero.register_external_parameter(step, step.model.embedding.weight)
        self._master = MasterState(self._engine, self._engine.module.model, self._stage, topology, parallel)
        if self._mpu is not None and self._stage in (1, 2):
            # DeepSpeed's norm counts replicated parameters on the first tensor-parallel rank alone.
            self._engine.optimizer.check_grad_overflow = True
        self._scale = LossScale(getattr(self._engine.optimizer, "loss_scaler", None))
        self.largest_gradient: Tensor | None = None
        """The largest absolute value in this rank's gradient of the table, from the last micro-batch alone.

        Not finite where anything in that backward pass was not; a scalar on the device."""
        # Whatever goes wrong in a backward pass comes by here: it ends at the table of the embeddings.
        table: Any = step.model.embedding.weight
        table.register_hook(self._note_gradient)
        self.dtype = _DTYPES[execution.precision]

    def seed_dropout(self, seed: int, step: int, micro: int) -> None:
        """Seed dropout for one micro-batch; ranks of a tensor group agree where they must."""
        self._parallel.seed_rng(dropout_seed(seed, step, micro, self.topology.data_rank))

    def forward(
        self, batch: TwoStreamBatch, counts: BatchCounts, factors: Mapping[str, float] | None = None
    ) -> LossReport:
        """Losses of a micro-batch, as parts of sums over the global `counts`; `factors` are ramps."""
        total, terms = self._engine(batch.to(self.topology.device), counts, factors)
        return LossReport(total, terms)

    def backward(self, total: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's part of the loss."""
        self.largest_gradient = None
        self._engine.backward(total * self._factor)

    def update(self, learning_rate: float) -> Update:
        """Advance past the micro-batch just done; update the weights if it was the step's last."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        if not self._engine.is_gradient_accumulation_boundary():
            # The norm of an earlier step is on the device still: to read it would wait for this one.
            self._engine.step()
            return Update(False, 0.0, scale)
        if self._stage == 0:
            return self._update_unpartitioned(scale)
        exhausted = self._scale.remember()
        self._engine.step()
        self._scale.rise()
        applied = not getattr(self._engine.optimizer, "overflow", False)
        norm = self._engine.get_global_grad_norm()
        norm = math.nan if norm is None else float(norm)
        return Update(applied, norm, scale, self.dtype is torch.float16, exhausted and not applied)

    def forgive(self) -> None:
        """Put fp16's loss scale back: the step was left out for another reason than an overflow."""
        self._scale.put_back()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without dropout and without gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self._master.parameters

    def snapshot(self) -> Snapshot | None:
        """All that a checkpoint needs, on the host of rank 0; None elsewhere. All ranks together."""
        weights, moments = self._master.weights(), self._master.moments()
        if weights is None or moments is None:
            return None
        return Snapshot(weights, moments, self._master.counters)

    def restore(self, folder: Path, counters: dict[str, Any], step: int) -> None:
        """Continue from a checkpoint that any number of ranks wrote in any ZeRO stage."""
        with torch.no_grad(), open_saved(folder) as read:
            self._master.restore(read, counters)
        self._engine.global_steps = step
        self._engine.global_samples = step * self._engine.train_batch_size()

    def full_weights(self) -> dict[str, Tensor] | None:
        """All weights in fp32 under their canonical names on rank 0, None elsewhere.

        Collective: gathers ZeRO partitions and tensor-parallel shards.
        """
        return self._master.weights()

    def _update_unpartitioned(self, scale: float) -> Update:
        # Without ZeRO nothing in DeepSpeed looks at the gradient before the optimizer takes it.
        from deepspeed.runtime.utils import clip_grad_norm_

        parameters = list(self._engine.module.parameters())
        norm = float(clip_grad_norm_(parameters, max_norm=math.inf, mpu=self._mpu))
        if math.isfinite(norm):
            self._engine.step()
            return Update(True, norm, scale)
        self._engine.zero_grad()
        self._engine.micro_steps += 1
        return Update(False, norm, scale)

    def _note_gradient(self, gradient: Tensor) -> None:
        self.largest_gradient = torch.linalg.vector_norm(gradient.detach(), math.inf)


def _not_about_dataclasses(record: logging.LogRecord) -> bool:
    # ZeRO-3 finds no tensors in the model's dataclass and warns. It needs none there: the one
    # parameter used outside of its module is registered with the step, whose outputs are plain.
    return "unknown inputs or outputs type" not in record.getMessage()


def dropout_seed(seed: int, step: int, micro: int, data_rank: int) -> int:
    """A 63-bit seed that is a function of its arguments on every machine."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro, data_rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _adamw(
    step: TrainingStep, optim: OptimConfig, device: torch.device, execution: ExecutionConfig
) -> torch.optim.AdamW:
    """Torch's AdamW with decoupled decay for matrices; biases and layer norms are exempt.

    Not DeepSpeed's fused Adam: on CPU it would be compiled at the first start.
    """
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=device.type == "cuda" and not execution.offload,
    )


_FIELDS = ("cur_scale", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """The scaler of a DeepSpeed optimizer, if it has a dynamic one.

    DeepSpeed ends a run by an exception in the midst of a step when the scale is at its minimum, for a
    bad sample too; here the scale stays there, and the guards decide. It also raises the scale before it
    divides the gradient by it, which would halve that step's gradient; here the scale rises afterwards.

    Args:
        scaler: DeepSpeed's; None or a static one makes all of this do nothing.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler if getattr(scaler, "dynamic", False) else None
        self._before: dict[str, Any] = {}
        self._next = 1.0
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False
            self._scaler.update_scale = partial(self._without_rise, self._scaler, self._scaler.update_scale)

    def remember(self) -> bool:
        """Before an update: note the scale. True where one more overflow could not lower it."""
        scaler = self._scaler
        if scaler is None:
            return False
        self._before = {name: getattr(scaler, name) for name in _FIELDS}
        self._next = scaler.cur_scale
        patient = scaler.delayed_shift > 1 and scaler.cur_hysteresis > 1
        return bool(scaler.cur_scale <= scaler.min_scale and not patient)

    def rise(self) -> None:
        """After an update: the scale of the next one."""
        if self._scaler is not None:
            self._scaler.cur_scale = self._next

    def put_back(self) -> None:
        """Undo what the last update did to the scale."""
        for name, value in self._before.items():
            setattr(self._scaler, name, value)

    def _without_rise(self, scaler: Any, update: Callable[[bool], None], overflow: bool) -> None:
        before = scaler.cur_scale
        update(overflow)
        self._next = scaler.cur_scale
        scaler.cur_scale = min(before, self._next)
