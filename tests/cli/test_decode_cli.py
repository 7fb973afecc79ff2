"""`eval/decode.py` and `Generator.from_checkpoint` on a run folder with random weights."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.checkpoint.manifest import write_manifest
from janus_ds.checkpoint.tensors import read_weights, write_tensors
from janus_ds.cli import decode
from janus_ds.cli.decode_lines import infill
from janus_ds.cli.demo import Demo, Request
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, RunConfig
from janus_ds.data.stream.index import Manifest
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import find_run
from janus_ds.errors import CheckpointError, DataError, UsageError
from tests.support.tiny_data import make_tiny_data
from tests.support.tiny_run import write_run

SENTENCES = ["the old man saw the river at night .", "nobody lost three letters in the morning ."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it: two checkpoints, of which the newer one counts."""
    folder = tmp_path_factory.mktemp("decode")
    model = ModelConfig(
        d_model=16, heads=2, ffn_dim=16, max_source_positions=50, max_target_positions=50, init_std=0.2
    )
    data = make_tiny_data(folder / "data")
    config = RunConfig(name="tiny", model=model, data=DataConfig(path=str(data), block_tokens=48))
    return write_run(folder / "run", data, resolve(config), 0.1)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run folder to damage."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def feed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def edit_record(run: Path, **changes: Any) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | changes))


