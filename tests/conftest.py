"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.support.hostile import ATTACKS
from tests.support.warm import WarmStarter

# Examples are timed by nobody here: a loaded machine must not fail a test.
settings.register_profile("untimed", deadline=None, max_examples=ATTACKS or 100)
settings.load_profile("untimed")

Tally = Callable[[str, str], None]


@pytest.fixture(scope="session")
def starter() -> Iterator[WarmStarter]:
    """Starts programs without their imports; one for the fault suite and the golden tests."""
    with WarmStarter() as warm:
        yield warm


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """`tally(check, count)` gives a line of the table that ends a run of the fault suite."""

    def note(check: str, count: str) -> None:
        record_property("tally", (check, count))

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every attack stands in the table of `make attack-test`, with the files that it mutates."""
    for item in items if ATTACKS else []:
        is_property = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        count = f"up to {ATTACKS} mutated files" if is_property else "1 attack"
        item.user_properties.append(("tally", (item.name[:100], count)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table with one line a check: what was counted, outcome, seconds of the test with its fixtures."""
    seconds: dict[str, float] = {}
    lines: list[tuple[str, str, str, str]] = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + getattr(report, "duration", 0.0)
    for report in terminalreporter.stats.get("", []):  # setups and teardowns
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + getattr(report, "duration", 0.0)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            found = [value for name, value in getattr(report, "user_properties", ()) if name == "tally"]
            if not found and (outcome == "passed" or "tests/fault" not in report.nodeid):
                continue
            name = report.nodeid.partition("::")[2]
            for check, count in found or [(name, "")]:
                lines.append((check, count, outcome, f"{seconds[report.nodeid]:.0f} s"))
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    terminalreporter.section("survived")
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
