"""`janus-ds COMMAND` in this process: what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.__main__ import main
from janus_ds.errors import JanusError

ROOT = Path(__file__).parents[2]
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
SMALL = ["model.d_model=16", "model.ffn_dim=24", "model.heads=2", "train.global_batch=8"]
"""Overrides for a model that is built at once."""


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends well."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refusal(kind: type[JanusError], *arguments: object) -> str:
    """The message of a command that ends with an error."""
    with pytest.raises(kind) as caught:
        main([str(argument) for argument in arguments])
    return str(caught.value)
