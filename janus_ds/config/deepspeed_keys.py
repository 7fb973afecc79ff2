"""The keys of a DeepSpeed JSON that this project passes on, and why it refuses others.

DeepSpeed itself accepts a misspelt key at the top level in silence (`gradient_cliping` clips at 1.0
whatever its value). The lists are literal, since importing DeepSpeed to ask it takes seconds; a
unit test holds them against the installed DeepSpeed.
"""

from __future__ import annotations

__all__ = ["BATCH_KEYS", "KNOWN", "REFUSED", "SECTIONS"]

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_OFFLOAD_OPTIMIZER = _words(
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio "
    "super_offload cpuadam_cores_perc"
)
_OFFLOAD_PARAM = _words("device nvme_path buffer_count buffer_size max_in_cpu pin_memory")
_ZERO = _words(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
    "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
    "elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
    "stage3_allgather_sequential ignore_unused_parameters legacy_stage1 round_robin_gradients "
    "parameter_alignment zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
    "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
    "save_muon_momentum_buffer_in_memory leaf_module"
)

SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": _ZERO,
    "zero_optimization.offload_optimizer": _OFFLOAD_OPTIMIZER,
    "zero_optimization.offload_param": _OFFLOAD_PARAM,
    "fp16": (
        *_words("enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis"),
        *_words("consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads"),
    ),
    "bf16": (
        *_words("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads"),
        "bf16_optimizer_states",
    ),
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "comms_logger": ("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    "flops_profiler": (
        *_words("enabled recompute_fwd_factor profile_step module_depth top_modules detailed"),
        "output_file",
    ),
    "data_types": ("grad_accum_dtype",),
    "tensorboard": ("enabled", "output_path", "job_name"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "wandb": ("enabled", "group", "team", "project"),
}
"""Sections and the keys in them."""

KNOWN: tuple[str, ...] = (
    *BATCH_KEYS,
    *(name for name in SECTIONS if "." not in name),
    *_words("gradient_clipping steps_per_print wall_clock_breakdown memory_breakdown dump_state"),
    *_words("communication_data_type prescale_gradients gradient_predivide_factor disable_python_gc"),
    *_words("zero_allow_untested_optimizer zero_force_ds_cpu_optimizer log_level"),
)
"""All keys that may stand at the top level."""

_TRAINER = "leave it out; the trainer does this itself"
_WHAT_IS_TRAINED = "leave it out; data and its order belong to the recipe"
REFUSED: dict[str, str] = {
    "tensor_parallel": "leave it out and give --tensor-parallel N; this section is DeepSpeed's AutoTP",
    "torch_autocast": "use bf16 or fp16; their master weights are fp32",
    "bfloat16": "write bf16",
    "amp": "use bf16 or fp16",
    "activation_checkpointing": "set train.activation_checkpointing in the recipe",
    "checkpoint": _TRAINER,
    "pipeline": "leave it out; the model has no pipeline stages",
    "elasticity": "leave it out; the global batch is fixed by train.global_batch",
    "autotuning": "leave it out; set micro-batch and ZeRO stage here",
    "compression_training": "leave it out; the model is trained as it is",
    "weight_quantization": "leave it out; the model is trained as it is",
    "hybrid_engine": "leave it out; it is made for reinforcement learning",
    "expert_parallel": "leave it out; the model has no experts",
    "sparse_attention": "leave it out; attention follows the two-stream rule",
    "sparse_gradients": "leave it out; the embeddings are tied to the output layer",
    "curriculum_learning": _WHAT_IS_TRAINED,
    "data_efficiency": _WHAT_IS_TRAINED,
    "dataloader_drop_last": _WHAT_IS_TRAINED,
    "gradient_allreduce_op": "leave it out; losses are scaled for the mean over ranks",
    "managed_gradient_accumulation": "leave it out; the trainer counts on DeepSpeed's own boundaries",
    "aio": "leave it out; NVMe offload is not supported",
}
"""Keys that DeepSpeed knows and this project does not pass on, and what to do instead."""
