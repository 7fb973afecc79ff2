"""Experiments as programs, and made-up folders of finished runs for their pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def drive(script: str, root: Path, shared: Path, *options: str) -> None:
    """Run a driver of launch/experiments to its end on one process, with the collections in `shared`."""
    command = [sys.executable, str(ROOT / "launch" / "experiments" / f"{script}.py"), "--root", str(root)]
    env = {**os.environ, "JANUS_SHARED_DATA": str(shared), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True, check=False)
    logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(root.rglob("*.log")))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"


def made_run(folder: Path, task: str, preset: str, systems: dict[str, Any]) -> None:
    """What a finished run leaves behind, as far as a report reads it."""
    recipe = {
        "data": {"task": task},
        "train": {"seed": 1, "patience": 10, "max_steps": 22000},
        "objective": {"preset": preset},
        "masking": {},
        "optim": {},
        "model": {"encoder_layers": 3, "decoder_layers": 3, "d_model": 128},
    }
    command = ["/elsewhere/launch/finetune.py", "--output", str(folder), "--set", f"name={folder.name}"]
    record = {
        "recipe": recipe,
        "command": command,
        "git_commit": "abc",
        "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []},
        "versions": {"torch": "2", "deepspeed": "0"},
    }
    scores = {"systems": systems}
    for path, content in {
        "run.json": record,
        "trained.json": {"steps": 60},
        "finished.json": {"steps": 60, "lines": 4},
        "eval/test/scores.json": scores,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    line = {"step": 60, "valid/loss": 3.0, "valid/ar_nll": 2.5, "valid/nar_nll": 4.25, "kl_ar_aux": 0.5}
    line |= {"seconds": 2.0, "valid/bleu_ar": 20.0, "samples_total": 900, "cpu_seconds_total": 1800.0}
    line |= {"tokens_total": 3_000_000, "tokens_per_second": 500.0, "tokens_per_second_device": 500.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
