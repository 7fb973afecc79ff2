"""Folders and files of models that lie: taken, or refused in words, before anything large is allocated."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from janus_ds.__main__ import main
from janus_ds.config.locations import DEMO, model_path
from janus_ds.config.presets import follow_init
from janus_ds.config.schema import RunConfig
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.errors import CheckpointError, JanusError
from janus_ds.model.formats.fairseq import load_fairseq
from janus_ds.model.formats.hf_import import load_hf_bart
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.build_run import start_from
from tests.support.hf_folder import hub_folder, hub_state
from tests.support.hostile import (
    CHANGES,
    ODD,
    PATHS,
    TRAPS,
    attacks,
    bounded,
    changed,
    mutated,
    note,
    taken_or_refused,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(model_path(DEMO), tmp_path_factory.mktemp("demo") / "run"))


@pytest.fixture(scope="module")
def sound() -> LoadedRun:
    return load_run(DEMO)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_folder(tmp_path_factory.mktemp("hub") / "hub", tokenizer=None)


@pytest.fixture(scope="module")
def hub_of_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = hub_folder(tmp_path_factory.mktemp("text") / "hub")
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "aa": 5}
    fast: dict[str, Any] = {"model": {"type": "BPE", "vocab": vocab, "merges": ["a a"]}}
    fast |= {"added_tokens": [{"id": 6, "content": "<mask>"}], "pre_tokenizer": {"type": "ByteLevel"}}
    (hub / "fast").mkdir()
    (hub / "fast" / "tokenizer.json").write_text(json.dumps(fast))
    assert read_hf_tokenizer(hub / "fast") is not None
    return hub


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "encoder_layers", 10**6),
        ("model", "decoder_layers", 10**9),
        ("model", "d_model", 10**7),
        ("model", "ffn_dim", 10**9),
        ("model", "max_target_positions", 10**9),
        ("special_tokens", "vocab_size", 10**9),
        ("special_tokens", "mask", 10**6),
        ("special_tokens", "bos", -1),
        ("special_tokens", "eos", "2"),
    ],
)
def test_sizes_of_a_record_are_held_against_the_weights_first(
    demo: Path, section: str, key: str, value: object
) -> None:
    original = (model_path(DEMO) / "run.json").read_text()
    record = json.loads(original)
    (record if section == "special_tokens" else record["recipe"])[section][key] = value
    (demo / "run.json").write_text(json.dumps(record))
    with bounded(), pytest.raises(JanusError):
        load_run(demo)


@pytest.mark.parametrize("text", TRAPS)
def test_files_of_another_shape_are_refused(demo: Path, tmp_path: Path, text: str) -> None:
    (demo / "run.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_run(demo)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_hf_bart(tmp_path, None)


@attacks(15)
@given(path=PATHS, odd=ODD)
def test_a_mutated_record_is_taken_or_refused(
    demo: Path, sound: LoadedRun, path: list[int], odd: object
) -> None:
    """For decoding, and as a start of training."""
    record = json.loads((model_path(DEMO) / "run.json").read_text())
    (demo / "run.json").write_text(json.dumps(mutated(record, path, odd)))
    with taken_or_refused():
        load_run(demo)
    tokenizer = load_tokenizer(model_path(DEMO) / "tokenizer")
    with taken_or_refused():
        follow_init(RunConfig(init=str(demo)))
        start_from(sound.model, str(demo), tokenizer, ParallelLayers())


@attacks(30)
@given(path=PATHS, odd=ODD)
def test_a_mutated_configuration_is_taken_or_refused(hub: Path, path: list[int], odd: object) -> None:
    name = "config.json" if path[0] % 4 else "generation_config.json"
    original = (hub / name).read_text()
    (hub / name).write_text(json.dumps(mutated(json.loads(original), path, odd)))
    try:
        with taken_or_refused():
            load_hf_bart(hub, None)
    finally:
        (hub / name).write_text(original)


FILES = ["model.safetensors", "vocab.json", "merges.txt", "fast/tokenizer.json"]


@attacks(30)
@given(changes=CHANGES, name=st.sampled_from(FILES))
def test_changed_bytes_of_weights_and_tokenizers(hub_of_text: Path, changes: Any, name: str) -> None:
    path = hub_of_text / name
    original = path.read_bytes()
    path.write_bytes(changed(original, changes, within=4000))
    try:
        with taken_or_refused():
            load_hf_bart(hub_of_text, None)
        with taken_or_refused():
            read_hf_tokenizer(path.parent)
    finally:
        path.write_bytes(original)


@attacks(20)
@given(changes=CHANGES, within=st.sampled_from([40, 400_000]))
def test_changed_bytes_of_a_sentencepiece_model(demo: Path, changes: Any, within: int) -> None:
    path = demo / "tokenizer" / "sentencepiece.model"
    original = path.read_bytes()
    path.write_bytes(changed(original, changes, within))
    try:
        with taken_or_refused():
            load_tokenizer(path.parent).encode("Some text.")
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("field", ["path", "valid_path"])
@pytest.mark.parametrize("place", ["pipe:touch OWNED", "http://127.0.0.1:9/${HOME}"])
def test_a_model_that_names_a_command_as_its_data_runs_nothing(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, place: str
) -> None:
    """Where a model's data lay is text of whoever made the model."""
    monkeypatch.chdir(tmp_path)
    record = json.loads((model_path(DEMO) / "run.json").read_text())
    record["recipe"]["data"][field] = place
    (demo / "run.json").write_text(json.dumps(record))
    for command in (["decode", "--heldout", "1"], ["eval", "nmt"]):
        with pytest.raises(JanusError):
            main([*command, "--checkpoint", str(demo), "--device", "cpu"])
    note("commands that run", 2, len(list(tmp_path.iterdir())))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dropout", "much"),
        ("dropout", [0.1]),
        ("attention_dropout", None),
        ("activation_dropout", 1e999),
        ("init_std", -1),
        ("num_beams", "many"),
        ("length_penalty", {}),
        ("encoder_layers", 10**6),
        ("vocab_size", 10**9),
        ("d_model", 10**7),
        ("activation_function", []),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    hub = hub_folder(tmp_path / "hub", changes={key: value}, tokenizer=None)
    generation = json.loads((hub / "generation_config.json").read_text())
    if key in generation:
        (hub / "generation_config.json").write_text(json.dumps(generation | {key: value}))
    with bounded(), pytest.raises(CheckpointError):
        load_hf_bart(hub, None)


