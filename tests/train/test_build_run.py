"""What a run takes over from the run it starts from."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from janus_ds.checkpoint.tensors import read_weights
from janus_ds.cli.convert import main
from janus_ds.config.deepspeed import TrainOptions, load_setup
from janus_ds.config.fields import FaultList
from janus_ds.config.load import from_dict, load_run_config, read_run_config, to_dict
from janus_ds.config.presets import record_of
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError, ConfigError, UsageError
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.parallel.topology import Topology
from janus_ds.train import build_run
from janus_ds.train.build_run import _as_begun, _see, _take, build_engine, start_from
from janus_ds.train.state import RunIdentity, changed_training, check_same
from tests.support.commands import SMALL, ZERO2
from tests.support.hf_folder import hub_folder

PAIR = ["data.task=pair"]


def test_pairs_start_as_the_run_they_come_from(bart: Path) -> None:
    assert load_run_config(None, PAIR).objective.decoder_start == "bos"
    followed = load_run_config(None, [*PAIR, f"init={bart}"])
    assert followed.objective.decoder_start == "eos_bos"
    assert from_dict(to_dict(followed)) == followed
    own = load_run_config(None, [*PAIR, f"init={bart}", "objective.decoder_start=bos"])
    assert own.objective.decoder_start == "bos"
    nothing = load_run_config(None, [*PAIR, f"init={bart.parent}"])
    assert nothing.objective.decoder_start == "bos"


def test_the_length_head_is_taken_over_or_drawn_anew(bart: Path) -> None:
    """All else is equal to the weights that a run starts from."""
    record = load_run(bart)
    tokenizer = load_tokenizer(bart / "tokenizer")
    start = read_weights(bart / "weights.safetensors")
    heads = {}
    for new in (False, True):
        torch.manual_seed(5)
        model = JanusModel(record.config.model, record.special, ParallelLayers())
        drawn = model.length_head.weight.detach().clone()
        start_from(model, str(bart), tokenizer, ParallelLayers(), new)
        weights = model.state_dict()
        heads[new] = weights.pop("length_head.weight")
        assert all(torch.equal(value, start[name]) for name, value in weights.items())
        assert weights.keys() | {"length_head.weight"} == start.keys()
    assert torch.equal(heads[False], start["length_head.weight"])
    assert torch.equal(heads[True], drawn)
    assert not torch.equal(heads[True], heads[False])


def test_a_length_head_that_counts_otherwise_is_drawn_anew(
    bart: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, tokenizer = load_run(bart), load_tokenizer(bart / "tokenizer")
    theirs = read_weights(bart / "weights.safetensors")["length_head.weight"]
    for convention in ("inner", "with_specials"):
        model = JanusModel(record.config.model, record.special, ParallelLayers())
        with caplog.at_level("INFO"):
            start_from(model, str(bart), tokenizer, ParallelLayers(), length_convention=convention)
        assert torch.equal(model.length_head.weight, theirs) == (convention == "inner")
    assert "does not fit (objective.length_convention with_specials here, inner there)" in caplog.text


def test_weights_of_a_model_that_only_its_record_tells_apart_are_refused(bart: Path) -> None:
    record, tokenizer = load_run(bart), load_tokenizer(bart / "tokenizer")
    for name, value, own in (
        ("heads", 4, "2"),
        ("scale_embedding", True, "false"),
        ("activation", "relu", '"gelu"'),
    ):
        other = JanusModel(replace(record.config.model, **{name: value}), record.special, ParallelLayers())
        with pytest.raises(CheckpointError, match=f"of another model: {name}") as caught:
            start_from(other, str(bart), tokenizer, ParallelLayers())
        assert f"--set model.{name}={own}" in caught.value.fix
        # A file by itself tells nothing.
        start_from(
            other, str(shutil.copy(bart / "weights.safetensors", bart.parent)), tokenizer, ParallelLayers()
        )


def test_weights_of_another_shape_are_refused_with_all_fields_that_differ(bart: Path) -> None:
    record, tokenizer = load_run(bart), load_tokenizer(bart / "tokenizer")
    theirs = record.config.model
    more = replace(theirs, ffn_dim=2 * theirs.ffn_dim, max_source_positions=theirs.max_source_positions + 8)
    with pytest.raises(CheckpointError) as caught:
        start_from(JanusModel(more, record.special, ParallelLayers()), str(bart), tokenizer, ParallelLayers())
    wanted = f"model.ffn_dim={theirs.ffn_dim} model.max_source_positions={theirs.max_source_positions}"
    assert f"start with --set {wanted}, or" in caught.value.fix


@pytest.mark.parametrize("multiple", [8, 64])
def test_the_embedding_may_be_padded_otherwise(tmp_path: Path, multiple: int) -> None:
    """As transformers' `resize_token_embeddings(pad_to_multiple_of=...)` leaves it."""
    main(["--from", "hf", str(hub_folder(tmp_path / "hub", tokenizer=50)), "--to", str(tmp_path / "bart")])
    tokenizer = load_tokenizer(tmp_path / "bart" / "tokenizer")
    shape = replace(load_run(tmp_path / "bart").config.model, vocab_multiple=multiple)
    model, theirs = JanusModel(shape, tokenizer.special, ParallelLayers()), tmp_path / "bart"
    start_from(model, str(theirs), tokenizer, ParallelLayers())
    table = read_weights(theirs / "weights.safetensors")["embedding.weight"]
    assert len(model.output_weight) == {8: 56, 64: 64}[multiple]
    assert torch.equal(model.output_weight[:50], table[:50])


