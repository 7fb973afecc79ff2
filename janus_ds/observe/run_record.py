"""`run.json`: what a run is, how and where it was started, and what decoding needs beside the weights."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from janus_ds import __version__
from janus_ds.batch import SpecialTokens
from janus_ds.config.load import to_dict
from janus_ds.config.locations import public_location
from janus_ds.config.schema import RunConfig
from janus_ds.io import read_json, write_atomic
from janus_ds.observe.writers import set_aside

logger = logging.getLogger(__name__)


def installed_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python and of packages; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


RUN_FILE = "run.json"
RUN_FORMAT_VERSION = 1
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "webdataset", "sentencepiece", "tensorboard")


def write_run_record(
    run: Path,
    config: RunConfig,
    special: SpecialTokens,
    tokenizer_fingerprint: str,
    execution: dict[str, Any],
    step: int,
) -> None:
    """Write `run.json`, keeping the record of earlier attempts; secrets of addresses are left out.

    Args:
        tokenizer_fingerprint: of the run's tokenizer, so that decoding notices another.
        execution: how it is executed (DeepSpeed configuration, ranks), as plain values.
        step: where this start begins.
    """
    command = [public_location(word) for word in sys.argv]
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    started = {"time": now, "command": command, "step": step, "ended": None}
    earlier = _earlier_attempts(run)
    if earlier and _is_open(earlier[-1]):
        logger.warning("the start before was killed or failed; this one goes on from step %d", step)
    record = {
        "format_version": RUN_FORMAT_VERSION,
        "name": config.name,
        "versions": {"janus_ds": __version__, **installed_versions(_PACKAGES)},
        "command": command,
        "git_commit": _git_commit(),
        "hardware": _hardware(),
        "recipe": to_dict(config),
        "model": asdict(config.model),
        "special_tokens": asdict(special),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "execution": execution,
        "attempts": [*earlier, started],
    }
    write_atomic(run / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())


def note_end(run: Path, ended: str) -> None:
    """Say in `run.json` how the last start has ended; of one that was killed it goes on to say nothing."""
    record = read_run_record(run)
    attempts = None if record is None else record.get("attempts")
    if isinstance(attempts, list) and attempts and _is_open(attempts[-1]):
        attempts[-1]["ended"] = ended
        write_atomic(run / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())


def _is_open(attempt: Any) -> bool:
    """Whether a start has not said how it ended; those of earlier versions never say it."""
    return isinstance(attempt, dict) and attempt.get("ended", "") is None


def read_run_record(run: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none that can be read."""
    try:
        return read_json(run / RUN_FILE)
    except (OSError, ValueError):
        return None


def _earlier_attempts(run: Path) -> list[Any]:
    """What the record of a run says of its earlier starts; a damaged one is set aside with a warning."""
    record = read_run_record(run)
    attempts = [] if record is None else record.get("attempts", [])
    if isinstance(attempts, list) and (record is not None or not (run / RUN_FILE).exists()):
        return attempts
    set_aside(run / RUN_FILE, "the record of this run's earlier starts is lost")
    return []


def _git_commit() -> str | None:
    """The commit of the source tree this package lies in; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"host": platform.node(), "machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
