"""Reading a DeepSpeed JSON: keys that may stand in it, batch sizes, and that it contradicts no recipe.

DeepSpeed itself accepts a misspelt key at the top level in silence (`gradient_cliping` clips at 1.0
whatever its value). The lists of keys are literal, since importing DeepSpeed to ask it takes seconds; a
unit test holds them against the installed DeepSpeed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from janus_ds.config.fields import FaultList, shown
from janus_ds.config.locations import read_text
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError, suggestion

TOKEN_VALIDATION_SAMPLES = 64
"""Samples of a validation batch where training batches are counted in tokens."""

AUTO_TARGET_TOKENS = 32_768
"""What "auto" allows a micro-batch to hold: 64 samples of 512 target tokens."""

_LARGEST = 10**12
_REPEAT = 'leave the block out, write "auto", or change the recipe'

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

SECTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(keys.split())
    for name, keys in {
        "zero_optimization": """
            stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
            allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
            elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size
            stage3_prefetch_bucket_size stage3_param_persistence_threshold
            stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
            stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
            stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters
            legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size
            zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
            memory_efficient_linear pipeline_loading_checkpoint override_module_apply
            log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module""",
        "zero_optimization.offload_optimizer": """
            device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio
            super_offload cpuadam_cores_perc""",
        "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        "fp16": """
            enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis
            consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads""",
        "bf16": """
            enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads
            bf16_optimizer_states""",
        "optimizer": "type params legacy_fusion",
        "scheduler": "type params",
        "comms_logger": "enabled verbose prof_all debug prof_ops",
        "flops_profiler": """
            enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file""",
        "data_types": "grad_accum_dtype",
    }.items()
}
"""Sections and the keys in them."""

_PLAIN_KEYS = """
    gradient_clipping steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level
    communication_data_type prescale_gradients gradient_predivide_factor disable_python_gc
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"""
KNOWN = (*BATCH_KEYS, *(name for name in SECTIONS if "." not in name), *_PLAIN_KEYS.split())
"""All keys that may stand at the top level."""

_MONITORS = "leave it out; RUN/metrics.jsonl and RUN/tensorboard hold all figures; wandb: train.monitor"
_WHAT_IS_TRAINED = "leave it out; data and its order belong to the recipe"
REFUSED: dict[str, str] = {
    "tensor_parallel": "leave it out and give --tensor-parallel N; this section is DeepSpeed's AutoTP",
    "torch_autocast": "use bf16 or fp16; their master weights are fp32",
    "bfloat16": "write bf16",
    "amp": "use bf16 or fp16",
    "activation_checkpointing": "set train.activation_checkpointing in the recipe",
    "checkpoint": "leave it out; the trainer does this itself",
    "pipeline": "leave it out; the model has no pipeline stages",
    "elasticity": "leave it out; the global batch is fixed by train.global_batch",
    "autotuning": "leave it out; set micro-batch and ZeRO stage here",
    **dict.fromkeys(("compression_training", "weight_quantization"), "leave it out; weights are whole"),
    "hybrid_engine": "leave it out; it is made for reinforcement learning",
    "expert_parallel": "leave it out; the model has no experts",
    "sparse_attention": "leave it out; attention follows the two-stream rule",
    "sparse_gradients": "leave it out; the embeddings are tied to the output layer",
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "dataloader_drop_last"), _WHAT_IS_TRAINED),
    "gradient_allreduce_op": "leave it out; losses are scaled for the mean over ranks",
    "managed_gradient_accumulation": "leave it out; the trainer counts on DeepSpeed's own boundaries",
    **dict.fromkeys(("comet", "csv_monitor", "tensorboard", "wandb"), _MONITORS),
    "aio": "leave it out; NVMe offload is not supported",
}
"""Keys of DeepSpeed that are not passed on, and what to do; blocks with `"enabled": false` pass."""

_UNSEEN = "a gradient that is not finite would go into the weights unseen"
_UNTRIED = "weights or gradients would be sent in 8 bits and less, which nobody has tried here"
_ONLY: tuple[tuple[str, str, Any, str], ...] = (
    ("zero_optimization", "compute_grad_norm", True, _UNSEEN),
    ("zero_optimization", "ignore_unused_parameters", True, "a loss without a weight leaves some unused"),
    ("zero_optimization", "legacy_stage1", False, "DeepSpeed has no such stage 1 any more"),
    ("zero_optimization", "zenflow", False, "it has an optimizer of its own"),
    ("zero_optimization", "zero_quantized_weights", False, _UNTRIED),
    ("zero_optimization", "zero_quantized_nontrainable_weights", False, _UNTRIED),
    ("zero_optimization", "zero_quantized_gradients", False, _UNTRIED),
    ("zero_optimization", "zero_hpz_partition_size", 1, "a second partition of the weights is untried here"),
    ("zero_optimization", "stage3_module_granularity_threshold", 0, "its backward pass fails here"),
    ("zero_optimization", "leaf_module", {}, "modules fetched as one are untried here"),
    ("zero_optimization.offload_optimizer", "super_offload", False, "it needs DeepSpeed's CPU Adam"),
    ("zero_optimization.offload_optimizer", "ratio", 1, "to offload a part needs DeepSpeed's CPU Adam"),
    ("fp16", "fp16_master_weights_and_grads", False, "it needs DeepSpeed's CPU Adam, and they are fp32 here"),
    ("bf16", "bf16_master_weights_and_grads", False, "master weights are fp32 here"),
    ("bf16", "bf16_optimizer_states", False, "Adam's moments are fp32 here"),
    ("bf16", "check_grad_overflow", True, _UNSEEN),
)
"""Keys of sections with the one value that they may have, and why."""

_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "communication_data_type": ("fp32", "fp16", "bf16"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1,),
}
"""Values of plain keys; others end in a stack trace, or in stage 3 in gradients that are too small."""

SUM_TYPES = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
"""How DeepSpeed lets a type be written."""


class DeepSpeedFile:
    """A DeepSpeed JSON, read for one run; what is wrong is added to `faults`, and a default goes on for it.

    Attributes:
        values: what the file holds, without sections that are no objects and without null.
    """

    def __init__(self, path: Path, run: RunConfig, faults: FaultList) -> None:
        self._path, self._run, self._faults = path, run, faults
        self.values = self._read()
        self._check_keys()

    def refuse(self, key: str, what: str, fix: str) -> None:
        """Add a fault of a key."""
        self._faults.add(what, f"{self._path}: {key[:100]}", fix)

    def section(self, name: str) -> dict[str, Any]:
        """A section; empty where there is none."""
        values: dict[str, Any] = self.values.get(name) or {}
        return values

    def _read(self) -> dict[str, Any]:
        what, example = "the DeepSpeed configuration", "a file such as ds_configs/zero2.json"
        text = read_text(self._path, what, example, self._faults)
        if text is None:
            return {}
        where, fix = str(self._path), "mend that line"
        try:
            values = json.loads(text, object_pairs_hook=self._object, parse_constant=_not_json)
        except json.JSONDecodeError as error:
            where, problem = f"{where}:{error.lineno}", error.msg
            if text[error.pos :].lstrip().startswith(("//", "/*", "#")):
                problem, fix = "it has a comment", "leave the comment out; JSON has none"
            elif text.startswith("\ufeff"):
                problem = "it begins with a byte-order mark (BOM)"
                fix = f"save it as UTF-8 without BOM: sed -i '1s/^\\xEF\\xBB\\xBF//' {self._path}"
            elif not text.strip():
                problem, fix = "it is empty", "begin with a file of those that `janus-ds init DIR` copies"
        except RecursionError:
            problem, fix = "it is nested too deeply", "write sections of keys and values"
        except ValueError as error:
            problem = str(error).split(";")[0]
        else:
            if isinstance(values, dict):
                return {key: value for key, value in values.items() if value is not None}
            self._faults.add(f"{what} is not a JSON object", where, "start it with {")
            return {}
        self._faults.add(f"{what} is not valid JSON: {problem}", where, fix)
        return {}

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            for name in dict.fromkeys(n for n in names if names.count(n) > 1):
                self.refuse(name, f"the key {shown(name)} is given twice", "keep one of them")
        return dict(pairs)

    def _check_keys(self) -> None:
        for key, value in list(self.values.items()):
            if key in REFUSED and isinstance(value, dict) and value.get("enabled") is False:
                del self.values[key]
            elif key in REFUSED:
                self.refuse(key, f"the key {key!r} of DeepSpeed is not used here", REFUSED[key])
            elif key not in KNOWN:
                fix = suggestion(key, KNOWN, "see ds_configs/README.md for the keys that may be used")
                self.refuse(key, f"unknown key {shown(key)}", fix)
        for name, keys in SECTIONS.items():
            owner, _, inner = name.rpartition(".")
            values = self.section(owner) if owner else self.values
            section = values.get(inner)
            if section is None:
                continue
            if not isinstance(section, dict):
                self.refuse(name, f"{name} must be an object", f'write "{name}": {{...}}')
                del values[inner]
                continue
            for key in (key for key in section if key not in keys):
                fix = suggestion(key, keys, f"{name} has the keys {', '.join(keys)}")
                self.refuse(f"{name}.{key}", f"unknown key {shown(key)} in {name}", fix)

    def zero_stage(self) -> int:
        """0 to 3."""
        stage = self.section("zero_optimization").get("stage", 0)
        if type(stage) is int and 0 <= stage <= 3:
            return stage
        self.refuse("zero_optimization.stage", f"there is no ZeRO stage {shown(stage)}", "use 0, 1, 2 or 3")
        return 1

    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        on = []
        for name in ("bf16", "fp16"):
            enabled = self.section(name).get("enabled", False)
            if not isinstance(enabled, bool):
                what = f"{name}.enabled must be true or false, not {shown(enabled)}"
                self.refuse(f"{name}.enabled", what, "write true or false")
            elif enabled:
                on.append(name)
        if len(on) == 2:
            fix = "switch one of them off; bf16 needs no loss scale"
            self.refuse("bf16.enabled, fp16.enabled", "bf16 and fp16 are both switched on", fix)
        return on[0] if on else "fp32"

    def check_supported(self, stage: int, precision: str) -> None:
        """Refuse values that DeepSpeed's own models take, and its engine or this trainer cannot work with."""
        zero = self.section("zero_optimization")
        for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
            device = (zero.get(name) or {}).get("device", "none")
            key = f"zero_optimization.{name}.device"
            if device not in ("none", "cpu"):
                self.refuse(key, f"{key} is {shown(device)}, which is not supported", "use cpu or none")
            elif device == "cpu" and stage < least:
                what = f"{key} is 'cpu', which DeepSpeed leaves out in ZeRO stage {stage}"
                self.refuse(key, what, f"set zero_optimization.stage to {least}, or leave {name} out")
        for section, key, only, why in _ONLY:
            owner, _, inner = section.rpartition(".")
            value = (((self.section(owner) if owner else self.values).get(inner)) or {}).get(key)
            if value not in (None, only):
                name = f"{section}.{key}"
                self.refuse(name, f"{name} is {shown(value)}: {why}", "leave it out")
        scattered = stage == 3 or (stage == 2 and zero.get("reduce_scatter", True))
        for key, known in _PLAIN_VALUES.items():
            value = self.values.get(key, known[0])
            fits = (value.lower() if isinstance(value, str) else value) in known
            if not fits and (scattered or isinstance(known[0], str)):
                what = f"{key} is {shown(value)}, which DeepSpeed does not take in ZeRO stage {stage}"
                self.refuse(key, what, f"write {' or '.join(map(json.dumps, known))}, or leave it out")
        summed = self.section("data_types").get("grad_accum_dtype")
        if summed is not None and summed not in (*SUM_TYPES["fp32"], *SUM_TYPES[precision]):
            key = "data_types.grad_accum_dtype"
            what = f"{key} is {shown(summed)}, but gradients of a run in {precision} are added up in "
            types = " or ".join(dict.fromkeys(("fp32", precision)))
            self.refuse(key, what + types, f"write {types}, or leave it out")

    def batch(self, data_size: int) -> tuple[int, int]:
        """Micro-batch and accumulation of one rank, as :func:`solve_batch` finds them; else (1, 1)."""
        self.values["steps_per_print"] = self._size("steps_per_print")
        sizes = [self._size(key) for key in BATCH_KEYS]
        if -1 not in sizes and self._faults.spoilt.isdisjoint({"train.global_batch", "data.batch"}):
            try:
                return solve_batch(self._run, data_size, *sizes)
            except ConfigError as error:
                self.refuse(error.where, error.what, error.fix)
        return 1, 1

    def _size(self, key: str) -> int | None:
        value = self.values.get(key)
        if value in ("auto", None):
            return None
        if type(value) is int and 0 < value < _LARGEST:
            return value
        self.refuse(key, f"{key} is {shown(value)}", 'write a whole number above 0, or "auto"')
        return -1

    def check_repeated(self) -> None:
        """Refuse clipping, an optimizer or a schedule that is not the recipe's.

        Files made for other programs often repeat them: equal values, and "auto", pass, with a note.
        """
        optim = self._run.optim
        clipping = self.values.get("gradient_clipping", "auto")
        if clipping not in ("auto", optim.clip_norm):
            recipe = f"the recipe has optim.clip_norm {optim.clip_norm}"
            what = f"gradient_clipping is {shown(clipping)}, but {recipe}"
            self.refuse("gradient_clipping", what, 'write "auto", or set optim.clip_norm in the recipe')
        # Decoupled decay and bias correction are what AdamW means; torch_adam is how it is run.
        adam: dict[str, Any] = {"adam_w_mode": True, "bias_correction": True, "torch_adam": True}
        adam |= {"lr": optim.lr, "eps": optim.eps, "betas": [optim.beta1, optim.beta2]}
        adam |= {"weight_decay": optim.weight_decay}
        self._compare("optimizer", ("adamw", "adam"), "trains with AdamW", adam)
        warmup = {"warmup_min_lr": optim.warmup_init_lr, "warmup_max_lr": optim.lr, "warmup_type": "linear"}
        warmup |= {"warmup_num_steps": optim.warmup_steps, "total_num_steps": self._run.train.max_steps}
        kinds = {"polynomial": ("warmupdecaylr",), "constant": ("warmuplr",)}.get(optim.schedule, ())
        self._compare("scheduler", kinds, f"has optim.schedule {optim.schedule!r}", warmup)
        for name in sorted({"optimizer", "scheduler"} & self.values.keys()):
            self._faults.notes.append(f"{name} in {self._path} sets nothing: the recipe's optim does")

    def _compare(self, name: str, kinds: tuple[str, ...], recipe: str, expected: dict[str, Any]) -> None:
        """Refuse a block of another type, and parameters that are not the expected ones."""
        kind, params = self.section(name).get("type", "auto"), self.section(name).get("params")
        if str(kind).lower() not in ("auto", *kinds):
            self.refuse(f"{name}.type", f"{name}.type is {shown(kind)}, but the recipe {recipe}", _REPEAT)
            return
        if not isinstance(params, dict):
            if params not in (None, "auto"):
                self.refuse(f"{name}.params", f"{name}.params must be an object", _REPEAT)
            return
        for key, value in params.items():
            if key not in expected:
                what = f"unknown key {shown(key)} in {name}.params"
                self.refuse(f"{name}.params.{key}", what, suggestion(key, expected, _REPEAT))
            elif value != "auto" and not _same(value, expected[key]):
                what = f"{name}.params.{key} is {shown(value)}, but the recipe says {expected[key]!r}"
                self.refuse(f"{name}.params.{key}", what, _REPEAT)


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, list) and isinstance(given, list) and len(given) == len(expected):
        return all(map(_same, given, expected))
    if isinstance(expected, float) and isinstance(given, int | float):
        return math.isclose(given, expected, rel_tol=1e-9)
    return bool(given == expected)


