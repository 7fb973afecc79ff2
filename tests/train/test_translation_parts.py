"""Small parts of translation: ramps, best weights, held-out text, vocabularies, recipes, the experiment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from janus_ds.checkpoint.manager import save_best
from janus_ds.checkpoint.manifest import fault_of
from janus_ds.checkpoint.tensors import read_weights
from janus_ds.config.load import load_run_config
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.data.prepare.pair_files import held_out_text
from janus_ds.errors import DataError, ResourceError, UsageError
from janus_ds.objective.janus_objective import ramp_factors
from tests.support.commands import refusal

ROOT = Path(__file__).resolve().parents[2]


def test_ramps_rise_from_their_start_and_stay():
    config = ObjectiveConfig(ramp_start=10, ramp_kl_steps=4, ramp_nar_steps=2)
    kl = [ramp_factors(config, step)["kl_ar_aux"] for step in (0, 9, 10, 11, 13, 14, 10**9)]
    assert kl == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert ramp_factors(config, 10) == {"nar": 0.5} | {
        f"kl_{p}": 0.25 for p in ("ar_nar", "ar_aux", "nar_aux", "ar_ar", "nar_nar", "aux_aux")
    }
    assert ramp_factors(replace(config, ramp_kl_steps=0, ramp_nar_steps=0), 0) == {}


def test_the_best_weights_replace_the_earlier_ones_whole(tmp_path):
    root = tmp_path / "checkpoints"
    for score in (1.0, 2.0):
        folder = save_best(root, {"w": torch.full((2,), score)}, {"score": score})
    assert read_weights(folder / "weights.safetensors")["w"].tolist() == [2.0, 2.0]
    assert json.loads((folder / "best.json").read_text()) == {"score": 2.0}
    assert fault_of(folder) is None
    assert [path.name for path in root.iterdir()] == ["best"]
    # Killed between the renames: the earlier one comes back, and a write that fails leaves it.
    folder.rename(root / ".previous-best")
    (root / ".saving-best").write_text("in the way")
    with pytest.raises(ResourceError, match="best weights could not be written"):
        save_best(root, {"w": torch.zeros(2)}, {})
    assert read_weights(folder / "weights.safetensors")["w"].tolist() == [2.0, 2.0]


def test_held_out_text_is_what_was_given(tiny, tiny_pairs):
    text = held_out_text(tiny_pairs, "valid")
    assert len(text.sources) == len(text.references) == 24
    assert text.names[1].endswith("raw/valid.en")
    with pytest.raises(DataError, match="sources of split 'dev' are missing") as error:
        held_out_text(tiny_pairs, "dev")
    assert "another split (valid or test)" in error.value.fix
    with pytest.raises(DataError, match="no translation data"):
        held_out_text(tiny, "valid")


@pytest.mark.parametrize(
    ("name", "shape", "train", "optim"),
    [
        ("nmt_iwslt", (512, 1024, 4, 0.3), (8192, 2), (5e-4, 1e-4)),
        ("nmt_wmt14_en_de", (512, 2048, 8, 0.2), (131072, 16), (7e-4, 0.01)),
        ("nmt_wmt14_de_en", (512, 2048, 8, 0.2), (131072, 16), (7e-4, 0.01)),
        ("nmt_wmt16_ro_en", (512, 2048, 8, 0.3), (32768, 4), (7e-4, 0.01)),
        ("nmt_wmt16_en_ro", (512, 2048, 8, 0.3), (32768, 4), (7e-4, 0.01)),
    ],
)
def test_recipes_have_the_papers_settings(name, shape, train, optim):
    run = load_run_config(ROOT / "launch" / "recipes" / f"{name}.yaml")
    model = run.model
    assert (model.d_model, model.ffn_dim, model.heads, model.dropout) == shape
    assert (model.encoder_layers, model.decoder_layers, model.activation) == (6, 6, "relu")
    assert (model.max_target_positions, model.init_std, run.optim.clip_norm) == (1024, 0.02, 0.0)
    assert (run.train.batch_tokens, run.train.batch_groups) == train
    assert (run.optim.lr, run.optim.weight_decay) == optim
    assert (run.optim.schedule, run.optim.warmup_steps, run.optim.warmup_init_lr) == (
        "inverse_sqrt",
        10_000,
        1e-7,
    )
    assert (run.optim.beta1, run.optim.beta2, run.optim.eps) == (0.9, 0.98, 1e-8)
    assert (run.train.max_steps, run.train.keep_last) == (200_000, 5)
    assert (run.decode.beam, run.decode.iterations, run.decode.length_beam) == (5, 10, 3)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["prepare", "--task", "nmt", "--output", "x"], "--task nmt needs --source-lang"),
        (["eval", "nmt", "--checkpoint", "x", "--iterations", "1,x"], "is not a list of numbers"),
    ],
)
def test_commands_say_what_is_missing(command, words):
    assert words in refusal(UsageError, *command)
