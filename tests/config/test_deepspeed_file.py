"""The DeepSpeed JSON as it is read: batch sizes, keys, blocks that contradict the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.deepspeed_file import AUTO_TARGET_TOKENS, KNOWN, REFUSED, SECTIONS
from janus_ds.config.load import load_run_config
from janus_ds.model.weights import parameter_shapes
from tests.support.deepspeed_files import RUN, engine_fault, load_engine
from tests.support.launch import ROOT

STAGE_0 = {"zero_optimization": {"stage": 0}}


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ({}, 1, (48, 1)),
        ({}, 2, (24, 1)),
        ({"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}, 3, (16, 1)),
        ({"train_micro_batch_size_per_gpu": 6}, 2, (6, 4)),
        ({"gradient_accumulation_steps": 8}, 2, (3, 8)),
        ({"train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 2}, 2, (12, 2)),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 4}, 4, (4, 3)),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 12}, 4, (1, 12)),
    ],
)
def test_batch_sizes_are_solved(
    tmp_path: Path, sizes: dict[str, Any], ranks: int, expected: tuple[int, int]
) -> None:
    execution = load_engine(tmp_path, ranks, **sizes)
    assert (execution.micro_batch, execution.accumulation) == expected
    engine = execution.engine
    assert engine["train_batch_size"] == 48 == expected[0] * expected[1] * ranks
    assert engine["train_micro_batch_size_per_gpu"] == expected[0]
    assert engine["gradient_accumulation_steps"] == expected[1]
    assert "auto" not in engine.values()


@pytest.mark.parametrize(
    ("sizes", "ranks", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, 2, "micro-batch 5 x accumulation ? x 2 data-parallel ranks"),
        ({"gradient_accumulation_steps": 7}, 2, "micro-batch ? x accumulation 7 x 2"),
        (
            {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            2,
            "micro-batch 8 x accumulation 4 x 2 data-parallel ranks cannot be the global batch 48",
        ),
        ({"train_micro_batch_size_per_gpu": 96}, 2, "each rank has 24 samples a step"),
        ({"train_batch_size": 64}, 2, "train_batch_size is 64, but the recipe's train.global_batch is 48"),
        ({}, 5, "48 samples cannot be shared by 5 data-parallel ranks"),
        ({"train_micro_batch_size_per_gpu": 0}, 2, "train_micro_batch_size_per_gpu is 0"),
        ({"gradient_accumulation_steps": "2"}, 2, "gradient_accumulation_steps is '2'"),
    ],
)
def test_batch_sizes_that_contradict_are_refused_with_the_numbers(
    tmp_path: Path, sizes: dict[str, Any], ranks: int, words: str
) -> None:
    assert words in engine_fault(tmp_path, ranks, **sizes)


def test_auto_keeps_a_micro_batch_to_so_many_tokens(tmp_path: Path) -> None:
    run = load_run_config(ROOT / "launch" / "recipes" / "bart_base.yaml")
    for ranks, expected in ((1, (64, 16)), (8, (64, 2)), (64, (16, 1))):
        execution = load_engine(tmp_path, ranks, run)
        assert (execution.micro_batch, execution.accumulation) == expected
        assert execution.micro_batch * 512 <= AUTO_TARGET_TOKENS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient_clipping": 0.1}, "gradient_clipping is 0.1, but the recipe has optim.clip_norm 1.0"),
        ({**STAGE_0, "bf16": {"enabled": True}}, "ZeRO stage 0 with bf16 trains wrongly"),
        ({"zero_optimization": {}, "fp16": {"enabled": True}}, "use stage 1 (the same on one rank), or fp32"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"zero_optimization": {"stage": 4}}, "there is no ZeRO stage 4"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled must be true or false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both switched on"),
        ({"tensor_parallel": {"autotp_size": 2}}, "--tensor-parallel N"),
        ({"activation_checkpointing": {}}, "set train.activation_checkpointing in the recipe"),
        ({"torch_autocast": {"enabled": True}}, "use bf16 or fp16"),
        ({"wandb": {"enabled": True}}, "RUN/metrics.jsonl"),
        ({"comet": {"enabled": "false"}}, "RUN/metrics.jsonl"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "leaves out in ZeRO stage 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "set zero_optimization.stage to 3",
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "would go into the weights unseen"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "would go into the weights unseen"),
        ({"fp16": {"enabled": False, "loss_scale": -1}}, "loss_scale must be >= 0"),
        ({"communication_data_type": "float32"}, 'write "fp32" or "fp16" or "bf16", or leave it out'),
        ({"log_level": "loud"}, "log_level is 'loud', which DeepSpeed does not take"),
        (
            {"prescale_gradients": True},
            "prescale_gradients is True, which DeepSpeed does not take in ZeRO stage 2",
        ),
        ({"gradient_predivide_factor": 2.0}, "write 1, or leave it out"),
        # With as many as there are ranks DeepSpeed does not multiply by it again.
        (
            {"zero_optimization": {"stage": 3, "reduce_scatter": False}, "gradient_predivide_factor": 2.0},
            "gradient_predivide_factor is 2.0, which DeepSpeed does not take in ZeRO stage 3",
        ),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 501}}, "DeepSpeed needs an even one"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes': Input should be a valid boolean"),
        ({"disable_python_gc": "false"}, "ds.json: disable_python_gc"),
        ({"comms_logger": {"enabled": True, "prof_ops": 3}}, "comms_logger.prof_ops is 3"),
        ({"flops_profiler": {"enabled": True, "profile_step": "2"}}, "flops_profiler.profile_step is '2'"),
        ({"steps_per_print": 0}, "steps_per_print is 0"),
    ],
)
def test_keys_and_values_that_deepspeed_would_take_or_choke_on(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    assert words in engine_fault(tmp_path, **values)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (
            "zero_optimization",
            {"offload_optimizer": {"device": "nvme"}},
            "offload_optimizer.device is 'nvme'",
        ),
        ("zero_optimization", {"offload_param": {"device": "nvme"}}, "offload_param.device is 'nvme'"),
        ("zero_optimization", {"offload_optimizer": {"super_offload": True}}, "super_offload is True"),
        ("zero_optimization", {"legacy_stage1": True}, "zero_optimization.legacy_stage1 is True"),
        ("zero_optimization", {"zero_quantized_weights": True}, "zero_quantized_weights is True: weights or"),
        ("zero_optimization", {"zero_quantized_nontrainable_weights": True}, "in 8 bits and less"),
        ("zero_optimization", {"zero_quantized_gradients": True}, "zero_quantized_gradients is True"),
        ("zero_optimization", {"zero_hpz_partition_size": 8}, "zero_hpz_partition_size is 8"),
        ("zero_optimization", {"stage3_module_granularity_threshold": 9}, "granularity_threshold is 9"),
        ("zero_optimization", {"leaf_module": {"names": ["encoder"]}}, "leaf_module is {'names'"),
        ("zero_optimization", {"ignore_unused_parameters": False}, "ignore_unused_parameters is False"),
        ("zero_optimization", {"zenflow": {}}, "zero_optimization.zenflow is {}"),
        ("fp16", {"fp16_master_weights_and_grads": True}, "fp16_master_weights_and_grads is True"),
        ("bf16", {"bf16_master_weights_and_grads": True}, "bf16_master_weights_and_grads is True"),
        ("bf16", {"bf16_optimizer_states": True}, "bf16.bf16_optimizer_states is True"),
        (
            "zero_optimization",
            {"offload_optimizer": {"device": "cpu", "ratio": 0.3}},
            "ratio is 0.3: to offl",
        ),
        ("data_types", {"grad_accum_dtype": "int8"}, "grad_accum_dtype is 'int8'"),
        ("data_types", {"grad_accum_dtype": "bf16"}, "of a run in fp32 are added up in fp32"),
        ("data_types", {"grad_accum_dtype": ["fp32"]}, "grad_accum_dtype is ['fp32']"),
    ],
)
def test_values_that_would_end_in_a_stack_trace(
    tmp_path: Path, section: str, values: dict[str, Any], words: str
) -> None:
    stage = {"stage": 3} if section == "zero_optimization" else {}
    assert words in engine_fault(tmp_path, **{section: stage | values})


def test_the_same_keys_pass_where_they_ask_for_nothing(tmp_path: Path) -> None:
    zero = {"stage": 3, "legacy_stage1": False, "zenflow": None, "offload_param": {"device": "none"}}
    zero |= {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "leaf_module": {}}
    offload = {"device": "cpu", "super_offload": False, "ratio": 1.0}
    load_engine(tmp_path, 1, zero_optimization={**zero, "offload_optimizer": offload})
    load_engine(
        tmp_path, 1, data_types={"grad_accum_dtype": "float32"}, bf16={"bf16_optimizer_states": False}
    )


def test_null_is_as_if_the_key_were_not_there(tmp_path: Path) -> None:
    """DeepSpeed's own models choke on it."""
    names = ("bf16", "fp16", "data_types", "optimizer", "comms_logger", "steps_per_print", "log_level")
    execution = load_engine(
        tmp_path, 1, **dict.fromkeys((*names, "gradient_clipping")), prescale_gradients=False
    )
    assert execution.engine == load_engine(tmp_path, 1, prescale_gradients=False).engine
    assert load_engine(tmp_path, 1, zero_optimization=None).zero_stage == 0
    two = load_engine(tmp_path, 1, data_types=None, gradient_accumulation_steps=2, steps_per_print="auto")
    assert (two.advice, two.engine["steps_per_print"]) == ("", execution.engine["steps_per_print"])
    # Where gradients are not scattered, DeepSpeed can scale them before the sum.
    load_engine(tmp_path, 1, **STAGE_0, prescale_gradients=True, communication_data_type="FP32")