def test_mask_rows_and_ar_queries_are_made_as_in_init_unless_the_recipe_says_how(tmp_path: Path) -> None:
    released = load_run_config(None, [*PAIR, "objective.preset=released"])
    (tmp_path / "run.json").write_text(json.dumps({"recipe": to_dict(released)}))

    def found(*overrides: str) -> tuple[str | None, str | None, list[str]]:
        faults = FaultList()
        run = read_run_config(None, [*PAIR, f"init={tmp_path}", *overrides], faults)
        faults.raise_if_any()
        return run.objective.mask_symbol, run.objective.ar_query_position, faults.notes

    assert found() == ("unk", "previous", [])
    assert found("objective.mask_symbol=mask") == ("mask", "previous", [])
    mask, position, notes = found("objective.preset=cmlm", "objective.ar_query_position=previous")
    assert (mask, position) == ("mask", "previous")
    assert notes == [f"objective.mask_symbol is mask, as of preset cmlm; {tmp_path} has unk"]


def test_a_choice_of_the_length_head_tells_runs_apart_but_its_default_does_not() -> None:
    plain = load_run_config(None, PAIR)
    assert "init_length_head" in to_dict(plain)
    # As of a run that was started before there was a choice.
    old = {name: value for name, value in to_dict(plain).items() if name != "init_length_head"}
    assert changed_training(from_dict(old), plain) == []
    new = load_run_config(None, [*PAIR, "init_length_head=new"])
    assert changed_training(plain, new) == ["init_length_head"]
    with pytest.raises(ConfigError, match="init_length_head has no value"):
        load_run_config(None, ["init_length_head=fresh"])


def test_the_record_is_found_from_every_way_to_name_weights(bart: Path, tmp_path: Path) -> None:
    name = record_of(bart)["name"]
    checkpoint = bart / "checkpoints" / "step-00000001"
    for place in (bart / "weights.safetensors", checkpoint, checkpoint / "weights.safetensors"):
        assert record_of(place)["name"] == name
    assert record_of(tmp_path / "none") == {}


def test_the_folder_of_a_converted_model_is_no_run_folder(bart: Path, tmp_path: Path) -> None:
    """Its weights lie at the top, where they would be found before those of the run's checkpoints."""
    with ExitStack() as lock, pytest.raises(UsageError, match="holds a model already") as caught:
        _take(bart, lock)
    assert caught.value.where == str(bart / "weights.safetensors")
    with ExitStack() as lock:
        _take(tmp_path / "run", lock)


def test_a_run_folder_of_another_host_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_run, "_SIGHT_SECONDS", 0.0)
    with ExitStack() as lock:
        _take(tmp_path / "run", lock)
        _see(tmp_path / "run", 9)
        with pytest.raises(UsageError, match="rank 9 does not see the run folder") as caught:
            _see(tmp_path / "local", 9)
    assert caught.value.where == f"{tmp_path / 'local'} on {socket.gethostname()}"


