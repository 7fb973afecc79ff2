"""Files that lie: JSON with a part replaced or left out, for the tests of `make attack-test`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ATTACKS = int(os.environ.get("JANUS_ATTACK_EXAMPLES", "0"))
"""Mutated files a test; given by `make attack-test`, which then lists every attack in the table."""
TRAPS = ["[" * 200_000, '{"a":' * 100_000, "9" * 6000, "[]", '"x"', "null", "\0", "\xff"]
"""Texts that no reader of a JSON object may take, or fall over."""
LEFT_OUT = object()
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../x", "a\0b", "9" * 400, 10**6, 10**9, [1], {"a": 1}, [], {}, LEFT_OUT]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
PATHS = st.lists(st.integers(0, 1 << 16), min_size=1, max_size=5)


def attacks(usual: int) -> Callable[[Any], Any]:
    """Settings of a test that mutates files: how many, where `make attack-test` does not say."""
    return settings(max_examples=ATTACKS or usual, suppress_health_check=list(HealthCheck))


RESULTS: dict[str, tuple[int, int]] = {}
"""What attacks were to bring about -> how often they were tried, and how often they did."""


def note(harm: str, tried: int, done: int = 0) -> None:
    """Count attacks for the table that ends `make attack-test`."""
    before = RESULTS.get(harm, (0, 0))
    RESULTS[harm] = (before[0] + tried, before[1] + done)


def note_bytes(peak: int) -> None:
    """Bytes that an attack made a program hold; the table has the most."""
    tried, most = RESULTS.get("bytes held at most", (0, 0))
    RESULTS["bytes held at most"] = (tried + 1, max(most, peak))


def mutated(value: Any, path: list[int], odd: Any) -> Any:
    """The value with what lies at the end of a path replaced, or left out."""
    note("mutated files that crash a reader", 1)
    return _mutated(value, path, odd)


def _mutated(value: Any, path: list[int], odd: Any) -> Any:
    if not path or not isinstance(value, dict | list) or not value:
        return None if odd is LEFT_OUT else odd
    copy: Any = value.copy()
    key: Any = sorted(value)[path[0] % len(value)] if isinstance(value, dict) else path[0] % len(value)
    if odd is LEFT_OUT and len(path) == 1:
        del copy[key]
    else:
        copy[key] = _mutated(value[key], path[1:], odd)
    return copy
