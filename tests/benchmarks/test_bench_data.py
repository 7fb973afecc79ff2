"""The data bench runs and adds up; its figures are for people to read, not for a test to judge."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.common import bench_parser, parse
from janus_ds.errors import ResourceError, UsageError


@pytest.mark.parametrize(("task", "preset"), [("denoise", "paper"), ("pair", "cmlm")])
def test_stages_add_up_to_the_rate(tmp_path, task, preset):
    options = f"data --task {task} --tokens 40 --preset {preset} --batch 24 --rounds 2 --samples 100".split()
    assert main([*options, "--json", str(tmp_path / "data.json")]) == 0
    figures = json.loads((tmp_path / "data.json").read_text())
    rate = figures["documents_per_second_per_core"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    stages = figures["microseconds_per_document"]
    assert set(stages) == {"order", "read", "mask", "collate"}
    assert 0 < sum(stages.values()) < 1.2e6 / rate["min"]
    assert {"cpu", "cores"} <= set(figures["hardware"])


def test_figures_go_to_a_file(tmp_path, capsys):
    given = ["data", "--tokens", "20", "--samples", "1024", "--batch", "512", "--rounds", "1"]
    main([*given, "--json", str(tmp_path / "data.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "data.json").read_text())
    assert f"median {figures['documents_per_second_per_core']['median']:,}" in printed
    with pytest.raises(SystemExit):
        main(["data", "--batch", "0"])
    with pytest.raises(UsageError, match="10 samples do not make a step of 64"):
        main(["data", "--samples", "10"])


def test_figures_that_could_not_be_written_are_not_measured(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        main(["data", "--json", str(tmp_path / "file" / "data.json")])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        parse(bench_parser("data", "", rounds=1), ["--json=~/new/x.json"]).json == tmp_path / "new" / "x.json"
    )
    assert (tmp_path / "new").is_dir()


def test_a_shape_gives_the_defaults_and_options_beside_it_count(tmp_path):
    file = tmp_path / "pairs.json"
    given = ["data", "--shape", "pairs", "--rounds", "1", "--samples", "1024", "--batch", "512"]
    main([*given, "--json", str(file)])
    figures = json.loads(file.read_text())
    assert (figures["task"], figures["tokens"], figures["samples_a_step"]) == ("pair", 25, 512)
