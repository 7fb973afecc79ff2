"""The table of decoding modes: what each needs to have learnt, and what is said where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from janus_ds.config.load import load_run_config
from janus_ds.config.modes import MODES, NAMES, RESCORED, check_mode, check_used, trained_modes, with_decode
from janus_ds.config.presets import resolve
from janus_ds.config.schema import FIELDS, DecodeConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.load import _fit_threads
from janus_ds.errors import ConfigError


def test_every_mode_and_option_is_a_field() -> None:
    assert FIELDS["decode.mode"].choices == NAMES
    for mode in MODES.values():
        assert {f"decode.{name}" for name in mode.options - {"nbest", "target"}} <= set(FIELDS)
        assert not mode.size or mode.size in mode.options
    assert MODES["nar"].options < MODES[RESCORED].options


def trained(**changes: Any) -> tuple[str, ...]:
    objective = resolve(RunConfig(objective=ObjectiveConfig(**changes))).objective
    return trained_modes(objective, ("ar", "nar", "draft", "aux"))


def test_modes_follow_the_trained_losses() -> None:
    assert trained() == ("ar", "nar", "draft", "aux")
    assert trained(preset="ar") == trained(preset="ar_query") == ("ar",)
    assert trained(preset="cmlm") == ("nar",)
    assert trained(preset="released") == ("ar",)  # pretraining: its length head is not trained
    # AUX alone (Table 6), and released fine-tuning: nothing predicts eos, so AR would write to its limit.
    assert trained(weight_ar=0.0, weight_nar=0.0) == trained(preset="released_finetune") == ("nar", "aux")


@pytest.mark.parametrize(
    ("objective", "decode", "told", "where"),
    [
        ({"preset": "ar"}, {"mode": "draft"}, r"both ways.*weight_nar is 0.*weight_length", "decode.mode"),
        ({"preset": "cmlm"}, {"mode": "draft"}, r"both ways.*weight_ar is 0", "decode.mode"),
        ({"preset": "cmlm"}, {"mode": "nar", "rescore": "ar"}, r"as --rescore ar needs", "decode.rescore"),
        ({"weight_length": 0.0}, {"mode": "nar"}, r"in mode 'nar' .*weight_length is 0\.0", "decode.mode"),
        ({"weight_aux": 0.0}, {"mode": "aux"}, r"in mode 'aux' \(objective\.weight_aux is 0", "decode.mode"),
        ({"weight_length": 0.0}, {"mode": "aux"}, r"objective\.weight_length is 0", "decode.mode"),
        ({}, {"mode": "aux", "aux_order": "certain"}, "AUX was trained left_to_right", "decode.aux_order"),
    ],
)
def test_a_mode_that_was_not_trained_is_refused(
    objective: dict[str, Any], decode: dict[str, Any], told: str, where: str
) -> None:
    config = resolve(RunConfig(objective=ObjectiveConfig(**objective)))
    with pytest.raises(ConfigError, match=told) as caught:
        check_mode(with_decode(config, decode))
    assert caught.value.where == where
    assert caught.value.fix.startswith(("use mode ", "leave it out, or use a model"))


@pytest.mark.parametrize(
    ("decode", "told"),
    [
        ({"mode": "aux", "beam": 4}, r"decode\.beam is 4, but mode aux has no beam"),
        ({"mode": "draft", "beam": 4}, r"decode\.beam is 4, but mode draft"),
        ({"mode": "draft", "prefix": "My"}, r"mode draft .* knows no prefix"),
        ({"mode": "aux", "aux_order": "wild"}, r"decode\.aux_order has no value 'wild'"),
        ({"mode": "ar", "beem": 3}, r"unknown key 'decode\.beem'"),
    ],
)
def test_options_that_cannot_be(decode: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        with_decode(RunConfig(), decode)
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("mode", "decode", "told"),
    [
        ("ar", {"iterations": 0}, "mode ar does not use iterations"),
        ("nar", {"temperature": 0.7}, "mode nar does not use temperature"),
        ("nar", {"rescore": "ar", "beam": 3}, "mode nar with --rescore ar does not use beam"),
        ("aux", {"threshold": 0.9}, "mode aux does not use threshold"),
        ("aux", {"forced_bos": 5}, "mode aux does not use forced_bos"),
        ("nar", {"forced_eos": -1}, "mode nar does not use forced_eos"),
        ("ar", {"top_k": 5}, "top_k has no effect without temperature"),
        ("aux", {"top_p": 0.9}, "top_p has no effect without temperature"),
    ],
)
def test_an_option_that_the_mode_does_not_use_is_refused(mode: str, decode: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_used(DecodeConfig(mode=mode, **decode), decode)


def test_options_of_other_modes_pass_where_they_change_nothing() -> None:
    check_used(DecodeConfig(mode="draft"), {"beam": 1, "max_length": 9, "seed": 2})
    check_used(DecodeConfig(mode="nar", rescore="ar"), {"length_penalty": 0.6, "temperature": 0.0})
    check_used(DecodeConfig(mode="ar", temperature=0.7), {"top_k": 5, "top_p": 0.9, "forced_eos": -1})
    check_used(DecodeConfig(mode="draft"), {"forced_bos": 5})


def test_what_only_the_recipe_names_is_not_taken_over() -> None:
    """A beam is AR's, and a schedule of passes is not a threshold's."""
    assert with_decode(RunConfig(), {"mode": "aux"}).decode.beam == 1
    assert with_decode(RunConfig(), {"mode": "ar", "temperature": 1.0}).decode.beam == 1
    sampled = RunConfig(decode=DecodeConfig(mode="ar", temperature=1.0))
    assert with_decode(sampled, {}).decode.beam == 1
    # The best of several draws would be no exact sample.
    assert with_decode(sampled, {"mode": "aux"}).decode.length_beam == 1
    assert with_decode(sampled, {"mode": "aux", "length_beam": 3}).decode.length_beam == 3
    assert with_decode(RunConfig(), {"threshold": 0.9}).decode.iterations is None
    with pytest.raises(ConfigError, match=r"decode\.iterations is null"):
        load_run_config(None, ["decode.iterations=null"])


def test_a_wide_model_after_a_narrow_one_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    found: list[int] = []
    try:
        torch.set_num_threads(3)
        for width in (128, 128, 768, 768, 128, 1024):
            _fit_threads(width)
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [1, 1, 3, 3, 1, 3]
