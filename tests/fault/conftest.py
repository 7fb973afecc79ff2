"""The run that no fault has met."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program import Program


@pytest.fixture(scope="module")
def unbroken(inputs: Path) -> Path:
    """Its folder; it has the settings of `Program`."""
    program = Program(inputs, inputs / "unbroken")
    assert program.finish() == 0, program.said[-3000:]
    return program.run
