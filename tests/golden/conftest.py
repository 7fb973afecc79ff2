"""What the golden tests share: one process that has made the imports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.warm import WarmStarter


@pytest.fixture(scope="package")
def starter() -> Iterator[WarmStarter]:
    """Starts programs in a fraction of a second."""
    with WarmStarter() as warm:
        yield warm
