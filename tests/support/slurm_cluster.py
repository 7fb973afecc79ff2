"""A real Slurm of two nodes on this machine: own key, own ports, own folder, gone without a trace.

Needs root, since slurmd starts jobs for users, and Debian's slurm-wlm and munge (or the like).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import free_port, kill_session

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")

_CONFIG = """
ClusterName=janus
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=120
MessageTimeout=100
MinJobAge=86400
SchedulerParameters=sched_interval=1,sched_min_interval=0
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=second NodeHostname={host} NodeAddr=127.0.0.2 Port={second} CPUs=2
PartitionName=all Nodes=first,second Default=YES MaxTime=INFINITE State=UP
"""
# KillWait: a busy machine may take longer than 30 s to save. MessageTimeout: and longer than 10 s to answer.
# MinJobAge: a job that has ended is forgotten after 5 minutes, by default; another one may last longer.
# cred_expire: a requeued job waits as long as an old credential holds, two minutes by default.


def missing_for_slurm() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not on the PATH: `make slurm-test INSTALL=1` installs Slurm"
    return None if os.geteuid() == 0 else "slurmd needs root"


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Args:
        folder: its state and logs.
        environment: for its commands and the jobs.
    """

    folder: Path
    environment: Mapping[str, str]

    def command(self, *words: str) -> str:
        """What a Slurm command prints.

        Raises:
            AssertionError: it failed; carries what it said.
        """
        # munged drops who has not written for 2 s, on a busy machine; without SIGPIPE the command asks again.
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=600, restore_signals=False
        )
        assert done.returncode == 0, f"{words}: {done.returncode}, {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path) -> int:
        """The number of a job that was submitted by sbatch from `cwd`."""
        return int(self.command("sbatch", "--parsable", f"--chdir={cwd}", *words))

    def state(self, job: int | str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, ..."""
        words = self.command("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int | str, *states: str, patience: float = 1500.0) -> dict[str, str]:
        """Wait until the job is in one of the states; returns what Slurm knows of it."""
        found: dict[str, str] = {}

        def reached() -> bool:
            found.update(self.state(job))
            return found["JobState"] in states

        self.wait_for(reached, f"job {job} in {states}, is {found}", patience)
        return found

    def wait_for(self, condition: Callable[[], bool], what: str, patience: float = 1500.0) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the daemons' logs and of the jobs' outputs."""
        parts = [f"--- {path.name}\n{path.read_text()[-1200:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(parts)

    def processes(self) -> list[int]:
        """All processes that were started with this cluster's configuration, jobs included."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster of nodes `first` and `second`, two CPUs each, partition `all`."""
    folder = Path(tempfile.mkdtemp(prefix="janus-slurm-"))
    cluster = Cluster(folder, {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_end_processes, cluster)
        _write_files(folder)
        munge = [f"--{name}={folder / 'munge' / file}" for name, file in _MUNGE_FILES.items()]
        for command in (
            ["munged", "--foreground", "--force", "--num-threads=1", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "first"],
            ["slurmd", "-D", "-N", "second"],
        ):
            stack.callback(kill_session, _start(command, cluster))
            if command[0] == "munged":
                cluster.wait_for((folder / "munge" / "socket").exists, "munged")
        cluster.wait_for(lambda: _idle_nodes(cluster) == 2, "two idle nodes")
        try:
            yield cluster
        finally:
            with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                cluster.command("scancel", "--signal=KILL", "--full", "--user=root")
                cluster.command("scancel", "--user=root")


_MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "seed-file": "seed",
    "log-file": "munge.log",
}


def _write_files(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "munge").mkdir()
    (folder / "state").mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = {"port": free_port(), "first": free_port(), "second": free_port()}
    (folder / "slurm.conf").write_text(_CONFIG.format(host=host, folder=folder, **ports))


def _start(command: list[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    with open(cluster.folder / "daemons.log", "ab") as log:
        return subprocess.Popen(
            command,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _idle_nodes(cluster: Cluster) -> int:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=600)
    return done.stdout.split().count("idle")


def _end_processes(cluster: Cluster) -> None:
    """Kill what the daemons left: the job steps' managers are sessions of their own."""
    for pid in cluster.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