def expanded() -> dict[str, torch.Tensor]:
    """A few bytes that mean 4 TB."""
    return hub_state() | {"model.shared.weight": torch.zeros(1).expand(10**6, 10**6)}


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    hub = hub_folder(tmp_path / "hub", tokenizer=None)
    (hub / "model.safetensors").unlink()
    torch.save(expanded(), hub / "pytorch_model.bin")
    assert (hub / "pytorch_model.bin").stat().st_size < 1 << 20
    with bounded(), pytest.raises(CheckpointError, match=r"larger than itself, first model\.shared\.weight"):
        load_hf_bart(hub, None)
    torch.save(
        {"model": {"encoder.embed_tokens.weight": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "f.pt"
    )
    with bounded(), pytest.raises(CheckpointError, match="larger than itself"):
        load_fairseq(tmp_path / "f.pt")
    one = torch.zeros(1000)
    torch.save({f"t{number}": one for number in range(100)}, tmp_path / "many.pt")
    with pytest.raises(CheckpointError, match="larger than itself"):
        load_fairseq(tmp_path / "many.pt")


def test_a_compressed_archive_is_not_blown_up(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 22)}, tmp_path / "plain.pt")
    plain = zipfile.ZipFile(tmp_path / "plain.pt")
    small = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
    with plain, small:
        for member in plain.infolist():
            small.writestr(member.filename, plain.read(member))
    with pytest.raises(CheckpointError, match="members are larger than the file"):
        load_fairseq(tmp_path / "small.pt")


def test_a_layer_number_is_not_believed(tmp_path: Path) -> None:
    names = (
        "encoder.embed_tokens.weight",
        "encoder.embed_positions.weight",
        "decoder.embed_positions.weight",
    )
    state = {name: torch.zeros(8, 4) for name in names}
    state |= {"decoder.layers.0.encoder_attn.q_proj.weight": torch.zeros(4, 4)}
    state |= {
        "encoder.layers.0.fc1.weight": torch.zeros(4, 4),
        "encoder.layers.99999999.fc1.bias": torch.zeros(4),
    }
    torch.save({"model": state}, tmp_path / "far.pt")
    with bounded(), pytest.raises(CheckpointError, match="100,000,001 layers"):
        load_fairseq(tmp_path / "far.pt", heads=1)


def test_a_pipe_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_fairseq(tmp_path / "model.pt")
