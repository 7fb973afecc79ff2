"""What presets bundle: the settings of the paper and of its released code."""

from __future__ import annotations

import re

import pytest

from janus_ds.config.load import load_run_config
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import FIELDS, ObjectiveConfig, RunConfig

COLUMNS = """
    weight_ar weight_nar weight_aux weight_length weight_kl_ar_nar weight_kl_ar_aux weight_kl_nar_aux
    weight_kl_ar_ar weight_kl_nar_nar weight_kl_aux_aux label_smoothing normalise ar_stream ar_query_position
    decoder_start length_convention mask_symbol
"""
MASKING = ["target", "target_share", "source_share", "poisson", "rotate_share", "aux_order"]
# Section 3 of the paper, its released code, and R-Drop: fields of the objective, then of masking.
PRESETS = """
paper pair              1 1 1 .1  0 2 2  0 0 0 .1 per_term query predicted bos inner mask
                        span_union .7 0 2 0 left_to_right
paper denoise           1 1 1 .1  0 2 2  0 0 0 .1 per_term query predicted eos_bos inner mask
                        infilling .5 .3 2 0 left_to_right
released pair           1 .5 .5 .1  1 3 1  0 0 0 .1 per_term query previous bos with_specials unk
                        span_overlap .7 0 2 0 left_to_right
released denoise        .5 .5 .5 0  0 .5 .5  0 0 0 0 target_tokens query predicted eos_bos with_specials mask
                        infilling_released .3 .3 3 .5 left_to_right
released_finetune pair  0 1 1 .1  0 0 0  0 1 1 .1 per_term query predicted bos inner mask
                        uniform 0 0 2 0 random
cmlm pair               0 1 0 .1  0 0 0  0 0 0 .1 per_term query predicted bos inner mask
                        uniform 0 0 2 0 left_to_right
ar pair                 1 0 0 0  0 0 0  0 0 0 .1 per_term content predicted bos inner mask
                        span_union .7 0 2 0 left_to_right
ar_query pair           1 0 0 0  0 0 0  0 0 0 .1 per_term query predicted bos inner mask
                        span_union .7 0 2 0 left_to_right
ar_rdrop pair           2 0 0 0  0 0 0  5 0 0 .1 per_term content predicted bos inner mask
                        span_union .7 0 2 0 left_to_right
ar_query_rdrop pair     2 0 0 0  0 0 0  5 0 0 .1 per_term query predicted bos inner mask
                        span_union .7 0 2 0 left_to_right
"""


def load(preset: str, task: str, *overrides: str) -> RunConfig:
    return load_run_config(None, [f"objective.preset={preset}", f"data.task={task}", *overrides])


@pytest.mark.parametrize("row", re.findall(r"^\w.*\n.*", PRESETS, re.M), ids=lambda row: row[:22].strip())
def test_weights_conventions_and_masking(row: str) -> None:
    preset, task, *values = row.split()
    expected = [float(value) if value[0] in ".0123456789" else value for value in values]
    run = load(preset, task)
    objective, released = run.objective, preset == "released"
    found = [getattr(objective, name) for name in COLUMNS.split()] + [
        getattr(run.masking, name) for name in MASKING
    ]
    assert found == expected
    assert objective.dropout_draws == (2 if "rdrop" in preset or "finetune" in preset else 1)
    assert objective.encoder_passes == 1
    assert run.model.length_classes == (256 if released else run.model.max_target_positions)
    assert run.decode.nar_score == ("released" if released else "paper")


def test_one_field_overrides_its_preset_alone() -> None:
    plain, changed = load("released", "pair"), load("released", "pair", "objective.weight_aux=0")
    assert changed.objective.weight_aux == 0.0
    fields = set(vars(plain.objective))
    assert {f for f in fields if getattr(plain.objective, f) != getattr(changed.objective, f)} == {
        "weight_aux"
    }


def test_ablations_of_the_paper_are_configurations() -> None:
    # Table 6: joint training without KL, with K(AR, NAR), AUX alone.
    off = ["objective.weight_kl_ar_aux=0", "objective.weight_kl_nar_aux=0"]
    load("paper", "pair", *off, "objective.weight_aux=0")
    load("paper", "pair", *off, "objective.weight_aux=0", "objective.weight_kl_ar_nar=2")
    load("paper", "pair", *off, "objective.weight_ar=0", "objective.weight_nar=0")


def test_every_preset_resolves_for_every_task_and_resolving_twice_changes_nothing() -> None:
    for preset in FIELDS["objective.preset"].choices:
        for task in FIELDS["data.task"].choices:
            run = load(preset, task)
            assert None not in vars(run.objective).values()
            assert None not in vars(run.masking).values()
            assert resolve(run) == run


# layers, d, ffn, heads (section 4 of the paper)
SHAPES = {
    "iwslt": (6, 512, 1024, 4),
    "wmt": (6, 512, 2048, 8),
    "bart_base": (6, 768, 3072, 12),
    "bart_large": (12, 1024, 4096, 16),
}


@pytest.mark.parametrize("preset", sorted(MODEL_PRESETS))
def test_model_shapes(preset: str) -> None:
    model = load_run_config(None, [f"model.preset={preset}"]).model
    assert model.d_model % model.heads == 0
    if preset in SHAPES:
        layers, width, ffn, heads = SHAPES[preset]
        assert (model.encoder_layers, model.decoder_layers) == (layers, layers)
        assert (model.d_model, model.ffn_dim, model.heads) == (width, ffn, heads)
    nmt = preset in ("iwslt", "wmt")
    assert (model.activation, model.layernorm_embedding, model.scale_embedding) == (
        ("relu", False, True) if nmt else ("gelu", True, False)
    )


def test_the_schema_starts_without_choices_of_its_own() -> None:
    o = ObjectiveConfig()
    chosen = {name for name, value in vars(o).items() if value is not None}
    # Which losses are summed is not a preset's choice: all of them, unless a user takes fewer.
    assert {name for name in chosen if not name.startswith("ramp_")} == {
        "preset",
        "encoder_passes",
    }
    assert not any(getattr(o, name) for name in chosen if name.startswith("ramp_")), (
        "no ramp unless asked for"
    )
