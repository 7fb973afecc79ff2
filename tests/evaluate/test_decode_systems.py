"""What an evaluation compares, by name, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from janus_ds.errors import UsageError
from janus_ds.evaluate.systems import check_systems, options_by_name


def test_names_and_options() -> None:
    found = options_by_name(
        ("ar", "ar-greedy", "nar", "draft", "aux"),
        (0, 4),
        (0.5,),
        {"beam": 3, "rescore": "ar", "length_beam": 5},
    )
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
    assert found["ar"] == {"beam": 3, "length_beam": 5, "mode": "ar"}
    assert found["ar-greedy"] == {"beam": 1, "length_beam": 5, "mode": "ar"}
    assert found["nar-t0.5"] == {
        "beam": 3,
        "length_beam": 5,
        "mode": "nar",
        "threshold": 0.5,
    }
    assert found["nar-4-rescored"] == {**found["nar-4"], "rescore": "ar"}
    # A draft is greedy; the beam is AR's.
    assert found["draft"] == {"length_beam": 5, "mode": "draft"}
    assert found["aux"] == {"length_beam": 5, "mode": "aux"}


@pytest.mark.parametrize(
    ("modes", "iterations", "thresholds", "decode", "text"),
    [
        (("ra",), (), (), {}, "no mode 'ra'"),
        (("nar",), (-1,), (), {}, "-1 iterations"),
        (("nar",), (1,), (1.01,), {}, "1.01 is no probability"),
        (("nar",), (1,), (0.0,), {}, "0.0 is no probability"),
        (("nar",), (1,), (float("nan"),), {}, "nan is no probability"),
        (("draft",), (), (), {"beam": 5}, "the beam is 5"),
        (("aux",), (), (), {"beam": 5}, "mode aux has no beam"),
    ],
)
def test_what_cannot_be(
    modes: tuple[str, ...],
    iterations: tuple[int, ...],
    thresholds: tuple[float, ...],
    decode: dict[str, Any],
    text: str,
) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        check_systems(modes, iterations, thresholds, decode)
    assert caught.value.where
    assert caught.value.fix
    check_systems(("ar", "nar", "draft", "aux"), (0, 1), (0.5, 1.0), {"beam": 5})
