"""What is handed to DeepSpeed: clipping, stages, precision, offload; faults of recipe and JSON together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.deepspeed import (
    check_on_this_machine,
    load_setup,
    read_deepspeed_config,
    read_setup,
)
from janus_ds.config.fields import ConfigFaultsError, FaultList
from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.errors import ConfigError
from tests.support.deepspeed_files import RUN, load_engine, write_engine
from tests.support.launch import ROOT

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("given", [{}, {"gradient_clipping": "auto"}, {"gradient_clipping": 0.25}])
def test_clipping_is_always_written_and_is_the_recipes(tmp_path: Path, given: dict[str, Any]) -> None:
    run = replace(RUN, optim=replace(RUN.optim, clip_norm=0.25))
    assert load_engine(tmp_path, run=run, **given).engine["gradient_clipping"] == 0.25
    off = replace(RUN, optim=replace(RUN.optim, clip_norm=0.0))
    assert load_engine(tmp_path, run=off).engine["gradient_clipping"] == 0.0


def test_blocks_that_repeat_the_recipe_pass_and_are_not_handed_on(tmp_path: Path) -> None:
    run = replace(RUN, optim=replace(RUN.optim, schedule="polynomial"))
    optimizer = {"type": "AdamW", "params": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": "auto"}}
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 300, "warmup_max_lr": 0.0005}}
    execution = load_engine(tmp_path, run=run, optimizer=optimizer, scheduler=scheduler)
    assert not {"optimizer", "scheduler"} & set(execution.engine)
    # DeepSpeed would take what they leave out from its own defaults: warm-up along a logarithm, beta2 .999.
    says = f"in {tmp_path}/ds.json sets nothing: the recipe's optim does"
    assert execution.notes == (f"optimizer {says}", f"scheduler {says}")


@pytest.mark.parametrize(("stage", "tensor_size"), [(3, 1), (2, 2)])
def test_a_compiled_model_with_sharded_weights_is_refused_before_it_is_built(
    tmp_path: Path, stage: int, tensor_size: int
) -> None:
    engine = write_engine(tmp_path, zero_optimization={"stage": stage})
    with pytest.raises(ConfigError, match="'model' cannot be used with ZeRO-3 or tensor parallelism"):
        read_setup(None, ["train.compile=model"], engine, 1, tensor_size)
    read_setup(None, ["train.compile=head"], engine, 1, tensor_size)
    read_setup(None, ["train.compile=model"], write_engine(tmp_path), 1)


def test_offload_allows_torchs_own_adamw(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    execution = load_engine(tmp_path, zero_optimization=zero)
    assert execution.offload
    assert execution.engine["zero_force_ds_cpu_optimizer"] is False
    assert execution.engine["zero_allow_untested_optimizer"] is True
    assert not load_engine(
        tmp_path, zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}}
    ).offload


def test_faults_of_both_files_come_together(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train:\n  global_batch: many\noptim:\n  lr: 1.0e-3\n  clip: 1\n")
    config = write_engine(
        tmp_path, gradient_cliping=1.0, train_batch_size=64, fp16={"enabled": True}, bf16={}
    )
    with pytest.raises(ConfigFaultsError) as caught:
        load_setup(recipe, ["model.heads=3"], config, 2)
    said = str(caught.value)
    for words in (
        "4 faults",
        "train.global_batch must be a whole number",
        "unknown key 'optim.clip'",
        "did you mean 'optim.clip_norm'?",
        "3 heads do not divide",
        "did you mean 'gradient_clipping'?",
    ):
        assert words in said, said
    # The global batch is unreadable, so that nothing is said of batch sizes.
    assert "train_batch_size is 64" not in said


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
        load_setup(None, [override], write_engine(tmp_path), 1, tensor_size=4)
    assert words in str(caught.value)
    load_setup(None, [override], write_engine(tmp_path), 1, tensor_size=2)


def test_scores_and_losses_are_of_the_same_validation_data(tmp_path: Path) -> None:
    both = ["data.task=pair", "data.path=data", "data.valid_path=other/valid", "train.valid_bleu=ar"]
    with pytest.raises(ConfigFaultsError, match=r"scores the validation text in data\.path") as caught:
        load_setup(None, both, write_engine(tmp_path), 1)
    assert len(caught.value.faults) == 1
    load_setup(None, both[:3], write_engine(tmp_path), 1)
    # As of a run that was started before they were refused together.
    assert from_dict(to_dict(load_run_config(None, both))).train.valid_bleu == "ar"


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
            load_engine(tmp_path, **{precision: {"enabled": True}})
        assert f"cannot train in {precision}" in caught.value.what
        assert "ds_configs/zero2" in caught.value.fix
    device_can(True)
    assert load_engine(tmp_path, **{precision: {"enabled": True}}).precision == precision


@pytest.mark.parametrize(
    ("known", "told"),
    [({"avx2": True}, True), ({"avx2": True, "amx_bf16": True}, False), ({"sve2": True}, False), ({}, False)],
)
def test_a_cpu_that_imitates_bf16_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], told: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    for precision in ("bf16", "fp32"):
        engine = write_engine(tmp_path, **({"bf16": {"enabled": True}} if precision == "bf16" else {}))
        notes = load_setup(None, (), engine, 1)[1].notes
        assert any("imitates" in note for note in notes) == (told and precision == "bf16")
