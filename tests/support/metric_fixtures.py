"""Inputs with the scores that the official scripts gave for them.

`own` cases were written for this project and lie in tests/fixtures/metrics. `real` cases hold real
systems' output, which is not ours to give away: they are read from beside the folder that JANUS_SHARED_DATA
names, and the tests that need them are skipped, visibly, where it is not set.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

METRIC_FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"


def metric_cases(name: str) -> list[dict[str, Any]]:
    """The cases of a fixture such as "rouge_xsum.own" or "rouge_xsum.real"."""
    folder = METRIC_FIXTURES
    if name.endswith(".real"):
        data = os.environ.get("JANUS_SHARED_DATA")
        if data is None:
            pytest.skip("JANUS_SHARED_DATA is not set: real outputs are not in the repository")
        folder = Path(data).resolve().parent / "fixtures" / "metrics"
    cases: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    if not cases:
        pytest.fail(f"{name} has no cases")
    return cases
