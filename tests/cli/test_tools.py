"""`python -m janus_ds COMMAND`: numbers and pictures. What each says: `tests/golden/commands.txt`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from janus_ds.__main__ import COMMANDS, main
from janus_ds.batch import SpecialTokens
from janus_ds.cli import plan
from janus_ds.cli.inspect import picture_of
from janus_ds.cli.plan import model_parts, state_bytes
from janus_ds.config.load import load_run_config
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.loader import VALIDATION_EPOCH
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.errors import ConfigError, UsageError
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.stream_mask import Segment, visible
from tests.support.commands import ROOT, refusal, say
from tests.support.programs import python

# The command itself


def test_help_is_quick_and_names_every_command() -> None:
    done = python("-X", "importtime", "-m", "janus_ds", "--help")
    assert done.returncode == 0
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "janus_ds" in imported
    assert not imported & {"torch", "deepspeed", "numpy"}
    assert set(re.findall(r"^  ([a-z -]*[a-z])  +", done.stdout, re.M)) >= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"janus-ds {command}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "data"])
def test_bench_hands_over_to_its_kinds(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", kind, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_wrong_python_is_told_which_package_it_lacks() -> None:
    command = [sys.executable, "-S", "-m", "janus_ds", "plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 8
    assert re.match(
        r"error: the package \w+ is not installed\n  where: .*\n  to do: use the Python", done.stderr
    )


def test_a_reader_that_stops_early_is_no_fault() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m janus_ds explain | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[1] == "0"
    assert done.stderr == ""


# plan


def meta_model(overrides: list[str], vocab_size: int) -> JanusModel:
    """A model without memory."""
    config = load_run_config(None, overrides).model
    special = SpecialTokens(0, 1, 2, 3, 4, vocab_size)
    with torch.device("meta"):
        return JanusModel(config, special, ParallelLayers())


@pytest.mark.parametrize("preset", sorted(MODEL_PRESETS))
@pytest.mark.parametrize("extra", [[], ["objective.preset=released", "model.decoder_layers=3"]])
def test_planned_parameters_are_the_models(preset: str, extra: list[str]) -> None:
    overrides = [f"model.preset={preset}", *extra]
    model = meta_model(overrides, 50265)
    parts = model_parts(load_run_config(None, overrides).model, 50265)
    real = dict.fromkeys(parts, 0)
    sharded = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        part = _part_of(name)
        real[part] += parameter.numel()
        column = re.search(r"\.(q|k|v|fc1)\.", name) is not None
        row = re.search(r"\.(out|fc2)\.weight$", name) is not None
        if column or row or name == "embedding.weight":
            sharded[part] += parameter.numel()
    assert {name: sum(part) for name, part in parts.items()} == real
    assert {name: split for name, (split, _) in parts.items()} == sharded


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
        (1, "fp16", 1, 16),
        (3, "fp16", 1, 16),
        (1, "bf16", 1, 20),
        (2, "bf16", 1, 18),
        (3, "bf16", 1, 18),
        # The ZeRO paper: 2 + 2 + 12/N, 2 + 14/N, 16/N.
        (1, "fp16", 4, 2 + 2 + 3),
        (2, "fp16", 4, 2 + 3.5),
        (3, "fp16", 4, 4),
        # With gradients that are added up in fp32: 2 + 2 + 4 + 12/N, 2 + 16/N, 18/N.
        (1, "bf16", 4, 2 + 2 + 4 + 3),
        (2, "bf16", 4, 2 + 4),
        (3, "bf16", 4, 4.5),
        (0, "bf16", 4, None),
    ],
)
def test_memory_of_states(stage: int, precision: str, data_size: int, expected: float | None) -> None:
    found = state_bytes(1000, stage, precision, data_size)
    assert found == (None if expected is None else pytest.approx(1000 * expected))


def test_plan_projects_messages(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "launch" / "recipes" / "bart_base.yaml"
    text = say(capsys, "plan", "--recipe", recipe, "--ranks", 12, "--tensor-parallel", 2)
    assert "messages of one rank in one step (12 ranks, TP 2, bf16)" in text
    gathered = re.search(r"weights after the update \(all-gather, data\) .*", text)
    assert gathered is None, "1,024 samples cannot be shared by 6"
    assert "the global batch cannot be shared by 6 data-parallel ranks" in text
    assert "8 ranks do not divide into tensor-parallel groups of 3" in refusal(
        UsageError, "plan", "--ranks", 8, "--tensor-parallel", 3
    )
    # Two dropout draws, and two encoder passes, cost messages under tensor parallelism.
    options = ("plan", "--recipe", recipe, "--ranks", 8, "--tensor-parallel", 2)
    plain = say(capsys, *options)
    for changed in ("objective.encoder_passes=2", "objective.weight_kl_ar_ar=1"):
        texts = (plain, say(capsys, *options, "--set", changed))
        first, second = (re.findall(r"layers forward .*", text) for text in texts)
        assert first
        assert first != second, changed


def test_plan_shows_the_tensor_parallel_size_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("plan", "--ranks", 8, "--tensor-parallel", 8, "--set")
    for heads in (8, 32):
        lines = say(capsys, *asked, f"model.heads={heads}").splitlines()
        assert [line.split()[1] for line in lines if line.startswith("  bf16")] == ["1", "2", "4", "8"]
    six = ("model.heads=6", "model.d_model=96")
    lines = say(capsys, "plan", "--set", *six).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  bf16")] == ["1", "2"]
    assert "model.heads is 6, which 8 tensor-parallel ranks cannot share" in refusal(
        ConfigError, *asked, *six
    )


def test_plan_counts_samples_once_and_all_that_lies_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 16 samples on 8 ranks each has 2, in two dropout draws as well."""
    kept = ("train.save_every=50", "train.keep_every=100", "train.keep_best=loss", "train.max_steps=1000")
    text = say(capsys, "plan", "--set", "objective.weight_kl_ar_ar=1", *kept)
    assert "  1 micro-batches of 2 samples, " in text
    assert "  10 (train.keep_every), 2 (train.keep_last) and the one being written, and " in text
    assert " in checkpoints/best, lie on disk." in text


