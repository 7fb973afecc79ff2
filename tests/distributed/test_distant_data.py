"""Runs on two ranks whose data is distant, mixed or damaged: the same updates, lists and resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from janus_ds.data.stream import remote
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.source import SOURCE_BITS
from janus_ds.errors import DamagedDataError, JanusError
from janus_ds.parallel.topology import init_topology
from janus_ds.train.watchdog import Watchdog
from tests.support.bad_server import serve
from tests.support.launch import run_ranks
from tests.support.tiny_training import Run, make_inputs, train

SHORT = ("train.max_steps=4", "train.save_every=2", "train.valid_every=4", "data.workers=1")
HALF = ("train.max_steps=2", *SHORT[1:])


def probes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the watchdog looks at in each work from now on."""
    found, enter = {}, Watchdog.enter

    def entered(dog: Watchdog, words: str, **options: Any) -> None:
        found[words] = options.get("probe")
        enter(dog, words, **options)

    monkeypatch.setattr(Watchdog, "enter", entered)
    return found


def two_ranks(folder: Path, address: str) -> dict[str, Any]:
    topology = init_topology(1)
    remote._FIRST_PAUSE = 0.01
    away = (*SHORT, f"data.path={address}/data", f"data.cache_dir={folder / 'cache'}")
    mixed = (f"data.path={folder / 'data'}=0.75,{address}/other=0.25", away[-1])
    damaged = (*SHORT, f"data.path={folder / 'damaged'}", "data.max_damage=0.9")
    with pytest.MonkeyPatch.context() as patch:
        looked = probes(patch)
        from_away = train(folder, topology, Run("away", overrides=away)).series("loss")
    results: dict[str, Any] = {
        "near": train(folder, topology, Run("near", overrides=SHORT)).series("loss"),
        "away": from_away,
        "looked": {words: probe() for words, probe in looked.items() if probe and "saving" not in words},
        "mixed": train(folder, topology, Run("mixed", overrides=(*SHORT, *mixed))).series("loss"),
    }
    train(folder, topology, Run("resumed", overrides=(*HALF, *mixed)))
    results["resumed"] = train(folder, topology, Run("resumed", overrides=(*SHORT, *mixed))).series("loss")
    quarantine = (*damaged, "data.on_damage=quarantine")
    results["damaged"] = train(folder, topology, Run("damaged-run", overrides=quarantine)).series("loss")
    try:
        train(folder, topology, Run("stops", overrides=damaged))
    except JanusError as error:
        results["stops"] = error
    return results


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = make_inputs(tmp_path_factory.mktemp("distant"))
    shutil.copytree(folder / "data", folder / "other")
    shutil.copytree(folder / "data", folder / "damaged")
    for shard in SplitIndex.load(folder / "damaged/train").shards:
        path = folder / "damaged/train" / shard.name
        content = bytearray(path.read_bytes())
        for member in shard.members[:2]:
            content[member.blobs["target.tokens"].offset + 5] ^= 1
        path.write_bytes(bytes(content))
    faults = {f"{name}/train/shard-000000.tar": ["cut", "500"] for name in ("data", "other")}
    with serve(folder, plan=faults) as server:
        return folder, run_ranks(two_ranks, 2, folder, server.address)


def test_distance_changes_no_update(job):
    _, (first, second) = job
    assert len(first["near"]) == 4
    assert first["near"] == first["away"] == second["away"]


def test_bytes_that_arrive_are_progress_wherever_data_is_read(job):
    """However long a shard takes to come."""
    _, (_, second) = job
    reading = {f"reading the data of step {step}" for step in range(1, 5)}
    assert (
        second["looked"].keys() == {"reading the held-out data", "preparing the order of the data"} | reading
    )
    assert all(times for looked in second["looked"].values() for _, times in looked)


def test_a_mixture_goes_on_where_it_stopped(job):
    folder, (first, _) = job
    assert first["mixed"] == first["resumed"]
    assert first["mixed"] != first["near"]
    recipe = json.loads((folder / "mixed/run.json").read_text())["recipe"]
    assert "=0.75," in recipe["data"]["path"]


def test_damage_is_listed_once_and_stops_nothing_unless_told(job):
    folder, (first, second) = job
    assert len(first["damaged"]) == 4
    assert first["damaged"] == second["damaged"]
    lines = [json.loads(line) for line in (folder / "damaged-run/quarantine.jsonl").read_text().splitlines()]
    places = [(line["shard"], line["member"]) for line in lines]
    assert 1 <= len(places) == len(set(places)) <= 4
    assert all("/damaged/train/shard-" in shard for shard, _ in places)
    assert all(line["first_sample"] >> SOURCE_BITS == 0 for line in lines)
    assert isinstance(first["stops"], DamagedDataError)
    assert str(first["stops"]) == str(second["stops"])
