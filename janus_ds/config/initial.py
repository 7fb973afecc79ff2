"""What a run takes over from the run that its first weights come from (`init`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ds.config.schema import RunConfig

__all__ = ["follow_init", "record_of"]

_RUN_FILE = "run.json"


def follow_init(run: RunConfig) -> RunConfig:
    """The run with the decoder's start of `init`, where its own recipe leaves it open.

    The start decides at which positions tokens stand, so weights that were trained with `eos_bos`
    (BART, and all pretraining) are fine-tuned with it too, on pairs as well.
    """
    if run.init is None or run.objective.decoder_start is not None:
        return run
    objective = record_of(Path(run.init)).get("recipe", {}).get("objective", {})
    return replace(run, objective=replace(run.objective, decoder_start=objective.get("decoder_start")))


def record_of(source: Path) -> dict[str, Any]:
    """`run.json` of a run folder, of a checkpoint in it, or of the folder of a weights file.

    Empty where there is none: weights may come as a file alone. That there are weights at all is
    looked at when they are read.
    """
    folders = [source, source.parent, source.parent.parent, *source.parents[2:3]]
    for folder in folders:
        try:
            record = json.loads((folder / _RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return record if isinstance(record, dict) else {}
    return {}
