"""What commands show, by meaning: help of each, views of a sample, examples as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from janus_ds.__main__ import COMMANDS, main
from janus_ds.data.stream.loader import VALIDATION_EPOCH
from tests.support.commands import say


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"janus-ds {command}" in capsys.readouterr().out


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
    held_out = ("inspect", tiny, "--sample", 5, "--split", "valid")
    shown = say(capsys, *held_out)
    assert shown == say(capsys, *held_out, "--epoch", VALIDATION_EPOCH)
    assert shown != say(capsys, *held_out, "--epoch", 0)
