"""Distillation data: other targets for the same pairs, whole, resumed, and refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from janus_ds.cli.prepare import prepare_data
from janus_ds.data.prepare.pair_files import held_out_text
from janus_ds.data.prepare.pairs import prepare_glge
from janus_ds.data.prepare.settings import GlgeSettings, Limits
from janus_ds.data.prepare.writing import PrepareReport
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.stream.verify import verify_dataset
from janus_ds.data.text.tokenizer import load_tokenizer, structural
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import BusyError, CheckpointError, DataError, JanusError, ResourceError, UsageError
from janus_ds.evaluate.distill import DistillRequest, distill
from janus_ds.evaluate.evaluation import EvalRequest
from janus_ds.evaluate.tasks import _GlgeSplit
from janus_ds.io import folder_lock
from janus_ds.metrics.glge import task_named
from janus_ds.model.decoding.cpu_kernels import PreparedLinear
from tests.support.tiny_pairs import prepare_tiny, tiny_lines
from tests.support.tiny_run import make_run

PAIRS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("pairs"), PAIRS).output


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return make_run(data.parent / "run", data, "ar")


def rows(data: Path, stream: str, split: str = "train") -> list[list[int]]:
    source = SampleSource(data / split)
    return [row.tolist() for row in source.read(np.arange(source.samples))[stream].rows()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def go(data: Path, run: Path, output: Path, **options: object) -> PrepareReport:
    return distill(DistillRequest(data, run, output, portion=16, **options))  # type: ignore[arg-type]


def test_targets_are_translations_and_all_else_stays(data: Path, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new"
    seen: list[tuple[int, int]] = []
    report = distill(DistillRequest(data, run, output, portion=16), lambda *at: seen.append(at))
    assert rows(output, "source") == rows(data, "source")
    generator = Generator.from_checkpoint(run, "ar", device="cpu")
    expected = [list(found[0].tokens) for found in generator.generate_ids(rows(data, "source"))]
    given, found = rows(data, "target"), rows(output, "target")
    assert found == [new or old for new, old in zip(expected, given, strict=True)]
    assert found != given
    old, new = files(data), files(output)
    kept = [name for name in old if not name.startswith(("train/", "manifest"))]
    assert len(kept) >= 7
    assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    assert verify_dataset(output).faults == []
    assert seen[0] == (0, PAIRS)
    assert seen[-1] == (PAIRS, PAIRS)
    counts = report.counts["train"]
    assert counts["distilled"] + counts["given_target_kept"] == counts["lines"] == PAIRS
    assert counts["target_tokens"] == sum(map(len, found))
    told = Manifest.load(output)
    assert told.settings["distilled"]["run"] == "tiny"
    assert told.settings["distilled"]["checkpoints"] == ["step-00000010"]
    assert told.settings["distilled"]["decode"]["beam"] == 2
    assert str(tmp_path.parent) not in (output / "manifest.json").read_text()
    assert not list(tmp_path.glob(".*"))
    # Done is done; another request is refused.
    assert go(data, run, output).already_whole
    for other in ({"beam": 1}, {"no_repeat_ngram_size": 2}, {"temperature": 1.0, "beam": 2}, {"prefix": "a"}):
        with pytest.raises(DataError, match="prepared with other settings"):
            go(data, run, output, decode=other)
    # What was distilled can be distilled again, with the mean of checkpoints.
    again = go(output, run, tmp_path / "again", average=2)
    assert Manifest.load(again.output).settings["distilled"]["checkpoints"] == [
        "step-00000005",
        "step-00000010",
    ]


def test_an_interrupted_run_goes_on(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(data, run, tmp_path / "straight")
    decoded: list[int] = []
    original = Generator.generate_ids

    def counting(self: Generator, sources: Sequence[Sequence[int]], progress: object, first: int) -> object:
        if sum(decoded) == 32:
            raise KeyboardInterrupt
        # Samples of a later portion have random numbers of their own.
        assert first == (sum(decoded) or 32 * resumed)
        assert isinstance(self.model.encoder.layers[0].fc1, PreparedLinear)
        decoded.append(len(sources))
        return original(self, sources)

    resumed = False
    monkeypatch.setattr(Generator, "generate_ids", counting)
    with pytest.raises(KeyboardInterrupt):
        go(data, run, tmp_path / "new")
    assert decoded == [16, 16]
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="interrupted distillation with another model"):
        go(data, run, tmp_path / "new", decode={"beam": 3})
    with pytest.raises(DataError, match="interrupted distillation with another model"):
        distill(DistillRequest(data, run, tmp_path / "new", portion=8))
    decoded.clear()
    resumed = True
    # By a link to the empty folder that it becomes: the same place.
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    go(data, run, tmp_path / "link")
    assert decoded == [8]
    assert not list(tmp_path.glob(".*"))
    assert files(tmp_path / "new") == files(tmp_path / "straight")


def test_a_second_start_leaves_the_first_alone(data: Path, run: Path, tmp_path: Path) -> None:
    work = tmp_path / ".new.distilling"
    (work / "data").mkdir(parents=True)
    heard, tell = os.pipe()
    if (first := os.fork()) == 0:
        with folder_lock(work, 0.0):
            os.write(tell, b"x")
            signal.pause()
    try:
        os.read(heard, 1)
        with pytest.raises(BusyError, match="another process"):
            go(data, run, tmp_path / "new")
        assert (work / "data").is_dir()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    (work / ".lock").unlink()
    (work / ".lock").symlink_to("elsewhere")
    with pytest.raises(ResourceError, match="cannot be written"):
        go(data, run, tmp_path / "new")


def test_sources_too_long_for_the_model_keep_their_target(data: Path, tmp_path: Path) -> None:
    length = sorted(len(row) for row in rows(data, "source"))
    longest = length[PAIRS // 2]
    run = make_run(tmp_path / "short", data, "ar", positions=longest + 2)
    report = go(data, run, tmp_path / "new")
    long = [i for i, row in enumerate(rows(data, "source")) if len(row) > longest]
    assert long
    given, found = rows(data, "target"), rows(tmp_path / "new", "target")
    assert [found[i] for i in long] == [given[i] for i in long]
    assert report.counts["train"]["given_target_kept"] >= len(long)


def test_targets_hold_no_symbol_that_no_sample_may_hold(data: Path, run: Path, tmp_path: Path) -> None:
    """A model that may write anything, as one from Hugging Face, can write a mask, too."""
    anything = {"forbid": "none", "temperature": 1e6, "beam": 1}
    go(data, run, tmp_path / "new", decode=anything)
    special = load_tokenizer(data / "tokenizer").special
    found = rows(tmp_path / "new", "target")
    assert not structural(special) & {token for row in found for token in row}
    assert len({token for row in found for token in row}) > special.vocab_size / 2


def test_data_of_glge_keep_their_limits(data: Path, run: Path, tmp_path: Path) -> None:
    task = tmp_path / "squadqg_data"
    task.mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        for side, name in enumerate(("src", "tgt")):
            text = "".join(f"{pair[side]}\n" for pair in tiny_lines(20, seed))
            (task / f"{split}.{name}").write_text(text)
    settings = GlgeSettings("squadqg", data / "tokenizer", Limits(9, 3))
    given = prepare_glge(task, tmp_path / "given", settings).output
    output = go(given, run, tmp_path / "new").output
    assert max(map(len, rows(output, "target"))) == 3
    assert held_out_text(output, "valid").longest == 9
    request, loaded = EvalRequest(run, data=output), load_run(run)
    assert _GlgeSplit(task_named("squadqg"), "dev", "").read(request, loaded).longest == 9
    with pytest.raises(UsageError, match="the data is of task 'squadqg'"):
        _GlgeSplit(task_named("xsum"), "dev", "").read(request, loaded)


def test_what_cannot_be_distilled_is_refused(
    data: Path, run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = make_run(tmp_path / "stranger", tiny, "ar")
    nar = make_run(tmp_path / "nar", data, "cmlm")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    output = tmp_path / "new"
    cases: list[tuple[type[JanusError], str, Path, Path, Path]] = [
        (CheckpointError, "from another vocabulary than the data", data, stranger, output),
        (CheckpointError, "not trained to decode autoregressively", data, nar, output),
        (CheckpointError, "no such run folder", data, tmp_path / "nothing", output),
        (DataError, "holds no training pairs", tiny, run, output),
        (DataError, "not an empty folder", data, run, taken),
    ]
    for kind, words, given, checkpoint, place in cases:
        with pytest.raises(kind, match=words) as error:
            go(given, checkpoint, place)
        assert error.value.where
        assert error.value.fix
    monkeypatch.chdir(taken)
    (taken / "notes.txt").rename(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="the output is the working folder"):
        go(data, run, Path())
    (tmp_path / "notes.txt").rename(taken / "notes.txt")
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_the_program(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--task", "nmt", "--distill", str(run), "--output", str(tmp_path / "new"), "--device", "cpu"]
    with pytest.raises(UsageError, match="takes the pairs of a data directory"):
        prepare_data(asked)
    assert prepare_data([*asked, "--data", str(data), "--beam", "1", "--average", "2"]) == 0
    told = capsys.readouterr().out
    assert f"train            {PAIRS} pairs" in told
    assert "distilled" in told
    assert Manifest.load(tmp_path / "new").settings["distilled"]["decode"]["beam"] == 1


def test_a_test_set_alone_is_prepared_for_a_given_tokenizer(data: Path, tmp_path: Path) -> None:
    texts = [str(data / "raw" / f"test.{side}") for side in ("de", "en")]
    asked = ["--task", "nmt", "--source-lang", "de", "--target-lang", "en", "--output", str(tmp_path / "new")]
    asked += ["--test", *texts]
    prepare_data([*asked, "--tokenizer", str(data / "tokenizer")])
    assert set(Manifest.load(tmp_path / "new").splits) == {"test"}
    assert rows(tmp_path / "new", "target", "test") == rows(data, "target", "test")
    with pytest.raises(UsageError, match="needs --train"):
        prepare_data(asked)
    with pytest.raises(DataError, match="holds no training pairs"):
        go(tmp_path / "new", data, tmp_path / "other")