def test_lines_in_lines_out_in_order(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["the old man saw the <mask> .", "", SENTENCES[0], "a"]
    for mode, options in (
        ("nar", {"iterations": 1, "length_beam": 2}),
        ("ar", {"beam": 2, "max_length": 9, "beam_stop": "transformers", "early_stopping": True}),
    ):
        feed(monkeypatch, "\n".join(lines) + "\n")
        flags = [f"--{k.replace('_', '-')}" + (f"={v}" if v is not True else "") for k, v in options.items()]
        assert decode.main(["--checkpoint", str(run), "--mode", mode, "--dtype", "fp32", *flags]) == 0
        found = capsys.readouterr().out.split("\n")
        generator = Generator.from_checkpoint(run, mode, device="cpu", **options)
        expected = generator.generate(lines)
        assert found == [*(item.text for item in expected), ""]
        assert found[1] == ""
        assert [item.tokens for item in expected] != [()] * 4
        # One by one: batches and padding change nothing.
        assert [generator.generate([line])[0].tokens for line in lines] == [item.tokens for item in expected]
        assert max(len(item.tokens) for item in expected) <= 48


def test_both_ways_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A draft is AR with one beam, whatever beam the run's recipe names; other options reach the search."""

    def lines(*flags: str) -> list[str]:
        feed(monkeypatch, "\n".join(SENTENCES) + "\n")
        fixed = ["--max-length", "12", "--dtype", "fp32"]
        assert decode.main(["--checkpoint", str(run), *fixed, *flags]) == 0
        return capsys.readouterr().out.splitlines()

    greedy = lines("--mode", "ar", "--beam", "1", "--dtype", "float64")
    assert lines("--mode", "draft", "--dtype", "float64") == greedy
    hot = ["--mode", "draft", "--temperature", "3"]
    assert lines(*hot, "--seed", "5") == lines(*hot, "--seed", "5") != lines(*hot, "--seed", "6")
    shown = lines("--mode", "ar,draft", "--beam", "2")
    assert [line.split()[0] for line in shown if line] == [
        "[1]",
        "source",
        "AR",
        "DRAFT",
        "[2]",
        "source",
        "AR",
        "DRAFT",
    ]
    options = {"iterations": 2, "length_beam": 4, "rescore": "ar", "threshold": 0.3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    made = Generator.from_checkpoint(run, "nar", device="cpu", max_length=12, **options)
    assert lines("--mode", "nar", *flags) == [item.text for item in made.generate(SENTENCES)]
    by_aux = Generator.from_checkpoint(run, "aux", device="cpu", max_length=12)
    assert lines("--mode", "aux") == [item.text for item in by_aux.generate(SENTENCES)]
    # A sample is one draw, not the best of as many as the recipe names lengths.
    drawn = ["--mode", "aux", "--temperature", "3"]
    assert lines(*drawn) == lines(*drawn, "--length-beam", "1") != lines(*drawn, "--length-beam", "5")
    with pytest.raises(UsageError, match="mode aux does not use --beam"):
        lines("--mode", "aux", "--beam", "4")


def test_the_newest_checkpoint_is_taken_and_another_can_be_named(run: Path) -> None:
    newest = Generator.from_checkpoint(run, device="cpu").model.state_dict()
    older = Generator.from_checkpoint(run / "checkpoints" / "step-00000005", device="cpu").model.state_dict()
    stored = read_weights(run / "checkpoints" / "step-00000010" / "weights.safetensors")
    assert all(torch.equal(newest[name], value) for name, value in stored.items())
    assert torch.equal(older["length_head.weight"], newest["length_head.weight"] / 2)


@pytest.mark.parametrize(("share", "shown"), [(0.0, 20), (0.3, 14), (0.25, 15), (1.0, 0)])
def test_infill_hides_the_share_exactly(share: float, shown: int) -> None:
    words = [f"w{i}" for i in range(20)]
    results = {infill(" ".join(words), share, str(seed)) for seed in range(20)}
    for result in results:
        kept = [word for word in result.split() if word != "<mask>"]
        assert kept == sorted(kept, key=words.index)
        assert len(kept) == shown
        assert "<mask> <mask>" not in result
    assert len(results) > 10 or shown in (0, 20)
    assert infill("", share, "1") == ""


BAD_INPUTS: list[tuple[bytes, str, str]] = [
    (b"", "the input is empty", "standard input"),
    (b" \n\n", "the input is empty", "standard input"),
    (b"good\nb\xffd\n", "not UTF-8", "standard input, line 2"),
]


@pytest.mark.parametrize(("data", "text", "where"), BAD_INPUTS)
def test_bad_input(run: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, text: str, where: str) -> None:
    feed(monkeypatch, data)
    with pytest.raises(DataError, match=text) as caught:
        decode.main(["--checkpoint", str(run), "--mode", "nar"])
    assert caught.value.where == where


def test_damaged_and_foreign_checkpoints(copy: Path) -> None:
    def refused(text: str, path: Path = copy) -> None:
        with pytest.raises(CheckpointError, match=text):
            Generator.from_checkpoint(path, device="cpu")

    record = json.loads((copy / "run.json").read_text())
    newest = copy / "checkpoints" / "step-00000010"
    weights = newest / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("another checksum")
    earlier = newest.with_name("step-00000005")
    refused(f"which is whole: {earlier}")
    refused(f"which is whole: {earlier}", newest)
    weights.write_bytes(whole[:-1])
    refused("bytes instead of")
    weights.write_bytes(whole)
    edit_record(copy, format_version=99)
    refused("written in format 99")
    edit_record(copy, **(record | {"tokenizer_fingerprint": "0" * 64}))
    refused("not the one that the run was trained with")
    shape = record["recipe"] | {"model": record["recipe"]["model"] | {"d_model": 32}}
    edit_record(copy, **(record | {"recipe": shape}))
    refused("do not fit the model")
    edit_record(copy, **record)
    # On another disk, by links: all checkpoints, or one.
    (copy / "checkpoints").rename(copy.parent / "disk")
    (copy / "checkpoints").symlink_to(copy.parent / "disk")
    assert find_run(newest) == (copy, weights)
    (copy / "checkpoints").unlink()
    (copy.parent / "disk").rename(copy / "checkpoints")
    (copy.parent / "link").symlink_to(newest)
    assert find_run(copy.parent / "link")[0] == copy.resolve()
    broken = read_weights(weights)
    broken["length_head.weight"][0] = float("nan")
    write_tensors(weights, broken)
    write_manifest(newest)
    refused("length_head.weight: training had diverged")
    (copy / "run.json").write_text("{")
    refused("run.json cannot be read")
    shutil.rmtree(copy / "checkpoints")
    refused("has no checkpoint yet")
    (copy / "run.json").unlink()
    refused("holds no run.json")


@pytest.mark.parametrize("mode", ["aux", "draft"])
def test_a_beam_goes_with_the_mode_that_is_asked_for(copy: Path, tmp_path: Path, mode: str) -> None:
    """The mode of the run's recipe knows no beam."""
    recipe = json.loads((copy / "run.json").read_text())["recipe"]
    edit_record(copy, recipe=recipe | {"decode": recipe["decode"] | {"mode": mode, "beam": 1}})
    (tmp_path / "in.txt").write_text("a\n")
    flags = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt"), "--max-length", "9"]
    assert decode.main(["--checkpoint", str(copy), "--mode", "ar", "--beam", "2", *flags]) == 0


def test_samples_that_the_recipe_asks_for(copy: Path, tmp_path: Path) -> None:
    recipe = json.loads((copy / "run.json").read_text())["recipe"]
    changes = {"mode": "ar", "temperature": 3.0, "seed": 5}
    edit_record(copy, recipe=recipe | {"decode": recipe["decode"] | changes})
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES))
    output = tmp_path / "out.txt"

    def lines(*flags: str) -> list[str]:
        fixed = ["--checkpoint", str(copy), "--input", str(tmp_path / "in.txt"), "--output", str(output)]
        assert decode.main([*fixed, "--dtype", "fp32", *flags]) == 0
        return output.read_text().splitlines()

    assert lines() == lines("--seed", "5") == lines("--temperature", "3") != lines("--seed", "6")
    assert lines("--top-k", "1") == lines("--temperature", "0", "--beam", "1")
    hidden = ("--temperature", "0", "--mask-share", "0.5", "--show-source")
    assert lines(*hidden) == lines(*hidden, "--seed", "5") != lines(*hidden, "--seed", "1")
    with pytest.raises(UsageError, match="samples have no beam"):
        lines("--beam", "2")


