"""What commands show, by meaning: help of each, a dry batch, views of a sample, examples as printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from janus_ds.__main__ import COMMANDS, main
from tests.support.commands import SMALL, ZERO2, say


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"janus-ds {command}" in capsys.readouterr().out


def test_check_goes_through_one_dry_batch(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "check", "--deepspeed_config", ZERO2, "--data", tiny, "--ranks", 2, "--set", *SMALL)
    assert "micro-batch 4 x accumulation 1 x 2 data-parallel ranks" in text
    assert "270 samples to train on" in text
    losses = dict(re.findall(r"(\w+) (\d+\.\d+)", text.partition("losses before training: ")[2]))
    assert {"ar", "nar", "aux", "length", "kl_ar_aux", "kl_nar_aux"} <= set(losses)
    # An untrained model knows nothing of a vocabulary of 60.
    assert float(losses["nar_nll"]) == pytest.approx(np.log(60), abs=0.2)


def test_inspect_shows_the_views_of_an_epoch(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, "inspect", tiny, "--sample", 5, "--positions", 12)
    source = text.partition("source, ")[2].splitlines()[1]
    target = text.partition("target, ")[2].splitlines()[1]
    assert "<mask>" in source
    assert target.count("[") == int(re.findall(r"(\d+) of them masked", text)[0])
    assert target.strip().startswith("<s> ")
    # Two rows that differ in the gold token that they may see.
    assert re.search(r"^QRY +\d+ <mask> +-> ", text, re.M)
    assert re.search(r"^ARQ +0 <mask> .*#\.+", text, re.M)
    other = say(capsys, "inspect", tiny, "--sample", 5, "--epoch", 1)
    assert other.partition("target, ")[2].splitlines()[1] != target
