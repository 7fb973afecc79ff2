"""`python -m janus_ds COMMAND`: what each command says, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from janus_ds.__main__ import COMMANDS, main
from janus_ds.batch import SpecialTokens
from janus_ds.checkpoint.tensors import snapshot_bytes
from janus_ds.config.load import load_run_config
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import FIELDS
from janus_ds.data.batch_maker import BatchMaker
from janus_ds.data.tokenizer import train_sentencepiece
from janus_ds.errors import ConfigError, DataError, JanusError, MissingDependencyError, UsageError
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.layers import DenseLayers
from janus_ds.stream_mask import Segment, visible
from janus_ds.tools.model_size import PartSize, checkpoint_bytes, model_parts, state_bytes
from janus_ds.tools.picture import picture_of
from tests.support.tiny_data import make_tiny_data

ROOT = Path(__file__).parents[2]
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
SMALL = ["model.d_model=16", "model.ffn_dim=24", "model.heads=2", "train.global_batch=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refusal(kind: type[JanusError], *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)


# The command itself


def test_help_is_quick_and_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "janus_ds", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "janus_ds" in imported
    assert not imported & {"torch", "deepspeed", "numpy"}
    assert set(re.findall(r"^  ([a-z]+)  +", done.stdout, re.M)) >= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"python -m janus_ds {command}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "data"])
def test_bench_hands_over_to_its_kinds(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", kind, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest_and_ends_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "janus_ds", "inspct", "x"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "did you mean 'inspect'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_stops_early_is_no_fault() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m janus_ds explain | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[1] == "0"
    assert done.stderr == ""


# explain


def test_explain_tells_type_default_values_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "explain", "optim.schedule")
    assert text.splitlines()[:4] == [
        "optim.schedule",
        "  type     text",
        "  default  inverse_sqrt",
        "  values   inverse_sqrt, polynomial, constant",
    ]
    assert "linear to zero at max_steps" in text
    assert "spans until their union" in say(capsys, "explain", "masking.target")
    assert "a number or null" in say(capsys, "explain", "objective.weight_aux")


def test_explain_lists_everything_or_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [line.split()[0] for line in say(capsys, "explain").splitlines()]
    assert keys == list(FIELDS)
    section = say(capsys, "explain", "optim")
    assert "AdamW with decoupled decay" in section
    assert section.count("optim.") == sum(key.startswith("optim.") for key in FIELDS)


def test_explain_knows_the_nearest_key() -> None:
    assert "did you mean 'optim.warmup_steps'?" in refusal(UsageError, "explain", "optim.warm_steps")
    assert "did you mean 'train.max_steps'?" in refusal(UsageError, "explain", "max_steps")


# plan


@pytest.fixture
def meta_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds models without memory."""
    monkeypatch.setattr(nn.Module, "to_empty", lambda self, *, device, recurse=True: self)

    def build(overrides: list[str], vocab_size: int) -> JanusModel:
        config = load_run_config(None, overrides).model
        special = SpecialTokens(0, 1, 2, 3, 4, vocab_size)
        with torch.device("meta"):
            return JanusModel(config, special, DenseLayers())

    return build


@pytest.mark.parametrize("preset", sorted(MODEL_PRESETS))
@pytest.mark.parametrize("extra", [[], ["objective.preset=released", "model.decoder_layers=3"]])
def test_planned_parameters_are_the_models(preset: str, extra: list[str], meta_model: Any) -> None:
    overrides = [f"model.preset={preset}", *extra]
    model = meta_model(overrides, 50265)
    parts = {part.name: part for part in model_parts(load_run_config(None, overrides).model, 50265)}
    real = dict.fromkeys(parts, 0)
    sharded = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        real[part] += parameter.numel()
        column = re.search(r"\.(q|k|v|fc1)\.", name) is not None
        row = re.search(r"\.(out|fc2)\.weight$", name) is not None
        if column or row or name == "embedding.weight":
            sharded[part] += parameter.numel()
    assert {name: part.total for name, part in parts.items()} == real
    assert {name: part.sharded for name, part in parts.items()} == sharded


def _part_of(name: str) -> str:
    if name.startswith("embedding"):
        return "token embedding (tied)"
    if name.startswith("length_head"):
        return "length head"
    side, below = name.split(".")[:2]
    return f"{side} layers" if below == "layers" else "positions"


@pytest.mark.parametrize(
    ("stage", "precision", "data_size", "expected"),
    [
        # Bytes a parameter, counted in DeepSpeed 0.19.8 on one rank after two steps.
        (0, "fp32", 1, 16),
        (1, "fp32", 1, 20),
        (2, "fp32", 1, 20),
        (3, "fp32", 1, 20),
        (1, "bf16", 1, 16),
        (3, "fp16", 1, 16),
        # The ZeRO paper: 2 + 2 + 12/N, 2 + 14/N, 16/N.
        (1, "bf16", 4, 2 + 2 + 3),
        (2, "bf16", 4, 2 + 3.5),
        (3, "bf16", 4, 4),
        (0, "bf16", 4, None),
    ],
)
def test_memory_of_states(stage: int, precision: str, data_size: int, expected: float | None) -> None:
    found = state_bytes(1000, stage, precision, data_size)
    assert found == (None if expected is None else pytest.approx(1000 * expected))


