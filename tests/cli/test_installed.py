"""The package as it is installed: built as a wheel's content, and used from a folder outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from janus_ds import __version__
from tests.support.tiny_pairs import tiny_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and installed into a folder without its dependencies."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("janus_ds", "launch/recipes", "ds_configs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, str(sources)]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def say(installed: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # Not -m from the checkout's folder, which would be found first.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "janus_ds", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_recipes_and_engines_have_names(installed: Path, tmp_path: Path) -> None:
    assert say(installed, tmp_path, "--version") == f"janus_ds {__version__}\n"
    script = subprocess.run(
        [sys.executable, str(installed / "bin/janus-ds"), "--version"],
        env={"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert script.stdout == f"janus_ds {__version__}\n"
    text = say(installed, tmp_path, "check", "--recipe", "iwslt", "--deepspeed_config", "zero2")
    assert (
        f"{installed}/janus_ds/recipes/nmt_iwslt.yaml and {installed}/janus_ds/ds_configs/zero2.json" in text
    )
    assert "copied" in say(installed, tmp_path, "init", "mine")
    assert (tmp_path / "mine/recipes/glge_xsum.yaml").is_file()
    assert "there already" in say(installed, tmp_path, "init", "mine", code=2)
    mine = ("--recipe", "mine/recipes/quickstart.yaml", "--deepspeed_config", "mine/ds_configs/zero1.json")
    assert "mine/ds_configs/zero1.json are sound" in say(installed, tmp_path, "check", *mine)
    missing = say(installed, tmp_path, "check", "--recipe", "iwslt15", "--deepspeed_config", "zero2", code=3)
    assert "iwslt15" in missing
    assert "to do:" in missing


@pytest.mark.heavy
def test_from_text_to_scores(installed: Path, tmp_path: Path) -> None:
    """Prepare, train on two ranks, decode and score, all from the installed package."""
    for name, lines in (("train", tiny_lines(200)), ("valid", tiny_lines(16)), ("test", tiny_lines(8))):
        for side, language in enumerate(("de", "en")):
            (tmp_path / f"{name}.{language}").write_text("".join(f"{pair[side]}\n" for pair in lines))
    files = [f"--{n} {n}.de {n}.en".split() for n in ("train", "valid", "test")]
    options = ["--task", "nmt", "--source-lang", "de", "--target-lang", "en", "--vocab-size", "60"]
    say(
        installed,
        tmp_path,
        "prepare",
        *options,
        *(word for file in files for word in file),
        "--output",
        "data",
    )
    small = ["model.d_model=16", "model.ffn_dim=16", "model.heads=2", "train.max_steps=2", "data.workers=0"]
    small += ["train.valid_bleu=none", "train.keep_best=none", "train.batch_tokens=200"]
    env = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train = ["-m", "janus_ds", "finetune", "--data", "data", "--deepspeed_config", "zero2", "--output", "run"]
    subprocess.run([*torchrun, *train, "--set", *small], cwd=tmp_path, env=env, check=True)
    decoded = say(installed, tmp_path, "decode", "--checkpoint", "run", "--mode", "ar", "--input", "test.de")
    assert len(decoded.splitlines()) >= 8
    assert "BLEU" in say(installed, tmp_path, "eval", "nmt", "--checkpoint", "run", "--iterations", "1")
