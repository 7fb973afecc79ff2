"""Commands in the documents: their options and files exist; README's are run in order (`make heavy-test`)."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import random
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.__main__ import main as bench
from janus_ds.__main__ import COMMANDS, main
from tests.support.hf_models import Shape, build_bart, letters_tokenizer
from tests.support.texts import documents, sentence

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("launch/slurm/*.md"),
    )
)
SCRIPTS = {
    "launch/pretrain.py": "pretrain",
    "launch/finetune.py": "finetune",
    "launch/prepare_data.py": "prepare",
    "launch/prepare_glge.py": "prepare glge",
    "eval/decode.py": "decode",
    "eval/nmt.py": "eval nmt",
    "eval/glge.py": "eval glge",
    "eval/report.py": "report",
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
GOAL = re.compile(r"^make ([a-z][\w-]*)")
FOLDERS = ("benchmarks/", "ds_configs/", "eval/", "janus_ds/", "launch/", "tests/")


class Line(NamedTuple):
    """A command line of a document, without its comment."""

    place: str
    text: str


def commands(document: str) -> list[Line]:
    """Lines of fenced blocks (outputs of programs among them), and code inside of sentences."""
    found, prose, inside, begun = [], "", False, ""
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            prose += f"{line} "
        else:
            begun += line.split("  #")[0].strip()
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            found.append(Line(f"{document}:{number}", begun))
            begun = ""
    return found + [Line(document, code) for code in re.findall(r"`([^`]+)`", prose)]


def parts(line: Line) -> list[tuple[str, list[str]]]:
    """The commands of this project in a line: name (`bench KIND` for benches) and arguments."""
    found = []
    for piece in line.text.split(" | "):
        try:
            words = shlex.split(piece)
        except ValueError:
            continue
        for place, word in enumerate(words):
            if word in SCRIPTS:
                found.append((SCRIPTS[word], words[place + 1 :]))
            elif word == "janus-ds" or (word == "janus_ds" and words[place - 1] == "-m"):
                rest = words[place + 1 :]
                name = " ".join(rest[:2]) if " ".join(rest[:2]) in COMMANDS else "".join(rest[:1])
                if name in COMMANDS:
                    found.append((name, rest[len(name.split()) :]))
            elif word == "benchmarks" and words[place - 1] == "-m":
                found.append((f"bench {words[place + 1].split('|')[0]}", words[place + 2 :]))
    return found


@cache
def help_of(name: str) -> str:
    """What `--help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        bench([name.split()[1], "--help"]) if name.startswith("bench ") else main([*name.split(), "--help"])
    return text.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_and_files_exist(document: str) -> None:
    wrong = []
    for line in commands(document):
        for name, arguments in parts(line):
            options = [word.split("=")[0] for word in arguments if re.match(r"--\w", word)]
            wrong += [f"{line.place}: {name} {option}" for option in options if option not in help_of(name)]
        wrong += [
            f"{line.place}: make {goal}" for goal in GOAL.findall(line.text) if f"\n{goal}:" not in MAKEFILE
        ]
        words = line.text.split() if parts(line) else []
        files = [word for word in words if word.startswith(FOLDERS) and "*" not in word]
        wrong += [f"{line.place}: no file {file}" for file in files if not (ROOT / file).exists()]
    assert wrong == []


def test_make_takes_a_clone_and_a_run_whose_paths_have_a_space(tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    words = ("install", "lint", "types", "pretrain", "bench", f"RUN={tmp_path}/a run")
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", *words], cwd=clone, capture_output=True, text=True, check=True
    )
    split = [line for line in done.stdout.splitlines() if str(tmp_path) in re.sub(r'"[^"]*"', "", line)]
    assert split == []


def test_the_readme_has_commands_to_check() -> None:
    names = {name for line in commands("README.md") for name, _ in parts(line)}
    assert {"prepare", "check", "pretrain", "decode", "finetune", "eval nmt", "eval glge", "report"} <= names


STEPS = "--set train.max_steps=5 --set train.save_every=1 --set train.keep_last=5"
TINY = "--set model.d_model=32 model.ffn_dim=64 model.heads=4 model.encoder_layers=2 model.decoder_layers=2"
SCALED = {
    "launch/pretrain.py": f"{STEPS} --set train.valid_samples=4",
    "launch/finetune.py": f"{STEPS} --set train.valid_every=5",
    "--recipe bart_base": f"{TINY} train.global_batch=2 optim.warmup_steps=1",
    "--recipe xsum": f"{TINY} train.global_batch=4",
    "--source-lang": "--vocab-size 200",
    "eval nmt --checkpoint": "--beam 1",
    "--checkpoint runs/xsum-nar": "--latency-samples 2",
}
"""Options added to the commands that hold these words, so that minutes become seconds."""
BLOCKS = ("See it decode", "Your own text", "From BART and back", "Fine-tuning and scores")


def section_lines(title: str) -> list[str]:
    """Commands of one section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = text.split(f"## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("janus-ds ", "deepspeed ", "echo ", "python "))]


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_readme_runs_from_top_to_bottom(tmp_path: Path) -> None:
    rng = random.Random(1)
    for folder in ("janus_ds", "launch", "eval", "ds_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    task = tmp_path / "glge/easy/xsum_data/org_data"
    task.mkdir(parents=True)
    for name, count in (("train", 60), ("val", 8), ("test", 8)):
        for side, other in (("de", "src"), ("en", "tgt")):
            lines = "".join(sentence(rng, 6) + "\n" for _ in range(count))
            for file in (tmp_path / f"{name}.{side}", task / f"{name.replace('val', 'dev')}.{other}"):
                file.write_text(lines, encoding="utf-8")
    (tmp_path / "wiki.txt.xz").write_bytes(lzma.compress("\n\n".join(documents(800)).encode()))
    build_bart(Shape(positions=1024, vocab_size=203)).save_pretrained(tmp_path / "bart-base")
    letters_tokenizer(tmp_path / "bart-base", 203)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    ran = []
    for title in BLOCKS:
        for line in section_lines(title):
            extra = " ".join(options for words, options in SCALED.items() if words in line)
            done = subprocess.run(
                ["bash", "-c", f"{line} {extra}"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
            ran.append(line)
    assert len(ran) >= 20