def test_capitals_of_a_model_of_lower_cased_text(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((copy / "run.json").read_text())["recipe"]
    Manifest("pair", "0" * 64, 60, {"lowercase": True}, {}).save(tmp_path)
    edit_record(copy, recipe=recipe | {"data": recipe["data"] | {"path": str(tmp_path)}})

    def warned(text: str) -> int:
        feed(monkeypatch, text)
        flags = ["--mode", "nar", "--iterations", "0", "--dtype", "fp32"]
        assert decode.main(["--checkpoint", str(copy), *flags]) == 0
        told = "warning: the model was trained on lower-cased text: give it lower-cased input\n"
        return capsys.readouterr().err.count(told)

    assert warned("a dog\n") == 0
    assert warned("A dog\nA man\n" * 20) == 1
    (tmp_path / "manifest.json").unlink()
    assert warned("A dog\n") == 0
    demo = Demo(copy, "cpu")
    demo.decode(Request(text="A dog", iterations=0), lambda told: None)
    assert "warning" not in capsys.readouterr().err
    Manifest("pair", "0" * 64, 60, {"lowercase": True}, {}).save(tmp_path)
    demo = Demo(copy, "cpu")
    demo.decode(Request(text="A dog", iterations=0), lambda told: None)
    assert capsys.readouterr().err.count("give it lower-cased input") == 1


def test_weights_that_give_no_finite_values_are_refused(run: Path) -> None:
    for mode in ("ar", "nar"):
        generator = Generator.from_checkpoint(run, mode, device="cpu", max_length=4)
        with torch.no_grad():
            generator.model.embedding.weight.fill_(float("nan"))
        generator.model.train()
        with pytest.raises(CheckpointError, match="not finite"):
            generator.generate(["dog"])
        assert generator.model.training


def test_a_run_without_tokenizer_decodes_ids(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Generator.from_checkpoint(copy, device="cpu")
    (tmp_path / "ids.txt").write_text("5 6 7\n8 9\n")
    output = tmp_path / "out.txt"
    flags = ["--ids", "--mode", "nar", "--input", str(tmp_path / "ids.txt"), "--output", str(output)]
    decode.main(["--checkpoint", str(copy), *flags])
    assert all(int(word) > 4 for word in output.read_text().split())
    with pytest.raises(DataError, match="'5000' is not a token id"):
        Generator.from_checkpoint(copy, ids=True, device="cpu").generate(["5 5000"])