def test_size_of_checkpoints() -> None:
    # Bytes a parameter, as the quickstart's checkpoints turned out on two ranks.
    assert checkpoint_bytes(7) == snapshot_bytes(7) == 84


def test_tensor_parallel_ranks_hold_a_share_of_what_is_sharded() -> None:
    assert PartSize("x", 100, 7).on_rank(4) == 32


def test_plan_prints_parameters_memory_and_length(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "launch" / "recipes" / "bart_base.yaml"
    text = say(capsys, "plan", "--recipe", recipe, "--ranks", 8)
    assert "140,209,152" in text
    assert "vocabulary 50,265 (assumed; give --data or --vocab)" in text
    assert re.search(r"bf16 +1 +8 +refused +771.2 MB +525.8 MB +280.4 MB", text)
    assert "14,500 steps x 1,024 samples" in text
    text = say(capsys, "plan", "--data", data, "--set", "train.max_steps=30", "train.global_batch=16")
    assert "= 480 samples" in text
    assert "= 1.78 epochs" in text
    assert "vocabulary 60 (the data's manifest)" in text
    assert "there cannot be 0 ranks" in refusal(UsageError, "plan", "--ranks", 0)
    assert "did you mean" in refusal(ConfigError, "plan", "--set", "train.max_step=3")


def test_plan_projects_messages_and_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "launch" / "recipes" / "bart_base.yaml"
    text = say(capsys, "plan", "--recipe", recipe, "--nodes", 3, "--devices", 4, "--tensor-parallel", 2)
    assert "messages of one rank in one step (12 ranks, TP 2, bf16)" in text
    gathered = re.search(r"weights after the update \(all-gather, data\) .*", text)
    assert gathered is None, "1,024 samples cannot be shared by 6"
    assert "the global batch cannot be shared by 6 data-parallel ranks" in text
    curve = text.partition("scaling, ZeRO 2, bf16, TP 2: projected, not measured")[2].partition("\n\n")[0]
    lines = [line for line in curve.splitlines() if re.match(r"  \d+ +\d+ ", line)]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"] * 2
    assert all(line.endswith("projected") for line in lines)
    assert sum("100%" in line for line in lines) == 2
    assert "cannot be shared" in lines[2]
    for option in ("flops", "latency-intra", "latency-inter", "bandwidth-intra", "bandwidth-inter"):
        assert f"--{option}" in curve
    slower = say(capsys, "plan", "--recipe", recipe, "--nodes", 2, "--flops", 100)
    assert "at 100 TFLOP/s achieved" in slower
    assert re.search(r"gradients \(all-reduce, data\) +- +280.4 MB in \d", slower)
    assert "groups of 3 do not fit" in refusal(UsageError, "plan", "--nodes", 1, "--tensor-parallel", 3)
    assert "there cannot be 0 nodes" in refusal(UsageError, "plan", "--nodes", 0)


# check


def test_check_goes_through_one_dry_batch(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "check", "--deepspeed_config", ZERO2, "--data", data, "--ranks", 2, "--set", *SMALL)
    assert "micro-batch 4 x accumulation 1 x 2 data-parallel ranks" in text
    assert "270 samples to train on" in text
    losses = dict(re.findall(r"(\w+) (\d+\.\d+)", text.partition("losses before training: ")[2]))
    assert {"ar", "nar", "aux", "length", "kl_ar_aux", "kl_nar_aux"} <= set(losses)
    # An untrained model knows nothing of a vocabulary of 60.
    assert float(losses["nar_nll"]) == pytest.approx(np.log(60), abs=0.2)


def test_check_without_data_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "check", "--deepspeed_config", ZERO2, "--set", *SMALL)
    assert "no data was given (--data DIR), so there is no dry batch" in text


