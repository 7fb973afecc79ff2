"""What an evaluation compares, by name, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_ds.errors import CheckpointError, UsageError
from janus_ds.evaluate.evaluation import EvalRequest, load_mean


def test_names_and_options() -> None:
    decode = {"beam": 3, "rescore": "ar", "length_beam": 5}
    request = EvalRequest(Path("run"), iterations=(0, 4), thresholds=(0.5,), decode=decode)
    found = request.systems(("ar", "ar-greedy", "nar", "draft", "aux"))
    assert list(found) == [
        "ar",
        "ar-greedy",
        "nar-0",
        "nar-0-rescored",
        "nar-4",
        "nar-4-rescored",
        "nar-t0.5",
        "nar-t0.5-rescored",
        "draft",
        "aux",
    ]
    assert found["ar"] == {"beam": 3, "mode": "ar"}
    assert found["ar-greedy"] == {"beam": 1, "mode": "ar", "temperature": 0.0}
    assert found["nar-t0.5"] == {"length_beam": 5, "mode": "nar", "threshold": 0.5}
    assert found["nar-4-rescored"] == {**found["nar-4"], "rescore": "ar"}
    # Each takes what its mode uses: a draft is greedy, the beam is AR's.
    assert found["draft"] == {"mode": "draft"}
    assert found["aux"] == {"length_beam": 5, "mode": "aux"}
    # Greedy is greedy beside samples, too.
    sampled = EvalRequest(Path("run"), decode={"temperature": 1.0}).systems(("ar", "ar-greedy"))
    assert [system["temperature"] for system in sampled.values()] == [1.0, 0.0]


def test_a_mean_of_a_packaged_model_is_refused_for_its_own_reason() -> None:
    with pytest.raises(CheckpointError, match=r"5 checkpoints are to be averaged, the run has 0"):
        load_mean(Path("demo"), 5, "cpu")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"modes": ("ra",)}, "no mode 'ra'"),
        ({"limit": -1}, "-1 sentences"),
        ({"iterations": (-1,)}, "-1 iterations"),
        ({"thresholds": (1.01,)}, "1.01 is no probability"),
        ({"thresholds": (0.0,)}, "0.0 is no probability"),
        ({"thresholds": (float("nan"),)}, "nan is no probability"),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        EvalRequest(Path("run"), **asked)
    assert caught.value.where
    assert caught.value.fix
    EvalRequest(Path("run"), modes=("ar", "nar", "draft", "aux"), thresholds=(0.5, 1.0))
