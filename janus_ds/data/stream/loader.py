"""The batches of one step on one rank, and their way from a worker process to the trainer."""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.data.stream.pipeline import BatchMaker, Step, left_out
from janus_ds.data.stream.sample_order import RankShare, SamplePlan, first_samples
from janus_ds.data.stream.source import Damage
from janus_ds.data.stream.token_schedule import TokenPlan
from janus_ds.errors import DataError, JanusError, ResourceError
from janus_ds.io import disk_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepData:
    """One step of one data-parallel rank."""

    step: int
    batches: list[TwoStreamBatch]
    """The micro-batches, in order."""
    damage: tuple[Damage, ...] = ()
    """Damaged members that the worker met for this step and has not reported before."""

    @property
    def counts(self) -> BatchCounts:
        """Sums over this rank's micro-batches; sum over ranks for the global counts."""
        return sum((batch.counts for batch in self.batches), BatchCounts())

    @property
    def sample_ids(self) -> Tensor:
        """int64: all samples of this rank, micro-batch by micro-batch."""
        return torch.cat([batch.sample_id_B for batch in self.batches])


def make_step_plan(maker: BatchMaker, share: RankShare) -> SamplePlan | TokenPlan:
    """Which samples a rank reads in which step, as the run's `data.batch` asks for."""
    if maker.config.data.batch == "tokens":
        plan = TokenPlan(maker.source.parts[0], maker.kinds, maker.config, share)
        maker.refuse_long(plan.costs.target_N - 2, plan.costs.source_N)
        return plan
    return SamplePlan(maker.source, maker.config, share)


VALIDATION_EPOCH = 2**31 - 1
"""Epoch number of validation masks, so that they are the same at every validation."""


@dataclass(frozen=True)
class _Failure:
    """An error that goes from a worker to the trainer as it is (DataLoader would wrap it)."""

    error: JanusError


class StepLoader:
    """Iterates the :class:`StepData` of one rank, from `start_step` up to `stop_step` (exclusive).

    Args:
        maker: of the training split; `config.data.workers` and `.prefetch_steps` say how far ahead and
            by how many processes; the batch sizes and the seed come from its config too.
        start_step: the first step; steps before it cost nothing.
        pin_memory: batches come in page-locked memory, for copies to a GPU.

    Raises:
        ConfigError: batch sizes that contradict each other; DataError: a split without samples. While
        iterating: DataError as `BatchMaker` raises it; ResourceError: a worker was killed.
    """

    def __init__(
        self, maker: BatchMaker, share: RankShare, start_step: int, stop_step: int, pin_memory: bool = False
    ) -> None:
        self._maker, self._pin = maker, pin_memory
        self.plan = make_step_plan(maker, share)
        self._range = range(start_step, stop_step)

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[StepData]:
        settings = self._maker.config.data
        workers = min(settings.workers, len(self._range))
        # Recipes are made for machines with more cores; more workers than cores do no harm.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        items = iter(
            DataLoader(
                self._maker.pipeline(self._sampled).compose(self._finished),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=settings.prefetch_steps if workers else None,
                worker_init_fn=_start_worker,
            )
        )
        shutdown = partial(_shutdown, items)
        # Before torch's and multiprocessing's own exit handlers, which wait for workers that ignore SIGTERM.
        atexit.register(shutdown)
        watch = _WorkerWatch()
        with watch.installed():
            try:
                arriving = watch.items(items) if workers else items
                for step in self._range:
                    data = _expected(step, next(arriving, None))
                    # Not by the data loader: its thread for this waits for ever for a worker that was killed.
                    yield replace(data, batches=[b.pin_memory() for b in data.batches]) if self._pin else data
            finally:
                atexit.unregister(shutdown)
                shutdown()

    def _sampled(self) -> Iterator[Step]:
        """The source stage: this worker's steps, in order, each a function of its number."""
        for step in wds.split_by_worker(self._range):
            self.plan.read_ahead(step)
            yield {"__key__": f"step {step}", "step": step, "parts": self.plan.parts(step)}

    def _finished(self, steps: Iterator[Step]) -> Iterator[StepData | _Failure]:
        """The last stage, whose items go to the trainer's process."""
        try:
            for step in steps:
                yield StepData(step["step"], step["batches"], tuple(self._maker.source.take_damage()))
        except JanusError as error:
            yield _Failure(error)


