"""`janus-ds bench KIND`: hands over to the benches of a checkout (`python -m benchmarks`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from janus_ds.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """Run one measurement.

    Raises:
        UsageError: this is no checkout.
    """
    try:
        benches = import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        raise UsageError(
            "the benches are not part of the installed package",
            "bench",
            "run `python -m benchmarks` at the root of a checkout of janus_ds",
        ) from error
    code: int = benches.main(arguments)
    return code