def test_a_rank_that_reads_other_files_than_the_first_is_refused_at_the_start() -> None:
    """Each host with data of its own: the ranks would train on a mixture, which no resume could go on."""
    first = RunIdentity(load_run_config(None), "aa", "bb", 2, 1, 2, "fp32")
    elsewhere = replace(first, recipe=load_run_config(None, ["data.cache_dir=/tmp/b", "data.workers=3"]))
    check_same(first, elsewhere, 1)
    for own, words in (
        (replace(first, data_fingerprint="cc"), "data_fingerprint on "),
        (replace(first, zero_stage=3), "zero_stage on "),
        (replace(first, recipe=load_run_config(None, ["optim.lr=1"])), "optim.lr on "),
        # Else one would validate while the others wait.
        (replace(first, recipe=load_run_config(None, ["train.valid_every=7"])), "train.valid_every on "),
        (replace(first, engine={"gradient_clipping": 2.0}), "engine on "),
        (replace(first, versions={"torch": "2.14.0"}), "versions on "),
    ):
        with pytest.raises(ConfigError, match="rank 9 has other data, versions, recipe or") as caught:
            check_same(first, own, 9)
        assert caught.value.where == words + socket.gethostname()


def test_a_run_that_has_begun_keeps_what_it_took_over_when_its_init_is_gone(
    bart: Path, tmp_path: Path
) -> None:
    gone, alone = [*PAIR, f"init={tmp_path / 'gone'}"], Topology(torch.device("cpu"))

    def begun(*overrides: str) -> str | None:
        options = TrainOptions(Path(), None, (*gone, *overrides), None, 1)  # type: ignore[arg-type]
        config = load_run_config(None, options.overrides)
        return _as_begun(config, options, tmp_path, alone).objective.decoder_start

    assert begun() == "bos"
    for step, text in ((7, json.dumps({"recipe": {"objective": {"decoder_start": "eos_bos"}}})), (8, "{")):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(text)
    assert begun() == "eos_bos"
    assert begun("objective.decoder_start=bos") == "bos"


def built_from(
    init: Path, bart: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Build the engine of a run of the model in `bart`, up to DeepSpeed."""
    record = load_run(bart)
    run: Any = SimpleNamespace(
        config=replace(record.config, init=str(init)),
        tokenizer=load_tokenizer(bart / "tokenizer"),
        execution=SimpleNamespace(zero_stage=0),
    )
    monkeypatch.setattr(build_run, "TrainingEngine", lambda *_: None)
    build_engine(run, topology, fresh)


def test_init_is_read_at_a_fresh_start_alone(
    bart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Topology(torch.device("cpu"))
    built_from(tmp_path / "gone", bart, alone, monkeypatch, fresh=False)
    with pytest.raises(CheckpointError, match="no weights here"):
        built_from(tmp_path / "gone", bart, alone, monkeypatch, fresh=True)


class _OtherRank(Topology):
    """Of two ranks, the other one has a fault."""

    def agree(self, code: int) -> int:
        return 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, CheckpointError("the weights cannot be read", "rank 1", "look there")]


def test_a_fault_of_another_rank_with_init_is_raised_here_too(
    bart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError) as caught:
        built_from(bart, bart, _OtherRank(torch.device("cpu")), monkeypatch, fresh=True)
    assert caught.value.where == "rank 1"


def test_held_out_samples_are_known_by_their_index(tiny: Path, tmp_path: Path) -> None:
    """By which a best loss is known to be of the same text; folders may move."""
    data, moved = tiny, shutil.copytree(tiny, tmp_path / "moved")

    def found(*overrides: str) -> str:
        setup = load_setup(None, [*SMALL, *overrides], Path(ZERO2), 1)
        run = build_run.build_run(*setup, tmp_path / "run", Topology(torch.device("cpu")))
        assert run.identity.accumulation == setup[1].accumulation
        return run.identity.valid_fingerprint

    own = found(f"data.path={data}")
    assert own == found(f"data.path={moved}") == found(f"data.path={data}", f"data.valid_path={moved}/valid")
    assert own != found(f"data.path={data}", f"data.valid_path={data}/train")
