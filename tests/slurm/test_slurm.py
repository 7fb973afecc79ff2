"""The job scripts of launch/slurm under a real Slurm of two nodes on this machine.

`make slurm-test` runs all of it and can install Slurm (INSTALL=1); `make test` runs the short form.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from janus_ds.errors import PREEMPTED_EXIT_CODE
from janus_ds.observe import read_metrics
from tests.support.launch import ROOT
from tests.support.processes import alive, find_ranks, wait_until
from tests.support.program import figures_of
from tests.support.slurm_cluster import Cluster, missing_for_slurm, running_cluster
from tests.support.tiny_pairs import TINY_PAIR_RECIPE, prepare_tiny

pytestmark = [
    pytest.mark.skipif(missing_for_slurm() is not None, reason=str(missing_for_slurm())),
    pytest.mark.timeout(3600),
]

STEPS = 60
TINY = (f"train.max_steps={STEPS}", "train.save_every=1000", "train.valid_every=1000", "data.workers=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JANUS_VENV", sys.prefix)
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with running_cluster() as cluster:
            yield cluster
        assert cluster.processes() == []
        assert not cluster.folder.exists()


class Job:
    """A job of one of the scripts, which trains the tiny model into a folder of its own."""

    def __init__(self, cluster: Cluster, inputs: Path, name: str) -> None:
        self.cluster, self.inputs = cluster, inputs
        self.run = inputs / name
        self.output = inputs / f"{name}.log"
        self.number: int | str = 0

    def submit(self, nodes: tuple[str, ...], *options: str, settings: tuple[str, ...] = TINY) -> Job:
        recipe = ("--recipe", str(self.inputs / "recipe.yaml"), "--data", str(self.inputs / "data"))
        return self.submit_script(nodes, "pretrain", *recipe, *options, "--set", *settings)

    def submit_script(self, nodes: tuple[str, ...], kind: str, *options: str) -> Job:
        execution = ("--deepspeed_config", "ds_configs/zero2.json", "--output", str(self.run))
        script = f"launch/slurm/{kind}.sbatch"
        self.number = self.cluster.submit(
            *nodes, f"--output={self.output}", script, *execution, *options, cwd=ROOT
        )
        return self

    def reach(self, step: int) -> None:
        def reached() -> bool:
            state = self.cluster.state(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{self.text}"
            lines = read_metrics(self.run / "metrics.jsonl")
            return bool(lines) and int(lines[-1]["step"]) >= step

        self.cluster.wait_for(reached, f"step {step}")

    def end(self, *states: str) -> dict[str, str]:
        """Wait for one of the states, COMPLETED by default; returns what Slurm knows of the job."""
        found = self.cluster.wait(self.number, *(states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")))
        assert found["JobState"] in (states or ("COMPLETED",)), f"{found['JobState']}\n{self.text}"
        return found

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def figures(self) -> list[list[Any]]:
        return figures_of(self.run)


def test_a_requeued_job_ends_as_an_undisturbed_one(cluster: Cluster, inputs: Path) -> None:
    """Two tasks on two nodes, started by srun; `scontrol requeue` in the middle."""
    undisturbed = Job(cluster, inputs, "undisturbed").submit(TWO_NODES)
    requeued = Job(cluster, inputs, "requeued").submit(TWO_NODES)
    requeued.reach(4)
    cluster.command("scontrol", "requeue", str(requeued.number))
    found = requeued.end()
    undisturbed.end()
    assert found["Restarts"] == "1"
    assert "asked to stop (SIG" in requeued.text
    assert f"start 1: ended with exit code {PREEMPTED_EXIT_CODE}" in requeued.text
    assert "start 2: 2 node(s), 2 rank(s), first 127.0.0.1:" in requeued.text
    assert "start 2: ended with exit code 0" in requeued.text
    assert [line[0] for line in requeued.figures] == list(range(1, STEPS + 1))
    assert requeued.figures == undisturbed.figures


@pytest.mark.heavy
def test_the_quickstart_is_requeued_and_ends_with_the_same_losses(cluster: Cluster, inputs: Path) -> None:
    """The recipe of `make pretrain`, shortened, on two tasks of one node."""
    short = ("--set", "train.max_steps=20", "train.save_every=8", "train.valid_every=10")
    undisturbed = Job(cluster, inputs, "quickstart").submit_script(TWO_TASKS, "pretrain", *short)
    undisturbed.end()
    requeued = Job(cluster, inputs, "quickstart-requeued").submit_script(TWO_TASKS, "pretrain", *short)
    requeued.reach(5)
    cluster.command("scontrol", "requeue", str(requeued.number))
    assert requeued.end()["Restarts"] == "1"
    assert requeued.figures == undisturbed.figures
    assert requeued.figures[-1][0] == 20


@pytest.mark.heavy
def test_what_asks_a_job_to_stop_and_what_starts_it_again(cluster: Cluster, inputs: Path) -> None:
    """SIGUSR1 and the time limit requeue it, the limit of starts ends that, `scancel` is the last word."""
    undisturbed = Job(cluster, inputs, "undisturbed-2").submit(TWO_TASKS)
    warned = Job(cluster, inputs, "warned").submit(TWO_TASKS)
    warned.reach(4)
    # To the steps and not to the script, as --signal=USR1@180 does it.
    cluster.command("scancel", "--signal=USR1", str(warned.number))
    assert warned.end()["Restarts"] == "1"
    assert "asked to stop (SIGUSR1)" in warned.text
    assert "start 1: requeued" in warned.text
    undisturbed.end()
    assert warned.figures == undisturbed.figures

    once_more = ("--export=ALL,JANUS_MAX_STARTS=2", *TWO_TASKS)
    limited = Job(cluster, inputs, "limited").submit(once_more, "--time-limit", "0.001")
    found = limited.end("FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("1", f"{PREEMPTED_EXIT_CODE}:0")
    assert "asked to stop (time limit of 0.001 minutes) before the first step" in limited.text
    assert "start 2: not requeued: JANUS_MAX_STARTS=2" in limited.text

    cancelled = Job(cluster, inputs, "cancelled").submit(TWO_TASKS)
    cancelled.reach(4)
    cluster.command("scancel", str(cancelled.number))
    found = cancelled.end("CANCELLED")
    assert found["Restarts"] == "0"
    cluster.wait_for(lambda: f"exit code {PREEMPTED_EXIT_CODE}" in cancelled.text, "the ranks' last save")
    assert "requeued" not in cancelled.text


@pytest.mark.heavy
def test_one_task_of_an_array_is_requeued_alone(cluster: Cluster, inputs: Path) -> None:
    """The last one, whose number is that of the array; `%a` in the arguments is the task."""
    endless = (*TINY, "train.max_steps=1000000")
    array = Job(cluster, inputs, "task-%a").submit(("--array=0-1", "--ntasks-per-node=1"), settings=endless)
    tasks = [Job(cluster, inputs, f"task-{task}") for task in range(2)]
    for task, job in enumerate(tasks):
        job.number = f"{array.number}_{task}"
        job.reach(4)
    cluster.command("scancel", "--signal=USR1", f"{array.number}_1")
    cluster.wait_for(lambda: "resuming from step" in tasks[1].text, "the second start")
    assert f"job {array.number}_1, start 1: requeued" in tasks[1].text
    assert [cluster.state(job.number)["Restarts"] for job in tasks] == ["0", "1"]
    cluster.command("scancel", str(array.number))


@pytest.mark.heavy
def test_a_short_job_stops_before_its_time_is_over(cluster: Cluster, inputs: Path) -> None:
    """The ranks know the end of the job's time and leave in time, without any signal."""
    endless = (*TINY, "train.max_steps=1000000")
    job = Job(cluster, inputs, "short").submit(("--time=2", "--signal=URG@1", *TWO_TASKS), settings=endless)
    cluster.wait_for(lambda: "start 1: requeued" in job.text, "the end of the job's time")
    assert "asked to stop (the Slurm job's time is nearly over)" in job.text
    cluster.command("scancel", str(job.number))