def solve_batch(
    run: RunConfig,
    data_size: int,
    total: int | None = None,
    micro: int | None = None,
    steps: int | None = None,
) -> tuple[int, int]:
    """Solve `global batch = micro-batch x accumulation x data-parallel ranks` for what is not given.

    Args:
        run: has the global batch; with batches of tokens the number of samples varies, and the micro-batch
            is that of validation.
        data_size: data-parallel ranks.
        total: the file's `train_batch_size`, if it has one.
        micro: its micro-batch. Without one and without accumulation, the largest part of a rank's share with
            at most `AUTO_TARGET_TOKENS` target tokens is taken.
        steps: its accumulation.

    Returns:
        Micro-batch and accumulation of one rank.

    Raises:
        ConfigError: the numbers contradict each other; `where` is the key.
    """
    if run.data.batch == "tokens":
        for key, value in zip(BATCH_KEYS, (total, micro), strict=False):
            if value is not None:
                what = f"{key} is {value} samples, but data.batch is tokens: updates hold train.batch_tokens"
                raise ConfigError(what, key, 'write "auto"; gradient_accumulation_steps may be given')
        return TOKEN_VALIDATION_SAMPLES, steps or max(1, run.train.batch_groups // data_size)
    batch = run.train.global_batch
    if total not in (None, batch):
        raise ConfigError(
            f"train_batch_size is {total}, but the recipe's train.global_batch is {batch}",
            "train_batch_size",
            'write "auto", or make the two equal; the global batch belongs to the recipe',
        )
    if batch % data_size:
        raise ConfigError(
            f"a global batch of {batch} samples cannot be shared by {data_size} data-parallel ranks",
            f"train.global_batch = {batch}",
            f"use a number of ranks that divides {batch}, or a global batch that {data_size} divides",
        )
    share = batch // data_size
    if micro is None and steps is None:
        cap = max(AUTO_TARGET_TOKENS // (run.data.block_tokens + 2), 1)
        micro = next(part for part in range(min(share, cap), 0, -1) if share % part == 0)
    found, times = micro or share // (steps or 1), steps or share // (micro or 1)
    if found * times != share:
        given = f"micro-batch {micro or '?'} x accumulation {steps or '?'} x {data_size} data-parallel ranks"
        raise ConfigError(
            f"the batch sizes contradict each other: {given} cannot be the global batch {batch}",
            "train_micro_batch_size_per_gpu, gradient_accumulation_steps",
            f"each rank has {share} samples a step: let micro-batch x accumulation be {share}, "
            'or write "auto"',
        )
    return found, times
