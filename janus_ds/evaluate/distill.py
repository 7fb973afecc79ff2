"""Distillation data: the training set's sources with an AR model's translations as targets (section 4.2).

NAR models learn more easily from one translation of a kind than from many. A data directory of pairs gives
another one: the same tokenizer, validation and test sets, the same training sources in the same order.
Sources are decoded longest first, portion by portion; each portion is on disk whole before the next
begins, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from janus_ds.batch import Ragged
from janus_ds.config.modes import trained_modes, with_decode
from janus_ds.config.schema import DecodeConfig
from janus_ds.data.prepare.pair_files import prepared_request, side_limit
from janus_ds.data.prepare.writing import PrepareReport, SplitWriter, finished_manifest
from janus_ds.data.stream.index import Manifest, SplitIndex
from janus_ds.data.stream.shards import ShardFormat
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.text.tokenizer import plain_ids
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, prepare_for_inference
from janus_ds.errors import CheckpointError, DataError
from janus_ds.evaluate.evaluation import load_mean
from janus_ds.io import (
    disk_faults,
    folder_lock,
    make_folder,
    replaceable_folder,
    sha256_of_file,
    write_atomic,
)

_TRAIN = "train"
_STREAMS = ("source", "target")
_PACKING = ("samples_per_member", "members_per_shard")
_BLOCK_PAIRS = 8192

Show = Callable[[int, int], None]
"""Called with the numbers of finished pairs and of all."""


@dataclass(frozen=True)
class DistillRequest:
    """What is to be distilled.

    Attributes:
        checkpoint: an AR run, or one of its checkpoints, with the data's tokenizer.
        average: mean of the run's last N checkpoints; 1: the newest, or the one named.
        decode: fields of `DecodeConfig` that replace the run's own, such as beam.
        device: where to decode; changes nothing but rounding.
        portion: pairs decoded between two writes.
    """

    data: Path
    checkpoint: Path
    output: Path
    average: int = 1
    decode: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    portion: int = 2048


def distill(request: DistillRequest, show: Show | None = None) -> PrepareReport:
    """Make the data directory; it appears whole or not at all, and at once where it is there already.

    Raises:
        DataError: the data holds no pairs, the output folder holds something else or cannot be replaced,
            or an interrupted distillation of another kind waits beside it.
        CheckpointError: no or damaged checkpoint, one that was not trained to decode AR, or one of
            another vocabulary.
        ConfigError: a decoding option that cannot be.
        BusyError: another process makes the same.
        ResourceError: full disk or missing permission.
    """
    manifest = Manifest.load(request.data)
    if manifest.task != "pair" or _TRAIN not in manifest.splits:
        raise DataError(
            "the data directory holds no training pairs",
            str(request.data),
            "give a directory made by `janus-ds prepare --task nmt --train ...`",
        )
    run, weights = load_mean(request.checkpoint, request.average, request.device)
    _check_run(run, manifest, request)
    asked = _asked(request, run, manifest, weights)
    finished = finished_manifest(request.output, asked)
    if finished is not None:
        shutil.rmtree(_work(request.output), ignore_errors=True)  # left if the last act was interrupted
        return PrepareReport(request.output, finished, already_whole=True)
    output = replaceable_folder(request.output)
    # Of portions of another size none fits.
    odd = {} if request.portion == DistillRequest.portion else {"portion": request.portion}
    with _opened_work(output, asked | odd) as work:
        targets = _Targets(run, request, work / "portions").translate(show or (lambda done, total: None))
        whole = work / "data"
        made = _write(request.data, whole, manifest, targets, asked)
        with disk_faults(output):
            if output.exists():
                output.rmdir()
            whole.rename(output)
        shutil.rmtree(work, ignore_errors=True)
    # On NFS a file that is open, as the lock was, stays in its folder under another name.
    with suppress(OSError):
        work.rmdir()
    return PrepareReport(request.output, made)


def _check_run(run: LoadedRun, manifest: Manifest, request: DistillRequest) -> None:
    if "ar" not in trained_modes(run.config.objective):
        raise CheckpointError(
            "the checkpoint was not trained to decode autoregressively, which distillation needs",
            f"{run.folder}: objective.preset {run.config.objective.preset}, objective.weight_ar 0",
            "give a run of objective.preset ar, or of a joint objective",
        )
    own = getattr(run.text, "fingerprint", None)
    if own != manifest.tokenizer_fingerprint:
        raise CheckpointError(
            "the checkpoint is from another vocabulary than the data",
            f"{run.folder}: tokenizer {str(own)[:12]}, {request.data}: {manifest.tokenizer_fingerprint[:12]}",
            f"prepare the data with --tokenizer {run.folder / 'tokenizer'}, or give a run trained on it",
        )


def _asked(
    request: DistillRequest, run: LoadedRun, manifest: Manifest, weights: Sequence[Path]
) -> dict[str, Any]:
    """What decides the result, as JSON and without paths."""
    decode = with_decode(run.config, {**request.decode, "mode": "ar"}).decode
    names = ["beam", "beam_stop", "early_stopping", "length_penalty", "max_length"]
    # Rules that came later are named where they are used, so that older data stay what they are.
    rules = ["min_length", "no_repeat_ngram_size", "repetition_penalty", "forced_bos", "forced_eos", "forbid"]
    rules += ["prefix", *["temperature", "top_k", "top_p", "seed"] * bool(decode.temperature)]
    names += [name for name in rules if getattr(decode, name) != getattr(DecodeConfig, name)]
    return {
        "distilled": {
            "from_train_index": manifest.splits[_TRAIN].index_sha256,
            "run": run.config.name,
            "checkpoints": [path.parent.name for path in weights],
            "weights_sha256": [sha256_of_file(path) for path in weights],
            "decode": {name: getattr(decode, name) for name in names},
        },
        "prepared": prepared_request(manifest.settings),
    }


def _work(output: Path) -> Path:
    output = Path(os.path.realpath(output))
    return output.parent / f".{output.name}.distilling"


@contextmanager
def _opened_work(output: Path, asked: dict[str, Any]) -> Iterator[Path]:
    """The folder where portions wait, new or of the same request, with no other process in it."""
    work = _work(output)
    note = work / "request.json"
    text = json.dumps(asked, sort_keys=True)
    make_folder(work / "portions")
    with ExitStack() as lock:
        with disk_faults(work):
            lock.enter_context(folder_lock(work, 0.0))
        if note.is_file() and note.read_text(encoding="utf-8") != text:
            raise DataError(
                "an interrupted distillation with another model, other data or other options waits here",
                str(work),
                "repeat its command, choose another output folder, or delete this one",
            )
        shutil.rmtree(work / "data", ignore_errors=True)
        write_atomic(note, text.encode())
        yield work


class _Targets:
    """Translations of the training sources, portion by portion."""

    def __init__(self, run: LoadedRun, request: DistillRequest, folder: Path) -> None:
        config = with_decode(run.config, {**request.decode, "mode": "ar"})
        self._generator = Generator(prepare_for_inference(run.model), run.text, config)
        self._special = run.special
        self._longest = run.config.model.max_source_positions - 2
        self._source = SampleSource(request.data / _TRAIN)
        self._portion = request.portion
        self._folder = folder
        self._dtype = np.dtype(self._source.parts[0].index.stream_dtype)

    def translate(self, show: Show) -> Ragged:
        """One target for each training pair, in the data's order; empty where the model can make none."""
        length = self._source.parts[0].lengths()["source"]
        order = np.argsort(-length, kind="stable")
        parts = []
        for number, start in enumerate(range(0, len(order), self._portion)):
            path = self._folder / f"{number:06d}.json"
            show(start, len(order))
            if not path.is_file():
                ids, told = order[start : start + self._portion], partial(_shifted, show, start, len(order))
                write_atomic(path, json.dumps(self._decode(ids, told, start)).encode())
            parts.append(Ragged.from_rows(json.loads(path.read_bytes()), self._dtype))
        show(len(order), len(order))
        return Ragged.concatenate(parts).take(np.argsort(order, kind="stable"))

    def _decode(self, ids: NDArray[np.int64], show: Show, first: int) -> list[list[int]]:
        sources = [row.tolist() for row in self._source.read(ids)["source"].rows()]
        able = [i for i, row in enumerate(sources) if len(row) <= self._longest]
        found = self._generator.generate_ids([sources[i] for i in able], show, first)
        outputs: list[list[int]] = [[] for _ in sources]
        for i, candidates in zip(able, found, strict=True):
            # Where nothing is forbidden (`decode.forbid`), a model can write symbols that no sample may hold.
            outputs[i] = plain_ids(candidates[0].tokens, self._special)
        return outputs


