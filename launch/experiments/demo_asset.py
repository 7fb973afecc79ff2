"""Puts a run into the form that the package ships: bf16 weights, tokenizer, a small `run.json`.

The folder is a run folder as `Generator.from_checkpoint` reads it. Nothing in it tells where it was made.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from driver import ROOT, experiment_parser
from results import wall_seconds
from safetensors.torch import save
from torch import Tensor

from janus_ds.checkpoint.manifest import WEIGHTS_FILE, step_of
from janus_ds.checkpoint.tensors import average_weights, last_checkpoints
from janus_ds.config.locations import user_path
from janus_ds.config.schema import RUN_FILE, RUN_FORMAT_VERSION
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError
from janus_ds.io import disk_faults, write_atomic
from janus_ds.observe import read_metrics, read_run_record


def packaged_parser(description: str | None, root: str, asset: Path, page: str) -> argparse.ArgumentParser:
    """The command line of an experiment whose result the package ships.

    Args:
        description: the driver's docstring.
        root: name of the default folder below runs/.
        asset: the default folder of the package.
        page: file of docs/results.
    """
    parser = experiment_parser(description, root)
    add = parser.add_argument
    add("--ship", action="store_true", help="only make the asset (and scores) of what is trained so far")
    add("--asset", type=user_path, default=asset, help="where the asset goes")
    add("--average", type=int, default=8, help="last checkpoints averaged for the asset [%(default)s]")
    add("--page", type=user_path, default=ROOT / "docs" / "results" / page, help="the results page")
    return parser


MOST_BYTES = 5_000_000
"""What the shipped folder may hold, all files together."""


def ship_stages(
    options: argparse.Namespace, stages: Sequence[str], about: Callable[[], Mapping[str, Any]]
) -> None:
    """Ship what the last of some runs has trained, and tell of all of them.

    Args:
        options: of `packaged_parser`.
        stages: runs that led to the model.
        about: asked for what `run.json` shall tell, beside the minutes of each stage, if there is a model.
    """
    run = options.root / stages[-1]
    load_run(run)
    minutes = {stage: _minutes(options.root / stage) for stage in stages}
    shipped = ship(run, options.asset, options.average, {**about(), "minutes": minutes})
    size = f"{folder_bytes(options.asset):,} bytes"
    print(f"averaged steps {shipped['training']['averaged_steps']}; {options.asset}: {size}", flush=True)


def ship(run: Path, output: Path, average: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the mean of a run's last checkpoints as a folder to ship; other files in it stay.

    Args:
        run: a run folder of training.
        output: the folder to write.
        average: checkpoints at most; a run that has fewer yet gives all that it has.
        about: goes into `run.json` as "training".

    Returns:
        What `run.json` holds.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or a model too large to ship.
        ResourceError: the folder cannot be written.
    """
    loaded = load_run(run)
    count = max(1, min(average, len(list(run.glob("checkpoints/step-*")))))
    files = last_checkpoints(run, count)
    weights = {name: value.to(torch.bfloat16) for name, value in average_weights(files).items()}
    _check_size(weights, run)
    record = read_run_record(run) or {}
    # Paths of the machine that trained are nobody's business, and mean nothing elsewhere.
    config = replace(loaded.config, init=None, data=replace(loaded.config.data, path=None, valid_path=None))
    shipped = {
        "format_version": RUN_FORMAT_VERSION,
        "name": config.name,
        "versions": record.get("versions", {}),
        "git_commit": record.get("git_commit"),
        "recipe": asdict(config),
        "special_tokens": asdict(loaded.special),
        "tokenizer_fingerprint": record["tokenizer_fingerprint"],
        "training": {**about, "averaged_steps": [step_of(file.parent) for file in files]},
    }
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    write_atomic(output / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_atomic(output / RUN_FILE, (json.dumps(shipped, indent=1) + "\n").encode())
    # Read back what others will read.
    load_run(output)
    return shipped


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _minutes(run: Path) -> float:
    """Wall time of a run's updates, over all its attempts."""
    return round(wall_seconds(read_metrics(run / "metrics.jsonl")) / 60, 1)


def _check_size(weights: Mapping[str, Tensor], run: Path) -> None:
    size = sum(value.nbytes for value in weights.values()) + folder_bytes(run / "tokenizer")
    if size > MOST_BYTES:
        raise CheckpointError(
            f"weights and tokenizer take {size:,} bytes, more than the {MOST_BYTES:,} that may be shipped",
            str(run),
            "train a smaller model, or one with a smaller vocabulary",
        )