def test_plan_bounds_the_epochs_of_batches_of_tokens() -> None:
    """Ten pairs of 40 tokens, 20 a side if the sides are of one length."""
    pairs = ["data.task=pair", "data.batch=tokens", "train.max_steps=10", "train.batch_tokens=44"]
    lines = plan._length(load_run_config(None, pairs), [plan._SourceSize("pairs", 1.0, 10, 400)])
    assert lines[-1].startswith("  = at most 2.0 epochs: of a pair its longer side counts")


def test_a_plan_for_data_of_another_task_is_refused(tiny: Path) -> None:
    said = refusal(ConfigError, "plan", "--recipe", "iwslt", "--data", tiny)
    assert "the data is prepared for task 'denoise', the run asks for 'pair'" in said


def test_plan_counts_each_source_of_a_mixture(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    """By their weights: 1,080 samples are three times the 270 of one source and once those of the other."""
    shutil.copytree(tiny, tmp_path / "long")
    manifest = Manifest.load(tiny)
    own = manifest.splits["train"].tokens / 270
    longer = {**manifest.splits, "train": replace(manifest.splits["train"], tokens=27_000)}
    replace(manifest, splits=longer).save(tmp_path / "long")
    data = f"{tiny}=3,{tmp_path / 'long'}=1"
    text = say(capsys, "plan", "--data", data, "--set", "train.max_steps=180", "train.global_batch=6")
    assert f"  = 3.00 epochs of {tiny}\n  = 1.00 epochs of {tmp_path / 'long'}" in text
    assert f"tokens, {0.75 * own + 25:.0f} a sample" in text


# inspect


def test_held_out_samples_are_shown_as_validations_see_them(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = ("inspect", tiny, "--sample", 5, "--split", "valid")
    shown = say(capsys, *held_out)
    assert shown == say(capsys, *held_out, "--epoch", VALIDATION_EPOCH)
    assert shown != say(capsys, *held_out, "--epoch", 0)


@pytest.mark.parametrize("option", ["--epoch", "--positions"])
def test_numbers_that_nothing_can_hold_are_refused(
    tiny: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        say(capsys, "inspect", tiny, "--sample", 5, option, 10**20)
    assert f"{option}: {10**20} is too large: give a number up to" in capsys.readouterr().err


def test_the_picture_is_the_rule(tiny: Path) -> None:
    run = load_run_config(ROOT / "launch" / "recipes" / "quickstart.yaml")
    special = SpecialTokens(0, 1, 2, 3, 4, 60)
    maker = BatchMaker(tiny / "train", run, special)
    batch = maker.make((np.zeros(1, dtype=np.int64), np.array([9])))["batches"][0]
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
    # Names are cut where the next one begins; the last has room.
    names = picture_of(batch, positions=1).text(str).splitlines()[0]
    assert names.endswith(tuple(Segment.__members__))


def test_the_shell_completes_commands_options_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = {
        "janus-ds de": "decode demo",
        "/usr/bin/janus-ds eval ''": "glge nmt",
        "janus-ds prepare gl": "glge",
        "janus-ds prepare --block": "--block-tokens",
        "janus-ds prepare glge --in": "--input",
        "janus-ds decode --demo --on": "--on-long",
        "janus-ds check --recipe nmt_iw": "nmt_iwslt",
        "janus-ds check --deepspeed_config zero3": "zero3 zero3_offload",
        "janus-ds decode --input fi": "",
    }
    ask = 't() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _janus_ds; echo "${COMPREPLY[*]}"; }'
    code = "\n".join([script, ask, *(f"t {words}" for words in typed)])
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == list(typed.values()), done.stderr
    # zsh 5.9 in its interactive mode, by hand: it needs compinit, and no name bare within ${ :1: }.
    assert main(["completion", "zsh"]) == 0
    head, same = capsys.readouterr().out.split("# eval", 1)
    assert same == script.split("# eval", 1)[1].replace("completion bash", "completion zsh")
    assert head.index("&& compinit") < head.index("&& bashcompinit")
    assert ":COMP" not in script
