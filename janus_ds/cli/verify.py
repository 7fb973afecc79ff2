"""`janus-ds verify DIR`: read a data directory whole and name all damage."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from janus_ds.cli.arguments import new_parser
from janus_ds.config.load import add_override_argument, load_run_config
from janus_ds.config.locations import is_remote, parse_locations, public_location
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.index import Manifest, ShardEntry, SplitIndex
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.verify import Fault, VerifyReport, verify_dataset
from janus_ds.errors import JanusError
from janus_ds.observe.progress import Progress
from janus_ds.tables import bytes_text, count_text, table


def main(arguments: Sequence[str]) -> int:
    """Print a line for each shard and every fault; 0 if the data is whole.

    Raises:
        DataError: the data is damaged (exit code 4), or is no data directory.
    """
    parser = new_parser("verify", "Read a data directory whole; name every damaged shard and member.")
    parser.add_argument("data", metavar="DIR", help="made by `janus-ds prepare`; or as data.path")
    add_override_argument(parser, "fields of a recipe that say how to fetch, such as data.cache_dir=DIR")
    parsed = parser.parse_args(arguments)
    data = load_run_config(None, parsed.overrides).data
    reports = [_verify(source.location, data) for source in parse_locations(parsed.data)]
    for name, report in reports:
        report.raise_if_faulty(name)
    return 0


def _verify(location: str, data: DataConfig) -> tuple[str, VerifyReport]:
    """Print what there is to say about one source."""
    name, directory, read = public_location(location), Path(location), None
    if is_remote(location):
        place = open_data(location, data)
        stores = {name: part.shards for name in place.manifest.splits for part in place.split(name)}
        directory, read = place.sources[0].folder, partial(_fetched, stores)
    started = time.monotonic()
    report = verify_dataset(directory, partial(_show, Progress()), read)
    seconds = max(time.monotonic() - started, 1e-6)
    print(_shard_table(directory, report.faults))
    for fault in report.faults:
        print(f"fault: {fault}")
    if not report.faults:
        speed = bytes_text(report.bytes / seconds)
        print(
            f"{name} is whole: {report.shards} shards, {count_text(report.samples)} samples, "
            f"{count_text(report.tokens)} tokens, {bytes_text(report.bytes)} at {speed}/s"
        )
    return name, report


def _fetched(stores: Mapping[str, Any], split: str, shard: ShardEntry) -> bytes:
    with os.fdopen(stores[split].open(shard), "rb") as file:
        return file.read()


def _show(line: Progress, share: float, report: VerifyReport) -> None:
    line.show(f"{share:.0%}, {report.shards} shards, {len(report.faults)} faults")
    if share >= 1:
        line.end()


def _shard_table(directory: Path, faults: list[Fault]) -> str:
    rows: list[tuple[str, ...]] = [("shard", "members", "samples", "tokens", "size", "state")]
    for split in Manifest.load(directory).splits:
        try:
            index = SplitIndex.load(directory / split)
        except JanusError:
            rows.append((f"{split}/", "", "", "", "", "no usable index"))
            continue
        for shard in index.shards:
            place = f"{split}/{shard.name}"
            found = sum(fault.place == place for fault in faults)
            state = f"{found} fault{'s' if found > 1 else ''}" if found else "whole"
            numbers = (f"{len(shard.members):,}", f"{shard.samples:,}", f"{shard.tokens:,}")
            rows.append((place, *numbers, bytes_text(shard.size), state))
    return table(rows)