def _expected(step: int, item: StepData | _Failure | None) -> StepData:
    if isinstance(item, _Failure):
        raise item.error
    if item is None or item.step != step:
        raise left_out(f"step {step}")
    return item


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # A signal to the process group asks the trainer to stop and save; its workers must outlive that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _shutdown(items: Any) -> None:
    """End the workers now instead of when the iterator happens to be collected."""
    stop = getattr(items, "_shutdown_workers", None)
    if stop is not None:
        stop()


class _WorkerWatch:
    """Has the loss of a worker raise in the fetch that waits for it, and nowhere else.

    torch's handler of SIGCHLD raises wherever the main thread happens to be, in a save for example. Without
    any, a worker that is killed while it writes leaves a fetch that waits for the rest for ever: the pipe
    stays open, for the trainer holds its other end.
    """

    def __init__(self) -> None:
        self._waiting = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """As the process's handler; only the main thread can have one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGCHLD, lambda *_: self._look())
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)

    def _look(self) -> None:
        if self._waiting:
            _error_if_any_worker_fails()

    def items(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items; a worker that vanished becomes an error that says what to do."""
        try:
            while True:
                self._waiting = True
                # Those that vanished since the last fetch.
                self._look()
                item = next(items, None)
                self._waiting = False
                yield item
        except (RuntimeError, EOFError, OSError) as error:
            if not _is_lost_worker(error):
                raise
            raise ResourceError(
                "a data worker process was killed",
                f"data.workers of this rank: {(str(error) or repr(error)).splitlines()[0]}",
                "look for the kernel's out-of-memory message; use fewer data.workers or data.prefetch_steps",
            ) from error
        finally:
            self._waiting = False


def _is_lost_worker(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    # The pipe to a worker broke; errors from inside one come with "Caught" and its stack.
    return not str(error).startswith("Caught ")


@dataclass(frozen=True)
class ValidationBatch:
    """A batch of the validation split."""

    batch: TwoStreamBatch
    counted: bool
    """False: this rank has no sample left; run the batch (all ranks make equally many passes), but leave
    its losses and counts out."""


def validation_batches(maker: BatchMaker, share: RankShare, samples: int) -> Iterator[ValidationBatch]:
    """The first `samples` samples of a split, in order, each on one rank, with masks that never change.

    All ranks get the same number of batches.

    Raises:
        DataError: the split has no sample, or as `BatchMaker` raises it.
    """
    chosen = first_samples(maker.source.parts, samples)
    if len(chosen) < 1:
        raise DataError(
            "there is no sample to validate on",
            maker.source.name,
            "prepare the data with a larger validation part, or raise train.valid_samples",
        )
    together = share.micro_batch * share.size
    for start in range(0, len(chosen), together):
        first = start + share.rank * share.micro_batch
        ids = chosen[first : first + share.micro_batch]
        counted = len(ids) > 0
        ids = ids if counted else chosen[:1]
        epochs = np.full_like(ids, VALIDATION_EPOCH)
        yield ValidationBatch(maker.make((epochs, ids))["batches"][0], counted)


QUARANTINE_NAME = "quarantine.jsonl"


class QuarantineList:
    """RUN/quarantine.jsonl: one line for each damaged member, whichever process met it first."""

    def __init__(self, run: Path) -> None:
        self._path = run / QUARANTINE_NAME

    def add(self, found: Iterable[Damage], step: int | None = None) -> None:
        """Append what is not in the list yet; safe between processes.

        Args:
            step: the update for which they were read; None: validation.
        """
        entries = list(found)
        if not entries:
            return
        with disk_faults(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+", encoding="utf-8", errors="replace") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                known = {_place(line) for line in file}
                for entry in entries:
                    values = {**asdict(entry), "step": step}
                    if (entry.shard, entry.member) in known:
                        continue
                    known.add((entry.shard, entry.member))
                    file.write(json.dumps(values) + "\n")
                    last = entry.first_sample + entry.samples - 1
                    logger.warning(
                        "quarantined: samples %d to %d (%s, member %s): %s",
                        *(entry.first_sample, last, entry.shard, entry.member, entry.reason),
                    )


def _place(line: str) -> tuple[str, str] | None:
    """Shard and member of a line; None where it is damaged or cut short."""
    try:
        values = json.loads(line)
        return str(values["shard"]), str(values["member"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
