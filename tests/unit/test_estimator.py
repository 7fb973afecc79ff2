"""Options that change the estimator: what they are called, what is refused, what they leave as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from janus_ds.batch import SpecialTokens
from janus_ds.config.estimator import estimator_name, full_estimator
from janus_ds.config.load import fingerprint, load_run_config
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.errors import ConfigError
from janus_ds.observe.run_record import write_run_record
from janus_ds.tools.explain import main as explain

PAIR = "data.task=pair"


def test_names_say_what_is_left_out() -> None:
    assert estimator_name(ObjectiveConfig()) == "full"
    both = ObjectiveConfig(ar_loss="masked", aux_share=0.5)
    assert estimator_name(both) == "AR loss on masked tokens and eos only; AUX and KL on 50% of the sentences"


def test_validation_measures_everything() -> None:
    run = load_run_config(None, ["objective.ar_loss=masked", "objective.aux_share=.25"])
    full = full_estimator(run)
    assert estimator_name(full.objective) == "full"
    assert full == load_run_config(None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.aux_share=0"], "more than 0 and at most 1"),
        (["objective.aux_share=1.5"], "more than 0 and at most 1"),
        (["objective.ar_loss=some"], "no value 'some'"),
        (["objective.preset=ar", "objective.ar_loss=masked", PAIR], "needs AR queries and masked tokens"),
        (["objective.preset=ar_query", "objective.ar_loss=masked", PAIR], "needs AR queries and masked"),
        (["objective.preset=cmlm", "objective.ar_loss=masked", PAIR], "needs AR queries and masked tokens"),
        (["objective.ar_stream=content", "objective.ar_loss=masked"], "needs AR queries and masked tokens"),
        (["objective.preset=cmlm", "objective.aux_share=.5", PAIR], "neither AUX nor a KL term with it"),
        (["train.attention_backend=dense", "objective.aux_share=.5"], "cannot leave out the AUX rows"),
        (["train.compile=graphs", "objective.aux_share=.5"], "every batch has its own"),
        (["train.compile=graphs", "data.pack_rows=true"], "every batch has its own"),
    ],
)
def test_nonsense_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_run_config(None, overrides)


def test_they_are_part_of_what_is_trained_but_runs_from_before_go_on() -> None:
    plain = load_run_config(None)
    for change in ("objective.ar_loss=masked", "objective.aux_share=.5"):
        assert fingerprint(load_run_config(None, [change])) != fingerprint(plain)
    # As it was before these fields were there.
    assert fingerprint(plain) == fingerprint(load_run_config(None, ["objective.aux_share=1"]))


def test_the_run_record_names_the_estimator(tmp_path: Path) -> None:
    run = load_run_config(None, ["objective.aux_share=.5"])
    special = SpecialTokens(0, 1, 2, 3, 4, 60)
    write_run_record(tmp_path, replace(run, name="x"), special, "print", {}, 0)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["estimator"] == "AUX and KL on 50% of the sentences"
    assert record["recipe"]["objective"]["aux_share"] == 0.5


def test_both_fields_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("objective.ar_loss", "objective.aux_share"):
        assert explain([key]) == 0
        assert "changes the estimator" in capsys.readouterr().out
