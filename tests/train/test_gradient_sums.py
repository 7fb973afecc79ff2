"""bf16: gradients of micro-batches are added up in fp32 where the DeepSpeed file says so, and lose less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from janus_ds.config.deepspeed import load_setup
from janus_ds.parallel.topology import init_topology
from janus_ds.train.engine import TrainingEngine
from tests.support.launch import run_ranks
from tests.support.tiny_training import NO_DROPOUT, Run, make_inputs, train

ROOT = Path(__file__).parents[2]
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ONE_STEP = (*NO_DROPOUT, "train.max_steps=1", "train.global_batch=64", "train.valid_every=0")


def errors(folder: Path) -> dict[str, float]:
    """Relative error of the whole gradient against fp32 in one micro-batch."""
    from deepspeed.utils import safe_get_full_grad

    topology = init_topology(1, process_group=True)
    found: dict[str, Tensor] = {}
    update = TrainingEngine.update

    def watched(self: TrainingEngine, *arguments: Any) -> Any:
        engine = self._engine
        if engine.is_gradient_accumulation_boundary():
            found.update({n: safe_get_full_grad(p).double() for n, p in engine.module.named_parameters()})
        return update(self, *arguments)

    TrainingEngine.update = watched  # type: ignore[method-assign]

    def gradient(name: str, micro: int, engine: dict[str, Any]) -> dict[str, Tensor]:
        train(folder, topology, Run(name, 2, micro, ONE_STEP, engine))
        return dict(found)

    exact = gradient("exact", 64, {})
    norm = sum(float(g.square().sum()) for g in exact.values()) ** 0.5
    result = {}
    for name, engine in (("bf16", {}), ("fp32", SUMS)):
        rounded = gradient(name, 1, {"bf16": {"enabled": True}, **engine})
        result[name] = sum(float((rounded[n] - g).square().sum()) for n, g in exact.items()) ** 0.5 / norm
    return result


def test_sums_of_64_micro_batches_lose_less_in_fp32(tmp_path: Path) -> None:
    (found,) = run_ranks(errors, 1, make_inputs(tmp_path))
    print(f"relative error of the gradient, 64 micro-batches: {found}")
    assert found["fp32"] < 0.6 * found["bf16"]


@pytest.mark.parametrize(
    ("types", "low"), [({}, True), (SUMS, False), ({"data_types": {"grad_accum_dtype": "float32"}}, False)]
)
def test_low_sums_are_told(types: dict[str, Any], low: bool, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": True},
                "gradient_accumulation_steps": 4,
                **types,
            }
        )
    )
    execution = load_setup(None, ["train.global_batch=32"], file, 1)[1]
    assert execution.accumulation == 4
    assert ("grad_accum_dtype" in execution.advice) is low
    for name in ("zero2_bf16.json", "zero3_offload.json"):
        packaged = load_setup(None, [], ROOT / "ds_configs" / name, 1)[1]
        assert packaged.engine["data_types"] == {"grad_accum_dtype": "fp32"}
