"""Files that lie: JSON with a part replaced or left out, for the tests of `make attack-test`."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from janus_ds.errors import JanusError

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
_PIECES = [b"", b"-", b"1e999", b"!!int ", b"&a ", b"*a", b"[", b"{", b": ", b"\n", b"\xff", b"\0", b"9" * 30]
CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 9), st.sampled_from(_PIECES)), max_size=4
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


_HELD = "bytes that a hostile file made a program hold, at most"


@contextmanager
def bounded(most: int = 500_000_000, seconds: float = 60.0) -> Iterator[None]:
    """What comes from outside is read within so many bytes of memory and seconds of processor time.

    The system refuses memory beyond, so that a MemoryError ends the test; the table has the most that was
    held. Processor time, since a loaded machine must not fail a test; far more of it than is needed, since
    it is that of all threads of this process, and twice as much on two threads of one core.
    """

    def too_long(*_: object) -> None:
        pytest.fail(f"more than {seconds} s of processor time")

    begun, size = _memory("VmRSS"), _memory("VmSize")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + most, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
        tried, peak = RESULTS.get(_HELD, (0, 0))
        RESULTS[_HELD] = (tried + 1, max(peak, _memory("VmHWM") - begun))


def _memory(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) << 10


@contextmanager
def taken_or_refused() -> Iterator[None]:
    """A mutated file is read, or refused in three parts, and nothing else, within the bounds."""
    note("mutated files that crash a reader", 1)
    with bounded(), suppress(JanusError):
        yield


def changed(data: bytes, changes: list[tuple[int, int, bytes]], within: int | None = None) -> bytes:
    """Bytes with pieces in place of others, in the first `within` of them."""
    for place, length, piece in changes:
        place %= min(len(data), within or len(data)) + 1
        data = data[:place] + piece + data[place + length :]
    return data


def mutated(value: Any, path: list[int], odd: Any) -> Any:
    """The value with what lies at the end of a path replaced, or left out."""
    if not path or not isinstance(value, dict | list) or not value:
        return None if odd is LEFT_OUT else odd
    copy: Any = value.copy()
    key: Any = sorted(value)[path[0] % len(value)] if isinstance(value, dict) else path[0] % len(value)
    if odd is LEFT_OUT and len(path) == 1:
        del copy[key]
    else:
        copy[key] = mutated(value[key], path[1:], odd)
    return copy
