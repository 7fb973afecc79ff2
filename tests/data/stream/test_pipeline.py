"""Stages of the user in the reader: the same from any start and worker; what they break is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from janus_ds.data.stream.loader import StepLoader, validation_batches
from janus_ds.data.stream.pipeline import BatchMaker, names_of
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.errors import ConfigError, DataError
from tests.data.stream.test_loader import ROWS, config, fingerprint, load
from tests.support.packed_data import SPECIAL, write_split
from tests.support.programs import ROOT, python
from tests.support.tiny_data import make_tiny_data

Step = dict[str, Any]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("pipeline") / "train", {"target": ROWS})


def reverse(step: Step) -> Step:
    return {**step, "target": step["target"].map(lambda row: row[::-1])}


def drop(step: Step) -> Step:
    """About half of the tokens, drawn from the sample's number and epoch; one at least."""

    def thin(row: np.ndarray, number: int, epoch: int) -> np.ndarray:
        kept = np.random.default_rng((epoch, number)).random(len(row)) < 0.5
        return row[kept] if kept.any() else row[:1]

    rows = zip(step["target"].rows(), step["ids"].tolist(), step["epochs"].tolist(), strict=True)
    return {**step, "target": type(step["target"]).from_rows([thin(*each) for each in rows])}


def steps(split: Path, stages: list[Any], start: int = 2, workers: int = 0) -> list[tuple[object, ...]]:
    maker = BatchMaker(split, config(workers), SPECIAL, stages)
    found = list(StepLoader(maker, RankShare(0, 1, 6), start, 8))
    assert [step.step for step in found] == list(range(start, 8))
    return [fingerprint(batch) for step in found for batch in step.batches]


def test_the_users_stage_changes_the_samples_and_nothing_else(split):
    made = BatchMaker(split, config(), SPECIAL, [wds.map(reverse)]).make((np.zeros(9, int), np.arange(9)))
    inner = [row[1:-1].tolist() for row in made["views"].target.rows()]
    assert inner == [row[::-1] for row in ROWS[:9]]
    assert made["step"] is None
    plain = [d.sample_ids.tolist() for d in load(split, RankShare(0, 1, 6))]
    maker = BatchMaker(split, config(), SPECIAL, [wds.map(reverse)])
    assert [d.sample_ids.tolist() for d in StepLoader(maker, RankShare(0, 1, 6), 2, 8)] == plain


def test_stages_give_the_same_from_any_start_and_worker(split):
    stages = [wds.map(drop), wds.map(reverse)]
    alone = steps(split, stages)
    assert alone != steps(split, [])
    assert alone == steps(split, stages, workers=3)
    assert alone[6:] == steps(split, stages, start=5, workers=1)


def loses_steps(source: Iterator[Step]) -> Iterator[Step]:
    yield from (step for step in source if step["step"] != 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("stage", "kind", "what"),
    [
        (loses_steps, ConfigError, "did not hand on a step"),
        (wds.map(lambda step: {**step, "target": None}), ConfigError, "without the step's 12 samples"),
        (
            wds.map(lambda step: {**step, "target": step["target"].take([0])}),
            ConfigError,
            "without the step's 12 samples",
        ),
        (
            wds.map(lambda step: {**step, "target": step["target"].map(lambda row: row + 500)}),
            DataError,
            "the target has token",
        ),
        (
            wds.map(lambda step: {**step, "target": step["target"].map(lambda row: row[:0])}),
            DataError,
            "no target token",
        ),
    ],
)
def test_what_a_stage_breaks_is_refused(split, stage, kind, what, workers):
    with pytest.raises(kind, match=what) as refused:
        steps(split, [stage], workers=workers)
    assert all((refused.value.what, refused.value.where, refused.value.fix))


def test_a_stage_that_leaves_out_held_out_samples_is_refused(split):
    maker = BatchMaker(split, config(), SPECIAL, [wds.select(lambda step: step["step"] is not None)])
    with pytest.raises(ConfigError, match="did not hand on a step"):
        list(validation_batches(maker, RankShare(0, 1, 6), 12))


def test_stages_have_names() -> None:
    maps: list[Callable[..., Any]] = [wds.map(reverse), loses_steps, wds.map_dict(target=reverse)]
    assert names_of(maps) == ["map(reverse)", "loses_steps()", "map_dict(target=reverse)"]


@pytest.mark.heavy
def test_the_program_of_the_documents_trains_and_resumes_with_its_stage_only(tmp_path):
    data = make_tiny_data(tmp_path / "tiny")
    text = (ROOT / "docs" / "data.md").read_text()
    (program,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    assert sum(map(bool, program.splitlines())) == 3
    (tmp_path / "mine.py").write_text(program)
    options = ["--deepspeed_config", "zero1", "--data", str(data), "--output", str(tmp_path / "run")]
    for change in ("data.block_tokens=48", "train.max_steps=2", "optim.warmup_steps=1"):
        options += ["--set", change]

    first = python(tmp_path / "mine.py", *options)
    assert first.returncode == 0, first.stderr
    again = python(tmp_path / "mine.py", *options)
    assert "is complete" in again.stderr
    plain = python(ROOT / "launch" / "pretrain.py", *options)
    assert plain.returncode == ConfigError.exit_code
    assert "the data, or a stage of its pipeline, is not what the run was started with" in plain.stderr
