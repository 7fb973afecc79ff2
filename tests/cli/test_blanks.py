"""`janus-ds blanks`: what is counted, and what a run that went on from another one is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from janus_ds.cli.blanks import blank_batches, fill_blanks, main
from janus_ds.config.load import load_run_config
from janus_ds.decode.load import load_run
from janus_ds.errors import UsageError
from tests.support.tiny_run import write_run
from tests.support.tiny_training import make_inputs


def random_run(inputs: Path, name: str, scale: float, *overrides: str) -> Path:
    """A run with random weights on the tiny data."""
    data = inputs / "data"
    config = load_run_config(inputs / "recipe.yaml", [f"data.path={data}", *overrides])
    return write_run(inputs / name, data, replace(config, model=replace(config.model, init_std=0.5)), scale)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("blanks"))
    random_run(folder, "before", 0.1, "objective.preset=ar_query")
    random_run(folder, "after", 0.2, f"init={folder / 'before'}")
    return folder


def test_every_hidden_token_counts_once(inputs: Path) -> None:
    run = load_run(inputs / "after")
    batches = blank_batches(run, 11)
    found = fill_blanks(run.model, batches)
    hidden, ar, nar = 0, 0, 0
    for batch in batches:
        assert batch.counts.samples == 11
        rows = run.model(batch)
        assert rows.ar_BAD is not None
        assert rows.nar_BMD is not None
        for b in range(batch.counts.samples):
            for j in range(int(batch.masked_length_B[b])):
                token = int(batch.masked_target_BM[b, j])
                shown = int((batch.source_BS[b] == token).sum())
                written = int((batch.ar_target_BA[b] == token).sum())
                assert shown < written, "a token that the encoder sees is not hidden"
                hidden += 1
                nar += int((rows.nar_BMD[b, j] @ run.model.output_weight[:60].T).argmax()) == token
        for place in batch.ar_masked_T.tolist():
            b, a = divmod(place, batch.ar_target_BA.shape[1])
            ar += int((rows.ar_BAD[b, a] @ run.model.output_weight[:60].T).argmax()) == int(
                batch.ar_target_BA[b, a]
            )
    assert hidden > 20
    assert (found.tokens, found.ar, found.nar) == (hidden, ar / hidden, nar / hidden)


def test_before_after_and_passages_are_told(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = inputs / "figures.json"
    options = ["--samples", "11", "--show", "2", "--device", "cpu", "--json", str(figures)]
    assert main([str(inputs / "after"), *options]) == 0
    told = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert f"before ({inputs / 'before'})" in told
    for when in ("before", "after"):
        for mode in ("ar", "nar"):
            assert f"{100 * found[when][mode]:.1f} %" in told
    assert found["before"] != found["after"]
    assert (found["step"], found["steps"]) == (10, 20)
    assert [told.count(f"\n{word} ") for word in ("source", "reference", "AR", "NAR")] == [2, 2, 2, 2]
    assert all(text["reference"] in told and "<mask>" in text["source"] for text in found["shown"])
    assert f"The run lies in {inputs / 'after'}" in told
    assert f"janus-ds decode --checkpoint {inputs / 'after'}" in told
    with pytest.raises(UsageError, match="not pretrained both ways"):
        main([str(inputs / "before"), "--device", "cpu"])
