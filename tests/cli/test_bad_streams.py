"""Inputs, outputs and environments that cannot be: three parts and an exit code, never a stack."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.__main__ import main
from janus_ds.cli import convert, decode
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import DataError, JanusError, ResourceError, UsageError
from janus_ds.io import disk_faults, write_atomic
from janus_ds.parallel.topology import init_topology
from tests.support.hf_folder import hub_folder
from tests.support.programs import ROOT
from tests.support.tiny_run import make_run

FULL = Path("/dev/full")
SENTENCE = "Guten Morgen."


@pytest.fixture(scope="module")
def demo() -> Generator:
    return Generator.from_checkpoint("demo", mode="nar", device="cpu", iterations=0)


def fails(kind: type[JanusError], *arguments: object) -> JanusError:
    with pytest.raises(kind) as caught:
        decode.main(["--demo", "--mode", "nar", "--iterations", "0", "--device", "cpu", *map(str, arguments)])
    assert str(caught.value).count("\n") == 2
    return caught.value


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file, dangling = (tmp_path / name for name in ("in.txt", "file", "dangling"))
    source.write_text(SENTENCE)
    file.write_text("kept")
    dangling.symlink_to(tmp_path / "nowhere" / "file")
    assert "full" in fails(ResourceError, "--input", source, "--output", FULL).what
    for output in (file / "below", dangling):
        assert "cannot be written" in fails(ResourceError, "--input", source, "--output", output).what
    assert file.read_text() == "kept"
    assert FULL.is_char_device()


def test_a_file_size_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text(f"{SENTENCE}\n" * 40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        error = fails(ResourceError, "--input", source, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.what.endswith("cannot be written (File too large)")
    assert "ulimit -f" in error.fix
    assert not output.exists()
    assert "not complete: 16 lines are in" in capsys.readouterr().err
    assert len((tmp_path / "out.txt.part").read_text().splitlines()) >= 16


def test_a_device_is_written_to_and_not_replaced() -> None:
    with pytest.raises(ResourceError, match="full"):
        write_atomic(FULL, b"text")
    assert FULL.is_char_device()
    with pytest.raises(ResourceError, match="cannot be written"), disk_faults(Path("x")):
        Path("/dev/null/file").mkdir()


def test_a_full_standard_output_is_no_stack() -> None:
    with FULL.open("wb") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "janus_ds/__main__.py"), "explain"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert done.stderr.startswith("error: the output cannot be written")
    assert done.stderr.count("\n") == 3


@pytest.mark.parametrize(
    "words",
    [
        ("launch/pretrain.py", "--deepspeed_config", "zero2", "--output", "s3://bucket/run"),
        ("janus_ds/__main__.py", "explain", "no.such.key"),
    ],
)
def test_a_full_standard_error_changes_no_exit_code(words: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with FULL.open("wb") as full:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stderr=full, env={**environment, "PYTHONPATH": str(ROOT)}
        )
    assert done.returncode == UsageError.exit_code


def test_a_closed_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert decode.main(["--demo", "--mode", "nar", "--iterations", "0", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(decode.DEMO_SENTENCES)
    with pytest.raises(DataError, match="there is no input"):
        next(decode.line_windows("-"))


def test_texts_and_ids_that_cannot_be(demo: Generator, tmp_path: Path) -> None:
    one, same = demo.generate(SENTENCE), demo.generate([SENTENCE])
    assert [item.text for item in one] == [item.text for item in same]
    assert len(one) == 1
    bad: Any
    for bad in (["a", "Guten \ud83d Morgen"], ["a", None], ["a", b"Guten"]):
        with pytest.raises(DataError, match=r"lone surrogate|of type") as caught:
            demo.generate(bad)
        assert caught.value.where == "line 2 of the input"
    for bad in (None, b"Guten", 5):
        with pytest.raises(DataError, match="is of type") as caught:
            demo.generate(bad)
        assert type(bad).__name__ in caught.value.what
    for bad in (10**6, -1, 5.5, "7"):
        with pytest.raises(DataError, match="not a token id"):
            demo.generate_ids([[5], [5, bad]])
    with pytest.raises(DataError, match="the model reads up to") as caught:
        demo.generate("lang " * 400)
    assert caught.value.fix == "cut the line into shorter ones"  # Options are those of commands.
    (tmp_path / "in.txt").write_bytes(b"a\nGuten \xed\xa0\xbd\n")
    assert fails(DataError, "--input", tmp_path / "in.txt").where.endswith("line 2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    for start in (Generator.from_checkpoint, load_run):
        with pytest.raises(UsageError, match="there is no device 'cuda'"):
            start("demo", device="cuda")


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "0"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "-1"}, {"RANK": "1"}, {"LOCAL_RANK": "²"}],
    ids=str,
)
def test_ranks_that_cannot_be(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=next(iter(environment))) as caught:
        init_topology()
    assert caught.value.local


def test_conversion_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full within the weights: nothing under the name, and the same command works again."""
    hub, run, back, file = (tmp_path / name for name in ("hub", "run", "back", "model.pt"))
    hub_folder(hub)
    steps = [
        ["--from", "hf", str(hub), "--to", str(run)],
        ["--to", "hf", str(run), "--output", str(back)],
        ["--to", "fairseq", str(run), "--output", str(file)],
    ]
    for command in steps:
        before = sorted(path.name for path in tmp_path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _no_space)
            with pytest.raises(ResourceError, match="full"):
                convert.main(command)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert convert.main(command) == 0
    blocked = tmp_path / "blocked"
    blocked.write_text("kept")
    with pytest.raises(UsageError, match="a file is where"):
        convert.main(["--to", "hf", str(run), "--output", str(blocked)])
    with pytest.raises(UsageError, match="not empty"):
        convert.main(["--to", "hf", str(run), "--output", str(tmp_path)])


def test_an_evaluation_on_a_full_disk_leaves_whole_files(
    tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a mean of checkpoints, full at each file in turn; older outputs stay or go, never in part."""
    output = tmp_path / "found"
    run = make_run(tmp_path / "run", tiny_pairs, "ar")
    words = ["eval", "nmt", "--checkpoint", run, "--data", tiny_pairs, "--average", 2, "--modes", "ar"]
    command = [str(word) for word in (*words, "--device", "cpu", "--latency-samples", 0, "--output", output)]
    assert main(command) == 0
    whole = {path.name: path.read_text() for path in output.glob("*.txt")}
    for room in range(5):
        left = iter(range(2 * room))  # each file is brought to disk, and then its folder

        def fills(handle: int, left: Any = left) -> None:
            if next(left, -1) < 0:
                _no_space(handle)

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", fills)
            with pytest.raises(ResourceError, match="full"):
                main(command)
        for path in output.iterdir():
            text = path.read_text()
            assert json.loads(text) if path.suffix == ".json" else text == whole[path.name]
    assert main(command) == 0
    assert len(list(output.iterdir())) == 5


def _no_space(handle: int) -> None:
    raise OSError(28, "No space left on device")
