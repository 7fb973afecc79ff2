"""What the fault tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.warm import WarmStarter


@pytest.fixture(scope="session")
def starter() -> Iterator[WarmStarter]:
    """Forks starts of the program that need no imports."""
    with WarmStarter() as starter:
        yield starter
