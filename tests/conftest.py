"""What all tests share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.hostile import ATTACKS, RESULTS

# Examples are timed by nobody here: a loaded machine must not fail a test. They are the same each time, so
# that what fails is a change's doing; `make attack-test` draws others.
settings.register_profile(
    "untimed",
    deadline=None,
    max_examples=ATTACKS or 100,
    derandomize=not ATTACKS,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")

Tally = Callable[[str, str], None]


def pytest_configure() -> None:
    """Leave out what a launcher or a job of Slurm has set, in which the tests may run, or a user for scores.

    Not at the import of this file: the ranks of a job, which have theirs from the tests, import it as well.
    """
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in list(os.environ):
        if name in launched or name.startswith(("SLURM_", "TORCHELASTIC_", "SACREBLEU_")):
            del os.environ[name]


@pytest.fixture(scope="module")
def inputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and the data of a tiny run; runs and logs may lie there, too."""
    from tests.support.tiny_data import TINY_RECIPE

    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny, folder / "data")
    (folder / "recipe.yaml").write_text(TINY_RECIPE)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of a few hundred sentences, which stays as it is: copy it to change it."""
    from tests.support.tiny_data import make_tiny_data

    return make_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a small language pair."""
    from tests.support.tiny_pairs import prepare_tiny

    return prepare_tiny(tmp_path_factory.mktemp("pairs")).output


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made of a small BART of Hugging Face with random weights, which stays as it is."""
    from janus_ds.cli.convert import main
    from tests.support.hf_folder import hub_folder

    folder = tmp_path_factory.mktemp("bart")
    main(["--from", "hf", str(hub_folder(folder / "hub")), "--to", str(folder / "bart")])
    return folder / "bart"


@pytest.fixture
def handlers_put_back() -> Iterator[None]:
    """Signals are handled after the test as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


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
    if ATTACKS:
        terminalreporter.section("attack: harm done, of how many tries")
        failed = sum(len(terminalreporter.stats.get(kind, [])) for kind in ("failed", "error"))
        for harm, (tried, done) in {
            **RESULTS,
            "tests that fail, or end with a stack": (len(lines), failed),
        }.items():
            terminalreporter.write_line(f"{harm:<60}  {done:>11,} of {tried:,}")