def _shifted(show: Show, start: int, total: int, done: int, of: int) -> None:
    """Progress within a portion, told as progress of the whole."""
    show(start + done, total)


def _write(data: Path, whole: Path, manifest: Manifest, targets: Ragged, asked: dict[str, Any]) -> Manifest:
    """The new directory: everything but the training targets is the old one's."""
    with disk_faults(whole):
        whole.mkdir(parents=True)
        for part in data.iterdir():
            if part.is_dir() and part.name != _TRAIN:
                shutil.copytree(part, whole / part.name)
    counts = Counter(dict.fromkeys(("distilled", "given_target_kept", "equal_to_the_given_target"), 0))
    index = SplitIndex.load(data / _TRAIN)
    settings = prepared_request(manifest.settings).get("settings", {})
    longest = side_limit(manifest.settings, "target") or int(settings.get("max_tokens", 0))
    sizes = {name: settings[name] for name in _PACKING if name in settings}
    writer = SplitWriter(whole / _TRAIN, ShardFormat(index.stream_dtype, **sizes))
    for source, target, found in _blocks(data, targets):
        writer.add({"source": source, "target": _chosen(target, found, longest, counts)})
    totals = writer.finish(_STREAMS)
    told = {**manifest.settings, "request": asked, "distilled": asked["distilled"]}
    told["counts"] = {**manifest.settings.get("counts", {}), _TRAIN: dict(counts)}
    made = replace(manifest, settings=told, splits={**manifest.splits, _TRAIN: totals})
    made.save(whole)
    return made


def _blocks(data: Path, targets: Ragged) -> Iterator[tuple[Ragged, Ragged, Ragged]]:
    """Sources, given targets and found ones, some thousands at a time."""
    source = SampleSource(data / _TRAIN)
    for start in range(0, source.samples, _BLOCK_PAIRS):
        end = min(start + _BLOCK_PAIRS, source.samples)
        samples = source.read(np.arange(start, end))
        yield samples["source"], samples["target"], targets.slice(start, end)


def _chosen(given: Ragged, found: Ragged, longest: int, counts: Counter[str]) -> Ragged:
    """The model's translations; the given target where there is none, or one longer than data may be."""
    rows = []
    for i in range(len(given)):
        old, new = given.row(i), found.row(i)
        fits = 0 < len(new) <= (longest or len(new))
        rows.append(new if fits else old)
        counts["lines"] += 1
        counts["distilled" if fits else "given_target_kept"] += 1
        counts["equal_to_the_given_target"] += int(fits and np.array_equal(old, new))
        counts["given_target_tokens"] += len(old)
        counts["target_tokens"] += len(rows[-1])
    return Ragged.from_rows(rows, np.dtype(given.values.dtype))
