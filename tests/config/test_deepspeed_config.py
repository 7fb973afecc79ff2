"""The DeepSpeed JSON: batch sizes, clipping, keys, precision, blocks that contradict the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.deepspeed import (
    ExecutionConfig,
    check_on_this_machine,
    load_setup,
    read_deepspeed_config,
)
from janus_ds.config.deepspeed_file import AUTO_TARGET_TOKENS, KNOWN, REFUSED, SECTIONS
from janus_ds.config.faults import ConfigFaultsError, FaultList
from janus_ds.config.load import load_run_config
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
RUN = load_run_config(None, ["train.global_batch=48", "data.block_tokens=62"])


def write(folder: Path, **values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **values}), encoding="utf-8")
    return path


def load(folder: Path, data_size: int = 2, run: RunConfig = RUN, **values: Any) -> ExecutionConfig:
    execution = read_deepspeed_config(write(folder, **values), run, data_size, FaultList())
    check_on_this_machine(execution)
    return execution


def fault(folder: Path, data_size: int = 2, **values: Any) -> str:
    with pytest.raises(ConfigFaultsError) as caught:
        load(folder, data_size, **values)
    assert caught.value.exit_code == 3
    assert len(caught.value.faults) == 1, caught.value
    return str(caught.value)


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
    execution = load(tmp_path, ranks, **sizes)
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
    assert words in fault(tmp_path, ranks, **sizes)


def test_auto_keeps_a_micro_batch_to_so_many_tokens(tmp_path: Path) -> None:
    run = load_run_config(ROOT / "launch" / "recipes" / "bart_base.yaml")
    for ranks, expected in ((1, (64, 16)), (8, (64, 2)), (64, (16, 1))):
        execution = load(tmp_path, ranks, run)
        assert (execution.micro_batch, execution.accumulation) == expected
        assert execution.micro_batch * 512 <= AUTO_TARGET_TOKENS


@pytest.mark.parametrize("given", [{}, {"gradient_clipping": "auto"}, {"gradient_clipping": 0.25}])
def test_clipping_is_always_written_and_is_the_recipes(tmp_path: Path, given: dict[str, Any]) -> None:
    run = replace(RUN, optim=replace(RUN.optim, clip_norm=0.25))
    assert load(tmp_path, run=run, **given).engine["gradient_clipping"] == 0.25
    off = replace(RUN, optim=replace(RUN.optim, clip_norm=0.0))
    assert load(tmp_path, run=off).engine["gradient_clipping"] == 0.0


def test_clipping_against_the_recipe_is_refused(tmp_path: Path) -> None:
    assert "gradient_clipping is 0.1, but the recipe has optim.clip_norm 1.0" in fault(
        tmp_path, gradient_clipping=0.1
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean 'overlap_comm'?"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            "unknown key 'devise' in zero_optimization.offload_optimizer",
        ),
        ({"fp16": {"enable": False}}, "did you mean 'enabled'?"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"zero_optimization": {"stage": 4}}, "there is no ZeRO stage 4"),
        ({"zero_optimization": {"stage": "2"}}, "there is no ZeRO stage '2'"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled must be true or false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both switched on"),
        ({"tensor_parallel": {"autotp_size": 2}}, "--tensor-parallel N"),
        ({"activation_checkpointing": {}}, "set train.activation_checkpointing in the recipe"),
        ({"torch_autocast": {"enabled": True}}, "use bf16 or fp16"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "reduce_bucket_size is 0"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "would go into the weights unseen"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "would go into the weights unseen"),
        ({"fp16": {"enabled": False, "loss_scale": -1}}, "loss_scale must be >= 0"),
    ],
)
def test_keys_and_values_that_deepspeed_would_take_or_choke_on(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    assert words in fault(tmp_path, **values)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero", [{"stage": 0}, {}])
def test_stage_0_in_16_bit_is_refused_with_the_reason(
    tmp_path: Path, precision: str, zero: dict[str, Any]
) -> None:
    text = fault(tmp_path, zero_optimization=zero, **{precision: {"enabled": True}})
    assert f"ZeRO stage 0 with {precision} trains wrongly" in text
    assert "use stage 1" in text


def test_stage_0_in_fp32_is_allowed(tmp_path: Path) -> None:
    execution = load(tmp_path, zero_optimization={"stage": 0})
    assert (execution.zero_stage, execution.precision, execution.offload) == (0, "fp32", False)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "Lamb"}, "optimizer.type is 'Lamb', but the recipe trains with AdamW"),
        (
            {"type": "AdamW", "params": {"lr": 1e-3}},
            "optimizer.params.lr is 0.001, but the recipe says 0.0005",
        ),
        ({"type": "AdamW", "params": {"betas": [0.9, 0.999]}}, "optimizer.params.betas"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "optimizer.params.adam_w_mode is False"),
        ({"type": "AdamW", "params": {"weight_decy": 0.01}}, "did you mean 'weight_decay'?"),
        ({"type": "AdamW", "params": [1]}, "optimizer.params must be an object"),
    ],
)
def test_optimizer_blocks_against_the_recipe(tmp_path: Path, block: dict[str, Any], words: str) -> None:
    assert words in fault(tmp_path, optimizer=block)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "WarmupDecayLR", "params": {}}, "the recipe has optim.schedule 'inverse_sqrt'"),
        ({"params": {"warmup_num_steps": 5}}, "warmup_num_steps is 5, but the recipe says 100"),
    ],
)
def test_scheduler_blocks_against_the_recipe(tmp_path: Path, block: dict[str, Any], words: str) -> None:
    assert words in fault(tmp_path, scheduler=block)


def test_blocks_that_repeat_the_recipe_pass_and_are_not_handed_on(tmp_path: Path) -> None:
    run = replace(RUN, optim=replace(RUN.optim, schedule="polynomial"))
    optimizer = {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": "auto"}}
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 300, "warmup_max_lr": 0.0005}}
    engine = load(tmp_path, run=run, optimizer=optimizer, scheduler=scheduler).engine
    assert not {"optimizer", "scheduler"} & set(engine)


def test_offload_allows_torchs_own_adamw(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    execution = load(tmp_path, zero_optimization=zero)
    assert execution.offload
    assert execution.engine["zero_force_ds_cpu_optimizer"] is False
    assert execution.engine["zero_allow_untested_optimizer"] is True
    assert not load(tmp_path, zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}}).offload


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"steps_per_print": 1, "steps_per_print": 2}', "the key 'steps_per_print' is given twice"),
        (b'{"steps_per_print": "\xff"}', "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(ConfigFaultsError) as caught:
        read_deepspeed_config(path, RUN, 1, FaultList())
    assert words in str(caught.value)
    assert str(path) in caught.value.where


def test_faults_of_both_files_come_together_and_fast(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train:\n  global_batch: many\noptim:\n  lr: 1.0e-3\n  clip: 1\n")
    config = write(tmp_path, gradient_cliping=1.0, train_batch_size=64, fp16={"enabled": True}, bf16={})
    arguments = f"Path({str(recipe)!r}), ['model.heads=3'], Path({str(config)!r}), 2"
    script = (
        "from janus_ds.config.deepspeed import load_setup\nfrom pathlib import Path\n"
        "from janus_ds.errors import exit_on_error\n"
        f"exit_on_error(lambda: load_setup({arguments}))"
    )
    command = [sys.executable, "-X", "importtime", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    # Fast: nothing heavy is imported before the files are sound.
    assert not {line.split("|")[-1].strip() for line in done.stderr.splitlines()} & {"torch", "deepspeed"}
    for words in (
        "4 faults",
        "train.global_batch must be a whole number",
        "unknown key 'optim.clip'",
        "did you mean 'optim.clip_norm'?",
        "3 heads do not divide",
        "did you mean 'gradient_clipping'?",
    ):
        assert words in done.stderr, done.stderr
    # The global batch is unreadable, so that nothing is said of batch sizes.
    assert "train_batch_size is 64" not in done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.heads=2", "model.heads is 2, which 4 tensor-parallel ranks cannot share"),
        ("model.vocab_multiple=6", "model.vocab_multiple is 6"),
        ("model.ffn_dim=510", "model.ffn_dim is 510"),
    ],
)
def test_shapes_that_tensor_parallel_ranks_cannot_share(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigFaultsError) as caught:
        load_setup(None, [override], write(tmp_path), 1, tensor_size=4)
    assert words in str(caught.value)
    load_setup(None, [override], write(tmp_path), 1, tensor_size=2)


@pytest.fixture
def device_can(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool | None], None]:
    from deepspeed.accelerator import get_accelerator

    def can(answer: bool | None) -> None:
        for name in ("is_fp16_supported", "is_bf16_supported"):
            monkeypatch.setattr(type(get_accelerator()), name, lambda self: answer)

    return can


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load_and_deepspeed_takes_them(device_can: Any, path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    device_can(True)
    run = load_run_config(ROOT / "launch" / "recipes" / "quickstart.yaml")
    execution = read_deepspeed_config(path, run, 1, FaultList())
    check_on_this_machine(execution)
    assert execution.zero_stage == int(path.stem[4])
    expected = "fp16" if "fp16" in path.stem else "bf16" if "bf16" in path.stem else None
    assert execution.precision == (expected or ("bf16" if "offload" in path.stem else "fp32"))
    assert execution.offload == ("offload" in path.stem)
    parsed = DeepSpeedConfig(execution.engine)
    assert parsed.gradient_clipping == run.optim.clip_norm
    assert parsed.train_batch_size == run.train.global_batch
    assert parsed.zero_optimization_stage == execution.zero_stage


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_device_lacks(tmp_path: Path, device_can: Any, precision: str) -> None:
    # DeepSpeed's CPU accelerator answers None where it means no.
    for answer in (False, None):
        device_can(answer)
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, **{precision: {"enabled": True}})
        assert f"cannot train in {precision}" in caught.value.what
        assert "ds_configs/zero2" in caught.value.fix
    device_can(True)
    assert load(tmp_path, **{precision: {"enabled": True}}).precision == precision


def test_the_literal_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
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
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
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
