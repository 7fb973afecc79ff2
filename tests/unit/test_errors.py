"""Errors: three parts, no stack, an exit code of their own."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable

import pytest

from janus_ds import errors
from janus_ds.config.fields import ConfigFaultsError, Fault
from janus_ds.errors import PREEMPTED_EXIT_CODE, DataError, JanusError, exit_on_error
from janus_ds.parallel.liveness import LostRankError, Peer

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, JanusError)]


def test_exit_codes_are_distinct_and_fit_a_shell() -> None:
    # A kind below another one keeps its code: DamagedDataError is a DataError.
    codes = [kind.exit_code for kind in KINDS if kind.__bases__ == (JanusError,) or kind is JanusError]
    codes.append(PREEMPTED_EXIT_CODE)
    assert len(codes) == 10
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 126 for code in codes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_says_what_where_and_what_to_do(kind: type[JanusError]) -> None:
    error = kind("the shard is cut", "shard-000003.tar", "copy it again")
    assert str(error) == "error: the shard is cut\n  where: shard-000003.tar\n  to do: copy it again"
    assert (error.what, error.where, error.fix) == error.args


@pytest.mark.parametrize(
    "error",
    [
        DataError("the shard is cut", "shard-000003.tar", "copy it again"),
        ConfigFaultsError([Fault("a", "b", "c"), Fault("d", "e", "f")]),
        LostRankError([Peer(3, "node7", 41)], True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_ranks_can_send_each_other_their_errors(error: JanusError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


def raising(error: BaseException) -> Callable[[], int | None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("code", "main"),
    [
        (4, raising(DataError("the shard is cut", "shard-000003.tar", "copy it again"))),
        (130, raising(KeyboardInterrupt())),
        (7, lambda: 7),
        (2, raising(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300))),
        (2, raising(PermissionError(errno.EACCES, "Permission denied", "/root/data"))),
        (0, lambda: None),
    ],
)
def test_user_faults_leave_with_their_code_and_no_stack(
    code: int, main: Callable[[], int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_error(main)
    assert caught.value.code == code
    assert ("the shard is cut" in capsys.readouterr().err) == (code == DataError.exit_code)


def test_faults_of_ours_keep_their_stack() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_on_error(main)