@pytest.mark.heavy
def test_a_dead_rank_ends_the_job_and_is_named(cluster: Cluster, inputs: Path) -> None:
    job = Job(cluster, inputs, "lost").submit(TWO_NODES, settings=(*TINY, "train.max_steps=1000000"))
    job.reach(4)
    victim = find_ranks(job.run)[1]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not find_ranks(job.run), 600, "the end of the other rank")
    job.end("FAILED")
    assert "error: another rank was lost" in job.text
    assert f"where: rank 1 on {socket.gethostname()} (process {victim})" in job.text
    assert alive(job.run) == []


@pytest.mark.heavy
def test_evaluation_and_pairs(cluster: Cluster, inputs: Path) -> None:
    """eval.sbatch decodes with the run of another job; finetune.sbatch trains on pairs."""
    prepare_tiny(inputs / "pairs")
    (inputs / "pairs.yaml").write_text(TINY_PAIR_RECIPE)
    trained = Job(cluster, inputs, "pairs-run")
    recipe = ("--recipe", str(inputs / "pairs.yaml"), "--data", str(inputs / "pairs" / "data"))
    trained.submit_script(TWO_TASKS, "finetune", *recipe, "--set", "train.max_steps=4").end()
    source, target = inputs / "sources.txt", inputs / "outputs.txt"
    source.write_text("the old man saw the river .\n")
    words = ["--checkpoint", str(trained.run), "--input", str(source), "--output", str(target)]
    output = f"--output={inputs / 'eval.log'}"
    job = cluster.submit(output, "launch/slurm/eval.sbatch", "eval/decode.py", *words, cwd=ROOT)
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert len(target.read_text().splitlines()) == 1
    empty = cluster.submit(output, "launch/slurm/eval.sbatch", cwd=ROOT)
    assert cluster.wait(empty, "COMPLETED", "FAILED")["ExitCode"] == "2:0"
    assert "no program is given" in (inputs / "eval.log").read_text()
