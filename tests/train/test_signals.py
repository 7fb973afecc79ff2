"""Requests to stop, in one process without torch; real runs are stopped in tests/fault and tests/slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from janus_ds.errors import PREEMPTED_EXIT_CODE
from janus_ds.train.signals import StopSignals, find_launchers
from tests.support.launch import ROOT
from tests.support.processes import wait_until
from tests.support.programs import started

BUSY = """
import os, select, time
from types import SimpleNamespace
from janus_ds.train import signals
looks = 0
def look(*given):
    global looks
    looks += 1
    return select.select(*given)
signals.select = SimpleNamespace(select=look)
signals._POLL_SECONDS, signals._ECHO_SECONDS = 0.05, 1e9
requests = signals.StopSignals()
requests.install()
requests.watch()
print("ready", flush=True)
while True:
    # The test says when an echo can come no more, and when all is saved.
    if os.path.exists("late") and signals._ECHO_SECONDS > 1:
        # Not before the thread has taken the echoes that have come.
        taken = looks + 2
        while looks < taken:
            time.sleep(0.01)
        signals._ECHO_SECONDS = 1e-9
    if os.path.exists("saved"):
        requests.leave()
    print(requests.name, *sorted(os.listdir()), flush=True)
    # Nothing of Python runs meanwhile in the main thread but handlers.
    time.sleep(0.05)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    process = started("-c", BUSY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def says(process: subprocess.Popen[str], line: str, times: int = 1) -> None:
    """Wait until the process has said a line so often."""
    assert process.stdout is not None
    for _ in range(times):
        while (said := process.stdout.readline()) != f"{line}\n":
            assert said, "the process has ended"


LATE = """
import os, signal, sys
from janus_ds.train.signals import StopSignals
class Late:
    def __del__(self, kill=os.kill, rank=os.getpid(), number=signal.SIGTERM):
        kill(rank, number)
requests, late = StopSignals(), Late()
requests.install(), requests.leave(), sys.exit(75)
"""


def test_a_signal_while_python_ends_does_not_change_the_exit_code() -> None:
    assert started("-c", LATE).wait() == PREEMPTED_EXIT_CODE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_same_signal_again_ends_the_process_at_once(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        for _ in range(3):
            # An echo, as launchers make it.
            process.send_signal(number)
            says(process, number.name, 3)
        (tmp_path / "late").touch()
        says(process, f"{number.name} late")
        process.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else signal.SIGTERM)
        says(process, f"{number.name} late", 3)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 128 + number
        assert f"{number.name} again: leaving at once" in err
    finally:
        process.kill()


def test_a_signal_after_the_last_save_changes_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        process.send_signal(signal.SIGTERM)
        says(process, "SIGTERM")
        for name in ("late", "saved"):
            (tmp_path / name).touch()
        says(process, "SIGTERM late saved", 2)
        process.send_signal(signal.SIGTERM)
        says(process, "SIGTERM late saved", 5)
    finally:
        process.kill()
        process.wait()


def test_a_dead_launcher_asks_to_stop(tmp_path: Path) -> None:
    """`deepspeed` is two processes; the death of the outer one is seen too."""
    rank, log = tmp_path / "rank.py", tmp_path / "log"
    rank.write_text(BUSY)
    inner = tmp_path / "torchrun"
    inner.write_text(f"import subprocess, sys\nsubprocess.call([sys.executable, {str(rank)!r}])\n")
    outer = tmp_path / "deepspeed"
    outer.write_text(f"import subprocess, sys\nsubprocess.call([sys.executable, {str(inner)!r}])\n")
    with log.open("wb") as file:
        process = started(outer, stdout=file, stderr=file, start_new_session=True, cwd=tmp_path)
    try:
        wait_until(lambda: "None" in log.read_text(), 120, "a start")
        process.kill()
        process.wait()
        wait_until(lambda: "the launcher is gone" in log.read_text(), 120, "the news")
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_shell_is_no_launcher() -> None:
    assert find_launchers(psutil.Process()) == []
    assert find_launchers(psutil.Process(1)) == []


def test_a_launcher_counts_whatever_becomes_of_the_shell_above_it() -> None:
    class Program:
        def __init__(self, name: str, above: Program | None) -> None:
            self.name, self.above = name, above

        def cmdline(self) -> list[str]:
            return [self.name]

        def parent(self) -> Program:
            if self.above is None:
                raise psutil.NoSuchProcess(1)
            return self.above

    launcher = Program("/usr/bin/torchrun", Program("bash", None))
    assert find_launchers(Program("python", launcher)) == [launcher]  # type: ignore[arg-type, comparison-overlap]


def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the clocks show from now on: `time` and `monotonic`, to be set."""
    shown = {name: getattr(time, name)() for name in ("time", "monotonic")}
    for name in shown:
        monkeypatch.setattr(time, name, lambda name=name: shown[name])
    return shown


def test_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = int((shown := clocks(monkeypatch))["time"])
    free, limited, slurm, short, over = (StopSignals() for _ in range(5))
    free.limit(0, {})
    limited.limit(1e-9, {"SLURM_JOB_END_TIME": str(now + 9999)})
    slurm.limit(1000, {"SLURM_JOB_END_TIME": str(now + 9999)})
    short.limit(0, {"SLURM_JOB_END_TIME": str(now + 100)})
    over.limit(0, {"SLURM_JOB_END_TIME": str(now - 10)})
    # An end before the start is none.
    assert [request.name for request in (free, slurm, short, over)] == [None] * 4
    shown["monotonic"] += 1
    assert limited.name == "time limit of 1e-09 minutes"
    # Two minutes before the end, or a tenth of a short job's time.
    for request, end in ((slurm, now + 9999 - 120), (short, now + 90)):
        for shown["time"], reason in ((end - 2, None), (end + 2, "the Slurm job's time is nearly over")):
            assert request.name == reason


def test_a_clock_that_is_set_does_not_change_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, signals = clocks(monkeypatch), StopSignals()
    signals.limit(60, {})
    shown["time"] += 86400
    assert signals.name is None
    shown["time"] -= 2 * 86400
    shown["monotonic"] += 3601
    assert signals.name == "time limit of 60 minutes"


def job_script(folder: Path, command: str, programs: dict[str, str], **environ: str) -> str:
    """What a command says after `launch/slurm/job.sh`, with these programs of Slurm."""
    for name, text in {"janus-ds": "", **programs}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "JANUS_HOME": str(ROOT), "TZ": "UTC", **environ}
    given |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "JANUS_VENV": str(folder / "none")}
    words = ["bash", "-c", f"source launch/slurm/job.sh && {command}", "bash", "--output", "run-%a"]
    return subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(("answer", "end"), [("2030-01-02T03:04:05", "1893553445"), ("", ""), ("N/A", "")])
def test_the_end_of_a_job_that_slurm_does_not_tell(tmp_path: Path, answer: str, end: str) -> None:
    """By `launch/slurm/job.sh`; midnight is no end."""
    programs = {"squeue": f"echo '{answer}'", "scontrol": "echo localhost"}
    assert job_script(tmp_path, 'echo "[$SLURM_JOB_END_TIME]"', programs) == f"[{end}]\n"


@pytest.mark.parametrize(
    ("ends", "state", "dead", "answer", "times", "words"),
    [
        ("exit 75", "echo RUNNING", "", "", 1, "start 1: requeued"),
        ("exit 75", "echo RUNNING", "", "exit 1", 5, "start 1: not requeued: Slurm does not do it"),
        ("exit 75", "echo COMPLETING", "", "", 0, "left to Slurm, whose squeue says: COMPLETING"),
        # The controller does not answer, at first or at all.
        ("exit 75", "[ -e late ] && echo RUNNING; touch late", "", "", 1, "start 1: requeued"),
        ("exit 75", "exit 1", "", "", 0, "start 1: not requeued: Slurm does not do it"),
        ("exit 6", "echo RUNNING", "node2 1 all* comp*", "", 1, "start 1: requeued"),
        ("exit 6", "echo RUNNING", "", "", 0, "ended with exit code 6\n"),
        ("exit 0", "echo RUNNING", "node2 1 all* comp*", "", 0, "ended with exit code 0\n"),
        # `--signal=B:USR1@180` reaches the script alone.
        (
            f"trap 'exit 75' USR1; kill -USR1 $PPID; {'/bin/sleep .1;' * 99}",
            "echo RUNNING",
            "",
            "",
            1,
            "requeued",
        ),
    ],
)
def test_one_task_of_an_array_is_requeued(
    tmp_path: Path, ends: str, state: str, dead: str, answer: str, times: int, words: str
) -> None:
    """The number of one of them, 7, is that of the array: squeue would name all, and scontrol mean all."""
    programs = {
        "squeue": f'cd {tmp_path}; case "$*" in *7_3*) {state} ;; *) echo RUNNING; echo RUNNING ;; esac',
        "scontrol": f'[ $1 = show ] && echo localhost && exit; echo "$@" >> {tmp_path}/asked; {answer}',
        "sinfo": f'case "$*" in *--Node*) echo "{dead}" ;; *) echo "all* up 0 n/a" ;; esac',
        "srun": f'echo "$@"; {ends}',
        "sleep": "",
    }
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_GPUS_ON_NODE": "2"}
    step = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_JOB_END_TIME": "9"}
    (tmp_path / "asked").touch()
    said = job_script(tmp_path, 'janus_train x "$@"', programs, **array, **step)
    assert words in said
    assert "python -u x --output run-3\n" in said
    assert "--ntasks-per-node=2 is one rank for each" in said
    assert "job 7_3, start 1: ended with exit code" in said
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n" * times


def test_a_job_without_an_environment_says_so(tmp_path: Path) -> None:
    said = job_script(tmp_path, "echo on", {}, PATH="/usr/bin:/bin")
    assert "error: janus_ds is not installed\n  where: JANUS_VENV=" in said
    assert "on\n" not in said


def test_a_rank_that_has_not_heard_why_names_another_one() -> None:
    """The ranks agree to stop before the reason has come; run.json and messages would have None."""
    signals = StopSignals()
    assert (signals.name, signals.reason) == (None, "another rank")
    signals.hear("rank 3: SIGTERM")
    assert signals.reason == "rank 3: SIGTERM"


@pytest.mark.usefixtures("handlers_put_back")
def test_only_a_rank_that_was_asked_tells_the_others() -> None:
    told: list[str] = []
    asked, heard = StopSignals(), StopSignals()
    for requests in (asked, heard):
        requests.install()
        requests.watch()
        requests.tell(told.append)
    asked.ask("SIGTERM")
    heard.hear("rank 0: SIGTERM")
    wait_until(lambda: bool(told), 600, "telling")
    time.sleep(0.1)
    assert told == ["SIGTERM"]
    assert heard.name == "rank 0: SIGTERM"


@pytest.mark.usefixtures("handlers_put_back")
def test_a_signal_to_a_forked_child_is_not_one_to_this_process() -> None:
    requests = StopSignals()
    requests.install()
    requests.watch()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # its handler, inherited, only sets a flag
        os._exit(7 if requests.name == "SIGTERM" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    time.sleep(0.5)
    assert requests.name is None
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_until(requests.asked, 600, "the request")
    assert requests.name == "SIGUSR1"
