"""Recipes: reading, overriding, presets, all faults at once, fingerprints."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_ds.config.fields import ConfigFaultsError, FaultList
from janus_ds.config.load import from_dict, load_run_config, read_run_config, to_dict
from janus_ds.config.modes import check_mode
from janus_ds.config.schema import FIELDS, SECTIONS, RunConfig
from janus_ds.errors import nearest

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(recipe: Path | None, *overrides: str) -> ConfigFaultsError:
    with pytest.raises(ConfigFaultsError) as caught:
        load_run_config(recipe, overrides)
    assert caught.value.exit_code == 3
    return caught.value


def test_recipe_then_overrides_then_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path, "name: mine\noptim:\n  lr: 1e-4\n  warmup_steps: 7\n")
    run = load_run_config(recipe, ["optim.warmup_steps=9", "train.max_steps=20", "optim.warmup_steps=11"])
    assert (run.name, run.optim.lr, run.optim.warmup_steps, run.train.max_steps) == ("mine", 1e-4, 11, 20)
    assert run.train.global_batch == RunConfig().train.global_batch
    # After --set all is text until the field says what it is.
    given = load_run_config(None, ["name=2024", "model.preset=1b"])
    assert (given.name, given.model.preset) == ("2024", "1b")


def test_an_empty_recipe_and_none_are_the_defaults(tmp_path: Path) -> None:
    assert load_run_config(write(tmp_path, "# nothing\nmodel:\n")) == load_run_config(None)


def test_model_preset_fills_only_what_is_not_given(tmp_path: Path) -> None:
    recipe = write(tmp_path, "model:\n  preset: bart_base\n  dropout: 0.3\n")
    model = load_run_config(recipe, ["model.decoder_layers=2"]).model
    assert (model.encoder_layers, model.decoder_layers, model.d_model, model.heads) == (6, 2, 768, 12)
    assert (model.dropout, model.attention_dropout, model.layernorm_embedding) == (0.3, 0.1, True)


def test_nothing_is_left_to_presets_after_loading() -> None:
    run = load_run_config(None)
    optional = {key for key, spec in FIELDS.items() if spec.optional}
    left = {key for key in optional if attrgetter(key)(run) is None}
    off = {"decode.threshold", "decode.rescore", "decode.forced_bos", "decode.forced_eos"}
    assert left == {"init", "model.preset", "data.path", "data.valid_path"} | off


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "modle:\n  d_model: 8\nmodel:\n  heads: 3\n  d_model: 128\noptim:\n  lr: fast\n  beta2: 1.5\n"
        "data: 7\ntrain:\n  max_steps: 1.5\n",
    )
    error = faults_of(recipe, "objective.preset=papers", "lr=1", "train.seed")
    text = str(error)
    assert len(error.faults) == 9
    for words in (
        "unknown key 'modle'",
        "did you mean 'model",
        "3 heads do not divide d_model 128",
        "optim.lr must be a number, not 'fast' (text)",
        "optim.beta2 is 1.5, but must be at least 0 and less than 1",
        "data is a section, not a value",
        "train.max_steps must be a whole number, not 1.5 (a number)",
        "objective.preset has no value 'papers'",
        "did you mean 'paper'?",
        "unknown key 'lr'",
        "did you mean 'optim.lr'?",
        "an override has no '='",
        f"{recipe}: optim.beta2",
        "--set objective.preset=papers",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=5"], "5 heads do not divide d_model 128"),
        (
            ["data.block_tokens=126", "model.max_target_positions=100"],
            "need 128 positions, but model.max_target_positions is 100",
        ),
        (
            ["data.block_tokens=126", "model.max_source_positions=100"],
            "need 128 positions, but model.max_source_positions is 100",
        ),
        (["masking.source_share=0.6"], "masking.source_share 0.6 is above masking.target_share 0.5"),
        (["masking.target_share=0"], "nothing would be masked"),
        (["data.task=pair", "masking.target=infilling"], "task 'pair' has a source of its own"),
        (["objective.preset=cmlm", "objective.weight_nar=0"], "no token is trained"),
        (
            ["optim.schedule=polynomial", "optim.warmup_steps=300"],
            "warms up for 300 steps, but the run has 300",
        ),
        (["optim.warmup_init_lr=1"], "above the peak learning rate"),
        (["decode.max_length=1025"], "the model has 1024 target positions"),
        (["model.dropout=1"], "less than 1"),
        (["model.dropout=.nan"], "less than 1"),
        (["train.global_batch=0"], "more than 0"),
        (["objective.weight_ar=-1"], "at least 0"),
        (["masking.rotate_share=1.1"], "at least 0 and at most 1"),
        (["model.length_classes=1"], "at least 2"),
        (["train.log_every=true"], "must be a whole number, not True (true or false)"),
        (["model.activation=gelus"], "did you mean 'gelu'?"),
        (["train.spike_action=skp"], "did you mean 'skip'?"),
        (["train.spike_window=7"], "at least 8 and at most 10000"),
        (["train.spike_action=skip", "train.max_steps=100"], "a spike is seen after 100 steps"),
        (["train.stall_minutes=-1"], "at least 0"),
        (
            ["train.stall_minutes=1", "data.path=https://host/data"],
            "but a transfer of data may take 60 s",
        ),
        (
            ["train.stall_minutes=1", "data.path=a=0.5,https://host/b=0.5"],
            "but a transfer of data may take 60 s",
        ),
        (["train.valid_samples=0"], "train.valid_samples is 0, but must be more than 0"),
        (["train=3"], "train is a section, not a field"),
        (["train.valid_bleu=ar"], "scores outputs for given sources, but the task is 'denoise'"),
        (["data.task=pair", "train.keep_best=nar"], "does not measure that mode"),
        (["data.task=pair", "train.patience=3"], "train.keep_best names no figure"),
        (["train.valid_bleu=bleu"], "has no value 'bleu'"),
        (["objective.encoder_passes=3"], "must be at least 1 and at most 2"),
        (
            ["data.task=pair", "objective.preset=cmlm", "objective.encoder_passes=2"],
            "does not train AR beside",
        ),
        (["data.task=pair", "objective.preset=ar", "objective.weight_kl_nar_nar=1"], "weight_nar is 0"),
        (["masking.aux_order=backwards"], "masking.aux_order has no value 'backwards'"),
        (["decode.threshold=0"], "more than 0 and at most 1"),
        (["decode.threshold=1.01"], "more than 0 and at most 1"),
        (["name=[1"], None),
    ],
)
def test_values_are_checked_alone_and_together(overrides: list[str], words: str | None) -> None:
    if words is None:
        assert load_run_config(None, overrides).name == "[1"
        return
    error = faults_of(None, *overrides)
    assert len(error.faults) == 1
    assert words in str(error)
    assert error.where
    assert error.fix


def test_an_override_that_nothing_reads_is_noted() -> None:
    faults = FaultList()
    (pairs,) = (path for path in RECIPES if path.stem == "nmt_iwslt")
    read_run_config(pairs, ["train.global_batch=64", "train.batch_groups=4"], faults)
    read_run_config(None, ["train.global_batch=64", "train.batch_groups=4", "objective.preset=ar"], faults)
    read_run_config(None, ["objective.ramp_start=9", "objective.ramp_kl_steps=5"], faults)
    read_run_config(None, ["objective.ramp_start=9"], faults)
    ramps = [f"objective.ramp_{term}_steps=5" for term in ("kl", "nar", "aux")]
    read_run_config(None, ramps, faults)
    read_run_config(None, ["objective.preset=ar", *ramps], faults)
    read_run_config(None, ["train.patience=3", "train.keep_best=loss", "train.valid_every=0"], faults)
    read_run_config(pairs, ["objective.ar_query_position=previous"], faults)
    read_run_config(None, ["objective.ar_query_position=previous"], faults)
    read_run_config(None, ["objective.preset=released", "masking.source_share=.2"], faults)
    read_run_config(pairs, ["objective.preset=ar", "masking.target_share=.5"], faults)
    read_run_config(pairs, ["objective.preset=cmlm", "masking.target_share=.5"], faults)
    read_run_config(pairs, ["objective.preset=cmlm", "objective.ar_stream=content"], faults)
    read_run_config(None, ["data.workers=0", "data.prefetch_steps=4", "data.retries=1"], faults)
    read_run_config(None, ["data.path=https://host/data", "data.retries=1"], faults)
    read_run_config(None, ["optim.warmup_steps=0", "optim.warmup_init_lr=1e-6"], faults)
    assert faults.notes == [
        "train.global_batch has no effect: data.batch is tokens, and train.batch_tokens counts",
        "train.batch_groups has no effect: data.batch is samples",
        "objective.ramp_start has no effect: no ramp has steps (objective.ramp_kl_steps and so on)",
        "objective.ramp_kl_steps has no effect: no KL term has a weight",
        "objective.ramp_nar_steps has no effect: objective.weight_nar is 0",
        "objective.ramp_aux_steps has no effect: objective.weight_aux is 0",
        "train.patience has no effect: train.valid_every is 0",
        "objective.ar_query_position has no effect: there are no AR query rows with decoder_start bos",
        "masking.source_share has no effect: masking.target infilling_released hides half of the spans",
        "masking.target_share has no effect: neither NAR nor AUX is trained",
        "masking.target_share has no effect: masking.target is uniform",
        "objective.ar_stream has no effect: AR is not trained",
        "data.prefetch_steps has no effect: data.workers is 0",
        "data.retries has no effect: all data is on this machine",
        "optim.warmup_init_lr has no effect: optim.warmup_steps is 0",
    ]


def test_sources_of_pairs_may_be_longer_than_blocks() -> None:
    load_run_config(None, ["data.task=pair", "model.max_source_positions=100"])


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "name: a")
    error = faults_of(tmp_path / "recipes.yaml")
    assert "cannot be read: No such file" in error.what
    assert "did you mean 'recipe.yaml'?" in error.fix


def test_every_field_has_a_text_and_every_choice_a_field() -> None:
    assert not [key for key, spec in FIELDS.items() if len(spec.text) < 8]
    assert not [name for name, kind in SECTIONS.items() if len(kind.__doc__ or "") < 8]
    for key, spec in FIELDS.items():
        missing = [name for name in spec.choices if name not in spec.text]
        assert not missing, f"the text of {key} does not name {missing}"


@given(st.sampled_from(sorted(FIELDS)), st.integers(0, 40), st.characters(categories=["Ll"]))
def test_one_wrong_letter_is_understood(key: str, place: int, letter: str) -> None:
    place %= len(key)
    wrong = key[:place] + letter + key[place + 1 :]
    assert wrong == key or nearest(wrong, FIELDS) is not None


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.just({})
)


@given(st.sampled_from(sorted(FIELDS)), VALUES)
def test_any_value_is_taken_as_its_type_or_refused_in_words(key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    spec = FIELDS[key]
    try:
        run = from_dict({section: {name: value}} if section else {name: value})
    except ConfigFaultsError as error:
        refusal = error
    else:
        taken = attrgetter(key)(run)
        assert taken is None or type(taken) is spec.type
        assert (
            value is None
            or taken == value
            or (key, value) == ("data.block_tokens", 0)
            or (spec.type in (bool, str) and isinstance(value, str))
        )
        return
    assert key in str(refusal)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_write_numbers_as_yaml_reads_them(recipe: Path) -> None:
    run = load_run_config(recipe)
    assert run.name == recipe.stem
    assert run.data.task == ("pair" if run.name.startswith(("glge", "nmt")) else "denoise")
    assert run.train.max_steps > run.optim.warmup_steps
    check_mode(run)
    assert from_dict(to_dict(run)) == run


def test_a_record_may_lack_later_fields_and_has_no_unknown_ones() -> None:
    values = to_dict(load_run_config(None, ["train.log_every=5"]))
    del values["train"]["log_every"]
    assert from_dict(values) == load_run_config(None)
    values["model"]["depth"] = 3
    with pytest.raises(ConfigFaultsError, match=r"unknown key 'model\.depth'"):
        from_dict(values)


def test_the_paper_recipe_is_the_papers() -> None:
    run = load_run_config(next(r for r in RECIPES if r.stem == "bart_base"))
    assert (run.model.heads, run.data.block_tokens, run.train.global_batch) == (12, 510, 1024)
    optim = run.optim
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-4, "polynomial", 10_000)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-6, 0.01)
    assert (run.masking.source_share, run.masking.target_share, run.masking.poisson) == (0.3, 0.5, 2.0)
    assert (run.objective.weight_kl_ar_aux, run.objective.weight_kl_nar_aux) == (2.0, 2.0)