def test_blocks_of_other_programs_that_are_switched_off_are_left_out(tmp_path: Path) -> None:
    names = ("tensorboard", "wandb", "csv_monitor", "comet", "elasticity")
    off = {name: {"enabled": False} for name in names}
    assert load_engine(tmp_path, 1, **off) == load_engine(tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "block", "words"),
    [
        ("optimizer", {"type": "Lamb"}, "optimizer.type is 'Lamb', but the recipe trains with AdamW"),
        ("optimizer", {"params": {"lr": 1e-3}}, "optimizer.params.lr is 0.001, but the recipe says 0.0005"),
        ("optimizer", {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}, "optimizer.params.betas"),
        ("optimizer", {"params": {"adam_w_mode": False}}, "optimizer.params.adam_w_mode is False"),
        ("optimizer", {"type": "Adam", "params": {"weight_decy": 0.01}}, "did you mean 'weight_decay'?"),
        ("optimizer", {"type": "AdamW", "params": [1]}, "optimizer.params must be an object"),
        ("scheduler", {"type": "WarmupDecayLR"}, "the recipe has optim.schedule 'inverse_sqrt'"),
        ("scheduler", {"params": {"warmup_num_steps": 5}}, "warmup_num_steps is 5, but the recipe says 100"),
    ],
)
def test_blocks_against_the_recipe(tmp_path: Path, name: str, block: dict[str, Any], words: str) -> None:
    assert words in engine_fault(tmp_path, **{name: block})


def test_the_profiler_goes_no_deeper_than_the_model(tmp_path: Path) -> None:
    """It would end in a stack trace on the rank that prints."""
    levels = max(len(f"model.{name}".split(".")) for name in parameter_shapes(RUN.model, 100))
    load_engine(tmp_path, flops_profiler={"enabled": True, "module_depth": levels})
    fault = engine_fault(tmp_path, flops_profiler={"enabled": True, "module_depth": levels + 1})
    assert f"less than or equal to {levels}" in fault


def test_the_literal_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
    }
    for section, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        # Deprecated spellings are left out on purpose.
        theirs -= {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"}
        theirs -= {"stage3_gather_fp16_weights_on_model_save"}
        assert set(SECTIONS[section]) == theirs, section
    theirs = {value for value in vars(constants).values() if isinstance(value, str)}
    single = [key for key in KNOWN if key not in SECTIONS and key not in ("steps_per_print",)]
    assert not [key for key in single if key not in theirs]
    assert not set(KNOWN) & set(REFUSED)
    told = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    assert not [key for key in KNOWN if f"`{key}`" not in told]
