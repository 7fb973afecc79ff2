"""`janus-ds blanks`: what is counted, and what a run that went on from another one is told."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from janus_ds.batch import TwoStreamBatch
from janus_ds.cli.blanks import Blanks, blank_batches, fill_blanks, main
from janus_ds.cli.decode import main as decode
from janus_ds.config.load import load_run_config
from janus_ds.data.stream.index import Manifest
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.model.janus import JanusModel
from tests.support.tiny_run import write_run


def random_run(inputs: Path, name: str, scale: float, *overrides: str) -> Path:
    """A run with random weights on the tiny data."""
    data = inputs / "data"
    given = [f"data.path={data}", "decode.max_length=40", *overrides]
    config = load_run_config(inputs / "recipe.yaml", given)
    return write_run(inputs / name, data, replace(config, model=replace(config.model, init_std=0.5)), scale)


@pytest.fixture(scope="module")
def inputs(inputs: Path) -> Path:
    random_run(inputs, "before", 0.1, "objective.preset=ar_query")
    random_run(inputs, "after", 0.2, f"init={inputs / 'before'}")
    return inputs


def test_every_hidden_token_counts_once(inputs: Path) -> None:
    run = load_run(inputs / "after")
    batches = blank_batches(run, 11)
    found = fill_blanks(run.model, batches)
    hidden, right = 0, {"ar": 0, "nar": 0, "aux": 0}
    for batch in batches:
        assert batch.counts.samples == 11
        rows = run.model(batch)
        assert rows.ar_BAD is not None
        assert rows.nar_BMD is not None
        assert rows.aux_BMD is not None
        for b in range(batch.counts.samples):
            for j in range(int(batch.masked_length_B[b])):
                token = int(batch.masked_target_BM[b, j])
                shown = int((batch.source_BS[b] == token).sum())
                written = int((batch.ar_target_BA[b] == token).sum())
                assert shown < written, "a token that the encoder sees is not hidden"
                hidden += 1
                for name, row in (("nar", rows.nar_BMD[b, j]), ("aux", rows.aux_BMD[b, j])):
                    right[name] += int((row @ run.model.output_weight[:60].T).argmax()) == token
        for place in batch.ar_masked_T.tolist():
            b, a = divmod(place, batch.ar_target_BA.shape[1])
            right["ar"] += int((rows.ar_BAD[b, a] @ run.model.output_weight[:60].T).argmax()) == int(
                batch.ar_target_BA[b, a]
            )
    assert hidden > 20
    assert found.tokens == hidden
    assert found.shares == pytest.approx({name: count / hidden for name, count in right.items()})
    tokens = torch.cat([batch.masked_target_BM.flatten()[batch.masked_T] for batch in batches]).tolist()
    common = {token for token, _ in Counter(tokens).most_common(10)}
    assert len(tokens) == hidden
    assert 0 < len([token for token in tokens if token not in common]) < hidden
    assert set(found.rare) == {"ar", "nar", "aux"}


def test_two_dropout_draws_are_no_more_passages(inputs: Path) -> None:
    twice = load_run(random_run(inputs, "twice", 0.2, "objective.weight_kl_nar_nar=1"))
    assert twice.config.objective.dropout_draws == 2
    found, expected = blank_batches(twice, 11), blank_batches(load_run(inputs / "after"), 11)
    assert [batch.counts for batch in found] == [batch.counts for batch in expected]


def test_before_after_and_passages_are_told(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = inputs / "figures.json"
    options = ["--samples", "11", "--show", "2", "--device", "cpu", "--json", str(figures)]
    assert main([str(inputs / "after"), *options]) == 0
    told = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert f"before ({inputs / 'before'})" in told
    for when in ("before", "after"):
        for mode in ("ar", "nar", "aux"):
            assert f"{100 * found[when][mode]:.1f} %" in told
    assert found["before"] != found["after"]
    assert (found["step"], found["steps"]) == (10, 20)
    assert [told.count(f"\n{word} ") for word in ("source", "reference", "AR", "NAR", "AUX")] == [2] * 5
    for text in found["shown"]:
        assert text["reference"] in told
        assert "<mask>" in text["source"]
        # What stands around the blanks is kept.
        first, *_, last = (part.strip() for part in text["source"].split("<mask>"))
        assert all(
            text[mode].startswith(first) and text[mode].endswith(last) for mode in ("ar", "nar", "aux")
        )
    assert f"The run lies in {inputs / 'after'}" in told
    assert f"janus-ds decode --checkpoint {inputs / 'after'}" in told
    with pytest.raises(UsageError, match="not pretrained both ways"):
        main([str(inputs / "before"), "--device", "cpu"])


def test_samples_of_another_vocabulary_are_refused(inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs / "data", data)
    replace(Manifest.load(data), tokenizer_fingerprint="0" * 64).save(data)
    run, more = str(inputs / "after"), ["--data", str(data), "--device", "cpu"]
    with pytest.raises(CheckpointError, match="another vocabulary than the data"):
        main([run, *more])
    with pytest.raises(CheckpointError, match="another vocabulary than the data"):
        decode(["--checkpoint", run, "--heldout", "2", *more])


@pytest.mark.parametrize("given", ["0", "-2", "many"])
def test_passages_must_be_asked_for(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["nowhere", f"--samples={given}"])
    assert caught.value.code == 2
    assert f"argument --samples: '{given}' is no whole number from 1 on: give one" in capsys.readouterr().err


def test_weights_that_a_run_began_with_may_be_a_file_or_gone(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "11", "--show", "0", "--device", "cpu"]

    def shares() -> list[list[str]]:
        return [line.split() for line in capsys.readouterr().out.splitlines() if " %" in line]

    main([str(inputs / "after"), *options])
    whole = shares()
    file = inputs / "before" / "checkpoints" / "step-00000010" / "weights.safetensors"
    main([str(random_run(inputs, "from_file", 0.2, f"init={file}")), *options])
    assert shares() == whole
    assert whole
    alone = random_run(inputs, "alone", 0.2, f"init={inputs / 'gone'}")
    assert main([str(alone), *options]) == 0
    told = capsys.readouterr().out
    assert f"began with is not measured: there are no weights here ({inputs / 'gone'})" in told
    assert " after" in told


def test_a_plain_model_that_a_run_began_with_is_asked_by_its_content_rows(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As BART: it has never learnt query rows."""
    asked: list[int] = []
    plain = random_run(inputs, "plain", 0.1, "objective.preset=ar")

    def fill(model: JanusModel, batches: list[TwoStreamBatch]) -> Blanks:
        asked.append(batches[0].layout.arq)
        return fill_blanks(model, batches)

    monkeypatch.setattr("janus_ds.cli.blanks.fill_blanks", fill)
    main([str(random_run(inputs, "second", 0.2, f"init={plain}")), "--show", "0", "--device", "cpu"])
    assert asked[0] == 0 < asked[1]


def test_few_hidden_tokens_of_small_ids_are_counted(inputs: Path) -> None:
    run = load_run(inputs / "after")
    (batch,) = blank_batches(run, 1)
    hidden = replace(batch, masked_target_BM=torch.full_like(batch.masked_target_BM, 5))
    assert fill_blanks(run.model, [hidden]).tokens == len(batch.masked_T)
