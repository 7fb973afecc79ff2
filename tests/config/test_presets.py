"""What presets bundle: the settings of the paper and of its released code."""

from __future__ import annotations

import pytest

from janus_ds.config.load import load_run_config
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import FIELDS, ObjectiveConfig, RunConfig

# weight_ar, _nar, _aux, _length, kl_ar_nar, kl_ar_aux, kl_nar_aux, label_smoothing (section 3 of the paper)
WEIGHTS = {
    ("paper", "denoise"): (1.0, 1.0, 1.0, 0.1, 0.0, 2.0, 2.0, 0.1),
    ("paper", "pair"): (1.0, 1.0, 1.0, 0.1, 0.0, 2.0, 2.0, 0.1),
    ("released", "pair"): (1.0, 0.5, 0.5, 0.1, 1.0, 3.0, 1.0, 0.1),
    ("released", "denoise"): (0.5, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0),
    ("ar", "pair"): (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1),
    ("ar_query", "pair"): (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1),
    ("cmlm", "pair"): (0.0, 1.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.1),
}


def load(preset: str, task: str, *overrides: str) -> RunConfig:
    return load_run_config(None, [f"objective.preset={preset}", f"data.task={task}", *overrides])


@pytest.mark.parametrize(("preset", "task"), sorted(WEIGHTS))
def test_loss_weights(preset: str, task: str) -> None:
    o = load(preset, task).objective
    found = (o.weight_ar, o.weight_nar, o.weight_aux, o.weight_length)
    found += (o.weight_kl_ar_nar, o.weight_kl_ar_aux, o.weight_kl_nar_aux, o.label_smoothing)
    assert found == WEIGHTS[preset, task]


# weight_ar, _nar, _aux, _length, kl_ar_ar, kl_nar_nar, kl_aux_aux, masking law, AUX order
TWO_DRAWS = {
    "ar_rdrop": (2.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, "span_union", "left_to_right"),
    "ar_query_rdrop": (2.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, "span_union", "left_to_right"),
    "released_finetune": (0.0, 1.0, 1.0, 0.1, 0.0, 1.0, 1.0, "uniform", "random"),
}


@pytest.mark.parametrize("preset", sorted(TWO_DRAWS))
def test_presets_of_two_dropout_draws(preset: str) -> None:
    """R-Drop and the released fine-tuning; no term between different streams."""
    run = load(preset, "pair")
    o = run.objective
    found = (o.weight_ar, o.weight_nar, o.weight_aux, o.weight_length)
    found += (o.weight_kl_ar_ar, o.weight_kl_nar_nar, o.weight_kl_aux_aux)
    assert (*found, run.masking.target, run.masking.aux_order) == TWO_DRAWS[preset]
    assert (o.weight_kl_ar_nar, o.weight_kl_ar_aux, o.weight_kl_nar_aux) == (0.0, 0.0, 0.0)
    assert (o.dropout_draws, o.encoder_passes) == (2, 1)
    assert o.ar_stream == ("content" if preset == "ar_rdrop" else "query")


@pytest.mark.parametrize("preset", ["paper", "released", "ar", "ar_query", "cmlm"])
def test_other_presets_take_one_draw(preset: str) -> None:
    run = load(preset, "pair")
    assert (run.objective.dropout_draws, run.masking.aux_order) == (1, "left_to_right")


@pytest.mark.parametrize(("preset", "task"), sorted(WEIGHTS))
def test_conventions(preset: str, task: str) -> None:
    run = load(preset, task)
    o, released = run.objective, preset == "released"
    translation = released and task == "pair"
    assert o.ar_stream == ("content" if preset == "ar" else "query")
    assert o.ar_query_position == ("previous" if translation else "predicted")
    assert o.decoder_start == ("eos_bos" if task == "denoise" else "bos")
    assert o.length_convention == ("with_specials" if released else "inner")
    assert o.mask_symbol == ("unk" if translation else "mask")
    assert o.normalise == ("target_tokens" if released and task == "denoise" else "per_term")
    assert run.model.length_classes == (256 if released else run.model.max_target_positions)
    assert run.decode.nar_score == ("released" if released else "paper")


@pytest.mark.parametrize(
    ("preset", "task", "expected"),
    [
        ("paper", "denoise", ("infilling", 0.5, 0.3, 2.0, 0.0)),
        ("paper", "pair", ("span_union", 0.7, 0.0, 2.0, 0.0)),
        ("released", "denoise", ("infilling_released", 0.3, 0.3, 3.0, 0.5)),
        ("released", "pair", ("span_overlap", 0.7, 0.0, 2.0, 0.0)),
        ("cmlm", "pair", ("uniform", 0.0, 0.0, 2.0, 0.0)),
        ("ar", "pair", ("span_union", 0.7, 0.0, 2.0, 0.0)),
    ],
)
def test_masking(preset: str, task: str, expected: tuple[object, ...]) -> None:
    m = load(preset, task).masking
    assert (m.target, m.target_share, m.source_share, m.poisson, m.rotate_share) == expected


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