def test_check_names_all_faults_and_ends_with_3(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"gradient_cliping": 1, "zero_optimization": {"stage": 2}}))
    arguments = ["check", "--deepspeed_config", str(config), "--set", "modle.heads=3", "optim.lr=0"]
    done = subprocess.run(
        [sys.executable, "-m", "janus_ds", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 3
    assert "3 faults" in done.stderr
    for words in ("'model.heads'", "optim.lr is 0, but must be more than 0", "'gradient_clipping'"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (DataError, ["--data", "nowhere"], "the data directory does not exist"),
        (ConfigError, ["--ranks", "3"], "8 samples cannot be shared by 3 data-parallel ranks"),
        (UsageError, ["--ranks", "3", "--tensor-parallel", "2"], "do not divide"),
        (ConfigError, ["--ranks", "4", "--tensor-parallel", "4"], "model.heads is 2"),
    ],
)
def test_check_refuses(kind: type[JanusError], arguments: list[str], words: str) -> None:
    text = refusal(kind, "check", "--deepspeed_config", ZERO2, "--set", *SMALL, *arguments)
    assert words in text


def test_check_refuses_data_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    def check(*overrides: str, path: Path = data) -> tuple[object, ...]:
        return ("check", "--deepspeed_config", ZERO2, "--data", path, "--set", *SMALL, *overrides)

    text = refusal(DataError, *check("data.block_tokens=5"))
    assert "data.block_tokens allows 5" in text
    assert re.search(r"shard-00000\d.tar, member 0000\d\d, sample \d+", text)
    assert "prepared for task 'denoise'" in refusal(ConfigError, *check("data.task=pair"))
    other = make_tiny_data(tmp_path / "other")
    train_sentencepiece(["another text altogether, with other words in it"] * 9, "bpe", 40).save(
        other / "tokenizer"
    )
    text = refusal(DataError, *check(path=other))
    assert "the tokenizer is not the one that the data was prepared with" in text


# inspect


def test_inspect_shows_views_rows_and_who_sees_whom(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "rows.png"
    text = say(capsys, "inspect", data, "--sample", 5, "--png", png, "--positions", 12)
    assert f"from {data}/train/shard-000000.tar, member 000000, sample 5" in text
    source = text.partition("source, ")[2].splitlines()[1]
    target = text.partition("target, ")[2].splitlines()[1]
    assert "<mask>" in source
    assert target.count("[") == int(re.findall(r"(\d+) of them masked", text)[0])
    assert target.strip().startswith("<s> ")
    # Two rows that differ in the gold token that they may see.
    assert re.search(r"^QRY +\d+ <mask> +-> ", text, re.M)
    assert re.search(r"^ARQ +0 <mask> .*#\.+", text, re.M)
    assert png.read_bytes()[:4] == b"\x89PNG"
    other = say(capsys, "inspect", data, "--sample", 5, "--epoch", 1)
    assert other.partition("target, ")[2].splitlines()[1] != target


def test_the_picture_is_the_rule(data: Path) -> None:
    run = load_run_config(ROOT / "launch" / "recipes" / "quickstart.yaml")
    special = SpecialTokens(0, 1, 2, 3, 4, 60)
    maker = BatchMaker(data / "train", run, special)
    batch = maker.batches(np.zeros((1, 1), dtype=np.int64), np.array([[9]]))[0]
    picture = picture_of(batch, positions=10_000)
    content = [s for s in picture.segment_R if s <= Segment.MSK]
    counts = batch.counts
    masked, every = counts.masked_tokens, counts.target_tokens
    assert len(picture.segment_R) == 3 * every + 2 * masked
    assert picture.seen_RC.shape == (3 * every + 2 * masked, len(content))
    rank: dict[Segment, int] = {}
    ranks = []
    for segment in picture.segment_R:
        ranks.append(rank.get(segment, 0))
        rank[segment] = ranks[-1] + 1
    for row, column in np.ndindex(picture.seen_RC.shape):
        expected = visible(picture.segment_R[row], ranks[row], picture.segment_R[column], ranks[column])
        assert picture.seen_RC[row, column] == bool(expected)
    cut = picture_of(batch, positions=6)
    assert max(cut.position_R) == 5
    kept = [i for i, position in enumerate(picture.position_R) if position < 6]
    columns = [i for i in kept if i < len(content)]
    assert (cut.seen_RC == picture.seen_RC[np.ix_(kept, columns)]).all()


def test_inspect_refuses_what_is_not_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "give a number from 0 to 269" in refusal(UsageError, "inspect", data, "--sample", 270)
    assert "does not exist" in refusal(DataError, "inspect", tmp_path / "nowhere", "--sample", 0)
    refusal(DataError, "inspect", data, "--sample", 0, "--split", "test")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = refusal(MissingDependencyError, "inspect", data, "--sample", 0, "--png", tmp_path / "x.png")
    assert "pip install matplotlib" in text


# verify


def test_verify_prints_a_line_for_each_shard(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "verify", data)
    lines = text.splitlines()
    assert lines[0].split() == ["shard", "members", "samples", "tokens", "size", "state"]
    states = {line.split()[0]: line.split()[-1] for line in lines[1:-1]}
    expected = ("train/shard-000000.tar", "train/shard-000001.tar", "valid/shard-000000.tar")
    assert states == dict.fromkeys(expected, "whole")
    assert "is whole: 3 shards, 300 samples" in lines[-1]


def test_verify_names_the_damage_and_ends_with_4(tmp_path: Path) -> None:
    damaged = make_tiny_data(tmp_path)
    shard = damaged / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    (damaged / "valid" / "shard-000000.tar").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "janus_ds", "verify", str(damaged)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 4
    assert re.search(r"^train/shard-000000.tar .* whole$", done.stdout, re.M)
    assert re.search(r"^train/shard-000001.tar .* 1 fault$", done.stdout, re.M)
    assert re.search(r"^fault: train/shard-000001.tar, member 0000\d\d: ", done.stdout, re.M)
    assert "fault: valid/shard-000000.tar: the shard is missing" in done.stdout
    assert "the data is damaged, 2 faults" in done.stderr
    assert "Traceback" not in done.stderr
