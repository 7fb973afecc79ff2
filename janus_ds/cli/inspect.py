"""`janus-ds inspect DIR --sample N`, a sample as the model sees it, and `janus-ds verify DIR`: all damage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from janus_ds.batch import TwoStreamBatch
from janus_ds.cli.arguments import add_override_argument, add_recipe_arguments, at_least, new_parser
from janus_ds.config.fields import FaultList
from janus_ds.config.load import load_run_config, read_run_config
from janus_ds.config.locations import is_remote, parse_locations, public_location
from janus_ds.config.schema import DataConfig
from janus_ds.data.masking.views import Views
from janus_ds.data.stream.index import Manifest, ShardEntry, SplitIndex
from janus_ds.data.stream.loader import VALIDATION_EPOCH
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.verify import Fault, VerifyReport, verify_dataset
from janus_ds.data.text.tokenizer import Tokenizer
from janus_ds.errors import JanusError, UsageError
from janus_ds.progress import Progress, bytes_text, count_text, table
from janus_ds.stream_mask import Segment


def main(arguments: Sequence[str]) -> int:
    """Print tokens, both masked views and the rows of one sample."""
    parser = new_parser("inspect", "A sample as the model sees it: tokens, masked views, who sees whom.")
    add = parser.add_argument
    add("data", metavar="DIR", help="made by `janus-ds prepare`; or as data.path")
    add("--sample", type=int, required=True, metavar="N", help="number of the sample")
    add("--split", default="train", help="train, valid or test (default: train)")
    masks = "masks differ from epoch to epoch (default: 0; of other splits than train, that of validations)"
    add("--epoch", type=at_least(0), help=masks)
    add("--positions", type=at_least(1), default=10, help="tokens in the picture (default: 10)")
    add_recipe_arguments(parser)
    parsed = parser.parse_args(arguments)
    # What the data is decides over the faults of recipe and overrides: they are told below.
    fetching = read_run_config(parsed.recipe, parsed.overrides, FaultList(), parsed.mode).data
    place = open_data(parsed.data, fetching)
    overrides = [f"data.task={place.manifest.task}", f"data.path={parsed.data}"]
    run = load_run_config(parsed.recipe, [*overrides, *parsed.overrides], parsed.mode)
    maker = BatchMaker(place.split(parsed.split), run, place.tokenizer.special)
    if not maker.source.has(parsed.sample):
        last = int(maker.source.samples) - 1
        mixed = len(maker.source.parts) > 1
        raise UsageError(
            f"there is no sample {parsed.sample}",
            maker.source.name,
            "give SOURCE x 2^40 + the number in that source" if mixed else f"give a number from 0 to {last}",
        )
    epoch = parsed.epoch
    if epoch is None:
        epoch = 0 if parsed.split == "train" else VALIDATION_EPOCH
    made = maker.make((np.array([epoch]), np.array([parsed.sample])))
    views, batch = made["views"], made["batches"][0]
    picture = picture_of(batch, parsed.positions)
    piece = _pieces_of(place.tokenizer)
    print(f"sample {parsed.sample} of {parsed.split}, epoch {epoch}, seed {run.train.seed}")
    print(f"from {maker.source.origin(parsed.sample)}")
    print(f"objective {run.objective.preset}, masking {run.masking.target}\n")
    print(_describe_views(views, piece))
    print(f"\nrows up to position {parsed.positions - 1}, of {batch.layout.rows} in all\n")
    print(picture.text(piece))
    return 0


def _pieces_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """How tokens are written."""
    special = tokenizer.special
    named = {special.bos: "<s>", special.pad: "<pad>", special.eos: "</s>", special.unk: "<unk>"}
    named[special.mask] = "<mask>"

    @cache
    def piece(token: int) -> str:
        # Space and control characters would break the columns.
        text = named.get(token) or tokenizer.decode([token]).strip()
        return text if text.isprintable() and text else f"#{token}"

    return piece


def _describe_views(views: Views, piece: Callable[[int], str]) -> str:
    """What the encoder gets, and the target with its masked tokens in brackets."""
    source, target = views.source.row(0).tolist(), views.target.row(0).tolist()
    shown = [f"[{piece(t)}]" if m else piece(t) for t, m in zip(target, views.masked, strict=True)]
    lines = [
        f"source, {len(source)} tokens:",
        "  " + " ".join(map(piece, source)),
        f"target, {len(target)} tokens, {int(views.masked.sum())} of them masked (in brackets):",
        "  " + " ".join(shown),
        "position, token and piece of the target:",
        *(f"{p:>5} {t:>7}  {word}" for p, (t, word) in enumerate(zip(target, shown, strict=True))),
    ]
    return "\n".join(lines)


_NAMES = {
    Segment.ARC: "AR content",
    Segment.VIS: "visible",
    Segment.CMP: "compensation",
    Segment.MSK: "MASK",
    Segment.ARQ: "AR query",
    Segment.QRY: "AUX query",
}


@dataclass(frozen=True)
class RowPicture:
    """The rows of one sample up to a position, and which content rows each of them sees."""

    segment_R: list[Segment]
    position_R: list[int]
    token_R: list[int]
    predicts_R: list[int | None]
    """The token that a row predicts; None for rows that only give keys and values."""
    seen_RC: NDArray[np.bool_]

    def text(self, piece: Callable[[int], str]) -> str:
        """The picture in characters: `#` where a row sees a content row."""
        columns = self.seen_RC.shape[1]
        widths = [(segment, len(list(rows))) for segment, rows in groupby(self.segment_R[:columns])]
        ends = list(accumulate(width for _, width in widths))

        def spread(cells: str) -> str:
            """A character a column, a gap before each segment."""
            return " ".join(cells[first:last] for first, last in pairwise([0, *ends]))

        # A name runs on to where the next segment begins.
        names = "".join(segment.name.ljust(width + 1)[: width + 1] for segment, width in widths[:-1])
        names += "".join(segment.name for segment, _ in widths[-1:])
        digits = "".join(str(position % 10) for position in self.position_R[:columns])
        lines = [f"{'':<40}{names}", f"{'row, position, token':<40}{spread(digits)}"]
        for row, segment in enumerate(self.segment_R):
            if row and segment != self.segment_R[row - 1]:
                lines.append("")
            label = f"{segment.name} {self.position_R[row]:>3} {piece(self.token_R[row]):<12.12}"
            goal = self.predicts_R[row]
            label += "" if goal is None else f" -> {piece(goal):<12.12}"
            lines.append(f"{label:<40}{spread(''.join('.#'[int(seen)] for seen in self.seen_RC[row]))}")
        legend = ", ".join(f"{s.name} {_NAMES[s]}" for s in dict.fromkeys(self.segment_R))
        return "\n".join([*(line.rstrip() for line in lines), "", f"# sees, . does not; {legend}"])


def picture_of(batch: TwoStreamBatch, positions: int) -> RowPicture:
    """The picture of a batch of one sample, cut to the tokens at the first positions."""
    layout = batch.layout
    segment_R, place_R = layout.segment_and_rank()
    length_R = torch.stack([batch.row_length_B(segment)[0] for segment in Segment])[segment_R]
    shown_R = (place_R < length_R) & (batch.row_position_BR[0] < positions)
    rows = torch.nonzero(shown_R).flatten()
    content = rows[rows < layout.content_rows]
    chosen = rows.tolist()
    return RowPicture(
        segment_R=[Segment(int(segment_R[row])) for row in chosen],
        position_R=batch.row_position_BR[0, rows].tolist(),
        token_R=batch.row_token_BR[0, rows].tolist(),
        predicts_R=[_goal(batch, Segment(int(segment_R[row])), int(place_R[row])) for row in chosen],
        seen_RC=layout.visible(rows, content).numpy(),
    )


def _goal(batch: TwoStreamBatch, segment: Segment, place: int) -> int | None:
    if segment in (Segment.MSK, Segment.QRY):
        return int(batch.masked_target_BM[0, place])
    predicts = Segment.ARQ if batch.layout.arq else Segment.ARC
    return int(batch.ar_target_BA[0, place]) if segment == predicts else None


def verify(arguments: Sequence[str]) -> int:
    """Print a line for each shard and every fault; 0 if the data is whole."""
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
    name, directory, line = public_location(location), Path(location), Progress()
    read: Callable[[str, ShardEntry], bytes] | None = None
    if is_remote(location):
        place = open_data(location, data)
        stores: dict[str, Any] = {n: part.shards for n in place.manifest.splits for part in place.split(n)}
        directory = place.sources[0].folder

        def fetched(split: str, shard: ShardEntry) -> bytes:
            with os.fdopen(stores[split].open(shard), "rb") as file:
                return file.read()

        read = fetched

    def show(share: float, report: VerifyReport) -> None:
        line.show(f"{share:.0%}, {report.shards} shards, {len(report.faults)} faults")
        if share >= 1:
            line.end()

    started = time.monotonic()
    report = verify_dataset(directory, show, read)
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
