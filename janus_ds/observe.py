"""What a run writes of itself: `run.json`, and its figures, with exactly one value a step.

`run.json` says what a run is, how and where it was started, and what decoding needs beside the weights.
Figures go to `metrics.jsonl`, TensorBoard and, if asked, wandb.

A killed run has written lines and events of steps that its checkpoint does not know; the resumed
run will write them again. Opening the writers at step s therefore cuts both back to the steps up to
s. TensorBoard's own `purge_step` only hides such events from some readers; here they are gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import secrets
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from janus_ds import __version__
from janus_ds.batch import SpecialTokens
from janus_ds.config.load import to_dict
from janus_ds.config.locations import public_location
from janus_ds.config.schema import RUN_FILE, RUN_FORMAT_VERSION, RunConfig
from janus_ds.errors import ResourceError
from janus_ds.io import disk_faults, read_json, write_atomic

_HEADER = struct.Struct("<QI")
"""Length of a record, and the length's checksum."""
_LENGTH_BYTES = 8
_FOOTER = struct.Struct("<I")
"""The record's checksum."""

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one line and one TensorBoard event a step. For rank 0 only.

    Args:
        run: the run folder; writes `metrics.jsonl` and `tensorboard/`.
        step: the step the run continues after; later values are removed. 0 starts anew.
    """

    def __init__(self, run: Path, step: int, monitor: str = "none") -> None:
        from torch.utils.tensorboard.writer import FileWriter

        with disk_faults(run):
            run.mkdir(parents=True, exist_ok=True)
            truncate_metrics(run / "metrics.jsonl", step)
            truncate_events(run / "tensorboard", step)
            self._lines = (run / "metrics.jsonl").open("a", encoding="utf-8")
            self._events = FileWriter(str(run / "tensorboard"), flush_secs=5)
        self._monitor = _Wandb(run, step) if monitor == "wandb" else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of a step. Numbers also go to TensorBoard; what is not finite is null."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        clean = {key: _finite(value) for key, value in values.items()}
        numbers = {k: v for k, v in clean.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        scalars = [Summary.Value(tag=key, simple_value=float(value)) for key, value in numbers.items()]
        with _disk_errors(self._lines.name):
            self._lines.write(json.dumps({"step": step, **clean}) + "\n")
            self._lines.flush()
            self._events.add_summary(Summary(value=scalars), global_step=step)
        if self._monitor:
            self._monitor.write(step, numbers)

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Write markdown text, such as decoded samples, to TensorBoard."""
        from torch.utils.tensorboard.summary import text as text_summary

        summary = text_summary(tag, text)  # type: ignore[no-untyped-call]
        with _disk_errors(self._lines.name):
            self._events.add_summary(summary, global_step=step)

    def flush(self) -> None:
        """Bring everything to the files. Called before a checkpoint, which must not know more than they."""
        with _disk_errors(self._lines.name):
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._events.flush()

    def close(self) -> None:
        """End. What matters has been flushed with the last checkpoint, so a full disk is no fault here."""
        for file in (self._lines, self._events):
            with contextlib.suppress(OSError):
                file.close()
        if self._monitor:
            self._monitor.close()


class _Wandb:
    """A run's numbers at Weights & Biases. What goes wrong there is told once, and training goes on.

    A resumed run goes on under its number; steps that it repeats are left out there, with the same figures.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._run: Any = None
        with self._faults():
            import wandb

            note = run / "wandb" / "id"
            number = note.read_text() if step and note.is_file() else secrets.token_hex(8)
            note.parent.mkdir(exist_ok=True)
            write_atomic(note, number.encode())
            # The figures alone: no output, no code, and no command line, in which a password could stand.
            off = (
                "disable_git",
                "disable_code",
                "x_disable_stats",
                "x_disable_meta",
                "x_disable_machine_info",
            )
            own: dict[str, Any] = dict.fromkeys(off, True)
            own |= {"console": "off", "silent": True, "x_save_requirements": False}
            project = os.environ.get("WANDB_PROJECT", "janus_ds")
            self._run = wandb.init(
                project=project,
                name=run.name,
                id=number,
                resume="allow",
                dir=run,
                settings=wandb.Settings(**own),
            )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step."""
        with self._faults():
            if self._run:
                self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Hand over what is left."""
        with self._faults():
            if self._run:
                self._run.finish()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("wandb gets no figures from now on (%s); metrics.jsonl has them all", reason)


@contextlib.contextmanager
def _disk_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the run's figures cannot be written ({error.strerror or error})",
            place,
            "free disk space or mend the permissions, and start the same command again: "
            "it resumes from the last whole checkpoint",
        ).of_this_rank() from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line that is damaged, or cut short by a kill, is left out."""
    if not path.is_file():
        return []
    return [line for raw in path.read_bytes().splitlines() if (line := _parsed(raw)) is not None]


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line of figures; None where it is none."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 1 << 62
    return line if is_line else None


