"""The package as it is installed: built as a wheel's content, and used from a folder outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from janus_ds import __version__
from tests.support.tiny_pairs import tiny_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("janus_ds", "launch/recipes", "ds_configs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."], sources)
    (found,) = sources.glob("janus_ds-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--disable-pip-version-check", "--target", str(folder)]
    run([sys.executable, "-m", "pip", "install", "-q", *options, str(wheel)], folder)
    return folder


def run(command: list[str], folder: Path, path: Path | None = None, code: int = 0) -> str:
    """Run a command outside of the checkout; gives what it has printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    # uv is to look where pip does.
    env |= {f"UV_{name}": env[f"PIP_{name}"] for name in ("FIND_LINKS", "INDEX_URL") if f"PIP_{name}" in env}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def say(installed: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    # Not -m from the checkout's folder, which would be found first.
    return run([sys.executable, "-P", "-m", "janus_ds", *arguments], folder, installed, code)


def test_recipes_and_engines_have_names(installed: Path, tmp_path: Path) -> None:
    assert say(installed, tmp_path, "--version") == f"janus_ds {__version__}\n"
    script = [sys.executable, str(installed / "bin/janus-ds"), "--version"]
    assert run(script, tmp_path, installed) == f"janus_ds {__version__}\n"
    assert "copied" in say(installed, tmp_path, "init", "mine")
    assert (tmp_path / "mine/recipes/glge_xsum.yaml").is_file()
    assert "there already" in say(installed, tmp_path, "init", "mine", code=2)
    # Both in one process, most of whose time goes into the imports of torch and DeepSpeed.
    named = ["check", "--recipe", "iwslt", "--deepspeed_config", "zero2"]
    mine = ["check", "--recipe", "mine/recipes/quickstart.yaml"]
    mine += ["--deepspeed_config", "mine/ds_configs/zero1.json"]
    code = f"from janus_ds.__main__ import main; raise SystemExit(main({named}) or main({mine}))"
    text = run([sys.executable, "-P", "-c", code], tmp_path, installed)
    assert (
        f"{installed}/janus_ds/recipes/nmt_iwslt.yaml and {installed}/janus_ds/ds_configs/zero2.json" in text
    )
    assert "mine/ds_configs/zero1.json are sound" in text
    missing = say(installed, tmp_path, "check", "--recipe", "iwslt15", "--deepspeed_config", "zero2", code=3)
    assert "iwslt15" in missing
    assert "to do:" in missing


def test_constraints_hold_all_that_make_installs() -> None:
    """Also what deepspeed and others need; torch, and what it alone needs, fits the machine."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    held = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    needed, todo = set[str](), [Requirement("janus_ds[plots,dev]")]
    while todo:
        asked = todo.pop()
        for extra in ("", *asked.extras):
            for found in map(Requirement, metadata.requires(asked.name) or []):
                name = canonicalize_name(found.name)
                if (not found.marker or found.marker.evaluate({"extra": extra})) and name not in needed:
                    needed.add(name)
                    todo += [found] if name != "torch" else []
    assert needed - held == {"torch"}


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path, installer: str) -> None:
    """Dependencies from the index; then prepare, train on two ranks, decode and score.

    TORCH_PIP_ARGS are those of the Makefile, such as an index with builds for CPUs.
    """
    programs = tmp_path / "venv/bin"
    run([sys.executable, "-m", "venv", "venv"], tmp_path)
    install = [str(programs / "pip"), "install"]
    if subprocess.run([*install, "-q", "--dry-run", "safetensors"], capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    if installer == "uv":
        install = [sys.executable, "-m", "uv", "pip", "install", "--python", str(programs / "python")]
    torch = re.search(r"TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert torch is not None
    options = ["-c", str(ROOT / "constraints.txt"), *os.environ.get("TORCH_PIP_ARGS", "").split()]
    options.append(f"torch=={torch[1]}")
    run([*install, "-q", *options, str(wheel)], tmp_path)
    janus = str(programs / "janus-ds")
    assert run([janus, "--version"], tmp_path) == f"janus_ds {__version__}\n"
    pairs = []
    for name, lines in (("train", tiny_lines(200)), ("valid", tiny_lines(16)), ("test", tiny_lines(8))):
        pairs += [f"--{name}", f"{name}.de", f"{name}.en"]
        for side, language in enumerate(("de", "en")):
            (tmp_path / f"{name}.{language}").write_text("".join(f"{pair[side]}\n" for pair in lines))
    nmt = ["--task", "nmt", "--source-lang", "de", "--target-lang", "en", "--vocab-size", "60"]
    run([janus, "prepare", *nmt, *pairs, "--output", "data"], tmp_path)
    small = ["model.d_model=16", "model.ffn_dim=16", "model.heads=2", "train.max_steps=2", "data.workers=0"]
    small += ["train.valid_bleu=none", "train.keep_best=none", "train.batch_tokens=200"]
    ranks = [str(programs / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "janus_ds"]
    train = ["finetune", "--data", "data", "--deepspeed_config", "zero2", "--output", "run"]
    assert "complete after step 2" in run([*ranks, *train, "--set", *small], tmp_path)
    decode = [janus, "decode", "--checkpoint", "run", "--mode", "ar", "--input", "test.de"]
    assert len(run([*decode, "--output", "out"], tmp_path).splitlines()) <= 1
    assert len((tmp_path / "out").read_text().splitlines()) == 8
    assert "BLEU" in run([janus, "eval", "nmt", "--checkpoint", "run", "--iterations", "1"], tmp_path)


@pytest.mark.parametrize(
    ("count", "visible", "taken"),
    [
        (0, "", "LOCAL_SIZE=2"),
        (3, "", "CUDA_VISIBLE_DEVICES=0,1"),
        (8, "", ""),
        (8, "3,5,6", "CUDA_VISIBLE_DEVICES=3,5"),
    ],
)
def test_make_pretrain_takes_gpus_that_its_batch_divides_among(
    count: int, visible: str, taken: str, tmp_path: Path
) -> None:
    """The command alone, with a listing of so many GPUs."""
    listing = "\n".join(f"echo 'GPU {n}: NVIDIA H200'" for n in range(count)) or "exit 9"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listing}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}
    command = ["make", "-n", "pretrain", "NPROC=2"]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    found = re.search(r"PYTHONPATH=\S+ (.*?) ?deepspeed ", told)
    assert found is not None
    assert found[1].strip() == taken