def set_aside(path: Path, lost: str) -> None:
    """Rename a damaged file of the run's history, with a warning: it must not keep a run from going on."""
    # TensorBoard reads whatever has this word in its name.
    name = path.name.replace("tfevents", "records")
    taken = len(list(path.parent.glob(f"damaged-*.{name}")))
    aside = path.with_name(f"damaged-{taken + 1}.{name}")
    path.rename(aside)
    logger.warning("%s is damaged and was set aside as %s: %s", path, aside.name, lost)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`."""
    if not path.is_file():
        return
    raw = path.read_bytes()
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    # The last line may have been cut short by a kill.
    if any(_parsed(line) is None for line in raw.split(b"\n")[:-1]):
        set_aside(path, "its other lines are kept")
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def truncate_events(folder: Path, step: int) -> None:
    """Cut each event file before its first event of a later step, or at a record cut short.

    Steps grow within a file, so a prefix is all that is kept; a file that begins later goes.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        end, damaged = _end_of_prefix(path, step)
        kept = path.read_bytes()[:end]
        if damaged:
            set_aside(path, "what comes before the damage is kept")
            if end:
                write_atomic(path, kept)
        elif end == 0:
            path.unlink()
        elif end < path.stat().st_size:
            os.truncate(path, end)


def _end_of_prefix(path: Path, step: int) -> tuple[int, bool]:
    """Bytes of the records whose step is at most `step`, and whether it ends at damage.

    The first is 0 if no record has a value. Checksums are compared for each record's length, and for
    the record at which the prefix ends: it might be the step that is damaged.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    data, end, values, damaged = path.read_bytes(), 0, 0, False
    while end + _HEADER.size <= len(data):
        length, header_sum = _HEADER.unpack_from(data, end)
        damaged = masked_crc32c(data[end : end + _LENGTH_BYTES]) != header_sum
        following = end + _HEADER.size + length + _FOOTER.size
        if damaged or following > len(data):
            break
        content = data[end + _HEADER.size : following - _FOOTER.size]
        try:
            event = Event.FromString(content)
        except DecodeError:
            damaged = True
            break
        if event.step > step:
            damaged = masked_crc32c(content) != _FOOTER.unpack_from(data, following - _FOOTER.size)[0]
            break
        values += event.HasField("summary")
        end = following
    return (end if values else 0), damaged


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def installed_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages, or of "python"; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = platform.python_version() if package == "python" else version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


_COMPUTING = ("python", "torch", "deepspeed", "megatron-core", "numpy")
_PACKAGES = (*_COMPUTING, "webdataset", "sentencepiece", "tensorboard")


def write_run_record(
    run: Path,
    config: RunConfig,
    special: SpecialTokens,
    tokenizer_fingerprint: str,
    execution: dict[str, Any],
    step: int,
) -> None:
    """Write `run.json`, keeping the record of earlier attempts; secrets of addresses are left out.

    Args:
        tokenizer_fingerprint: of the run's tokenizer, so that decoding notices another.
        execution: how it is executed (DeepSpeed configuration, ranks), as plain values.
        step: where this start begins.
    """
    # `janus-ds COMMAND` stands there as one word, since the command's own help begins with it.
    program = sys.argv[0].split() if sys.argv[0].startswith("janus-ds ") else sys.argv[:1]
    command = [public_location(word) for word in (*program, *sys.argv[1:])]
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    started = {"time": now, "command": command, "step": step, "ended": None}
    earlier = _earlier_attempts(run)
    if earlier and _is_open(earlier[-1]):
        logger.warning("the start before was killed or failed; this one goes on from step %d", step)
    record = {
        "format_version": RUN_FORMAT_VERSION,
        "name": config.name,
        "versions": {"janus_ds": __version__, **installed_versions(_PACKAGES)},
        "command": command,
        "git_commit": _git_commit(),
        "hardware": _hardware(),
        "recipe": to_dict(config),
        "model": asdict(config.model),
        "special_tokens": asdict(special),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "execution": execution,
        "attempts": [*earlier, started],
    }
    write_atomic(run / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())


def note_end(run: Path, ended: str) -> None:
    """Say in `run.json` how the last start has ended; of one that was killed it goes on to say nothing."""
    record = read_run_record(run)
    attempts = None if record is None else record.get("attempts")
    if isinstance(attempts, list) and attempts and _is_open(attempts[-1]):
        attempts[-1]["ended"] = ended
        try:
            write_atomic(run / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())
        except ResourceError as error:
            # All is saved: a run that wants to be started again must not end as one that has failed.
            logger.warning("%s does not say how this start has ended: %s", run / RUN_FILE, error.what)


def _is_open(attempt: Any) -> bool:
    """Whether a start has not said how it ended; those of earlier versions never say it."""
    return isinstance(attempt, dict) and attempt.get("ended", "") is None


def read_run_record(run: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none that can be read."""
    try:
        return read_json(run / RUN_FILE)
    except (OSError, ValueError):
        return None


def _earlier_attempts(run: Path) -> list[Any]:
    """What the record of a run says of its earlier starts; a damaged one is set aside with a warning."""
    record = read_run_record(run)
    attempts = [] if record is None else record.get("attempts", [])
    if isinstance(attempts, list) and (record is not None or not (run / RUN_FILE).exists()):
        return attempts
    set_aside(run / RUN_FILE, "the record of this run's earlier starts is lost")
    return []


def _git_commit() -> str | None:
    """The commit of the source tree this package lies in; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"host": platform.node(), "machine": processor_title(), "cpus": os.cpu_count(), "gpus": gpus}


def processor_title() -> str:
    """The CPU and its widest vectors, as "AMD EPYC, AVX2": what measured times belong to."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, "") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
