"""Batches of about equally many tokens, of samples of like length: when comes which, and who takes it.

Samples are numbered in members; `window` members in a row are a pool. Within a pool, samples of like
length form buckets, once and for all: target length first, source length second. In each epoch the
samples of a bucket are mixed and cut into groups of about `budget` tokens, and the groups of a pool come
in mixed order, pool after pool in mixed order. An update takes the next `groups` of them.

So the order is a function of (seed, epoch, lengths); every epoch has equally many groups, and the only
state is a position, as with `sample_order.SampleSchedule`. Which samples an update holds does not depend
on ranks; :func:`share_out` only splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.config.schema import MaskingConfig, RunConfig
from janus_ds.data.masking.collate import RowKinds
from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.data.masking.span_laws import expected_share
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.stream.source import Source
from janus_ds.errors import ConfigError, DataError

Ints = NDArray[np.int64]

_MOST_SOURCE_BUCKETS = 8

_GROUPS_TO_SPLIT = 4


@dataclass(frozen=True)
class SampleCosts:
    """What is known of every sample without reading it.

    Attributes:
        target_N, source_N: int64: tokens of each side with bos and eos.
        width_N: float: what a sample counts for the budget.
        rows_N: float: its share of the work: encoder and expected decoder rows.
        multiple: target lengths that are padded to the same multiple of this count as alike.
    """

    target_N: Ints
    source_N: Ints
    width_N: NDArray[Any]
    rows_N: NDArray[Any]
    multiple: int = 1


@dataclass(frozen=True)
class Group:
    """Samples of like length that are read together; all of one epoch."""

    epoch: int
    ids: Ints


def expected_rows(inner_N: Ints, ar: int, nar: bool, aux: bool, masking: MaskingConfig) -> NDArray[Any]:
    """Decoder rows of samples before their masks are drawn: 3 N + 2 M for JANUS.

    Args:
        ar: streams of AR: 0, 1 (content alone) or 2 (and queries).
        nar: whether there is the original part.
        aux: whether there are compensation and AUX rows.
        masking: resolved; gives the expected share of masked tokens.
    """
    share = expected_share(masking)
    rows_N: NDArray[Any] = ar * (inner_N + 1.0)
    return rows_N + nar * (inner_N + 2.0) + aux * 2.0 * share * inner_N


class TokenSchedule:
    """The infinite stream of groups; epoch e holds the groups [e G, (e + 1) G).

    Args:
        window: members of a pool.
        budget: what a group may cost: samples x its largest `width`.

    Raises:
        DataError: there is no sample.
        ConfigError: a sample alone is beyond the budget.
    """

    def __init__(
        self, seed: int, member_sizes: Ints, costs: SampleCosts, window: int, budget: float, groups: int
    ) -> None:
        if not len(costs.width_N):
            raise DataError(
                "the data holds no sample", "the index of the split", "prepare the data again from more text"
            )
        widest = int(np.argmax(costs.width_N))
        if costs.width_N[widest] > budget:
            raise ConfigError(
                f"sample {widest} alone counts {costs.width_N[widest]:g}, a group of a batch {budget:g}",
                "train.batch_tokens / train.batch_groups",
                "raise train.batch_tokens, lower train.batch_groups, or prepare the data with shorter lines",
            )
        self._seed = seed
        self._groups_a_step = groups
        self._buckets: list[tuple[Ints, int]] = []
        """Samples of like length, and into how many groups an epoch cuts them."""
        self._pools: list[range] = []
        """The buckets of each pool, by number."""
        self._make_pools(member_sizes, costs, window, budget)
        per_pool = [sum(count for _, count in self._buckets[p.start : p.stop]) for p in self._pools]
        self._groups_of = np.array(per_pool, dtype=np.int64)
        self.groups_per_epoch = sum(per_pool)
        self._order: tuple[int, Ints, Ints] | None = None
        self._mixed: tuple[int, int, list[Ints]] | None = None

    @property
    def smallest_step(self) -> int:
        """The fewest samples that an update can have."""
        sizes = sorted(len(ids) // count for ids, count in self._buckets for _ in range(count))
        fewer, more = sorted((self._groups_a_step, len(sizes)))
        # Where they do not divide, an update can hold the end of an epoch and the same group of the next one.
        times = -(-self._groups_a_step // len(sizes)) + (more % fewer > 0)
        return sum(sorted(sizes * times)[: self._groups_a_step])

    def groups(self, step: int) -> list[Group]:
        """The groups of an update."""
        first = step * self._groups_a_step
        return [self._group(place) for place in range(first, first + self._groups_a_step)]

    def _group(self, place: int) -> Group:
        epoch, inside = divmod(place, self.groups_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = shuffled(keys(self._seed, epoch, 0, Stream.MEMBER_ORDER), len(self._pools))
            self._order = (epoch, order, np.cumsum(self._groups_of[order]))
        _, order, ends = self._order
        number = int(np.searchsorted(ends, inside, side="right"))
        pool = int(order[number])
        if self._mixed is None or self._mixed[:2] != (epoch, pool):
            self._mixed = (epoch, pool, self._mix(epoch, pool))
        return Group(epoch, self._mixed[2][inside - int(ends[number] - self._groups_of[pool])])

    def _mix(self, epoch: int, pool: int) -> list[Ints]:
        """All groups of a pool in their order of an epoch."""
        groups: list[Ints] = []
        for number in self._pools[pool]:
            ids, count = self._buckets[number]
            order = shuffled(keys(self._seed, epoch, number, Stream.BUCKET_ORDER), len(ids))
            groups += np.array_split(ids[order], count)
        order = shuffled(keys(self._seed, epoch, pool, Stream.WINDOW_ORDER), len(groups))
        return [groups[i] for i in order]

    def _make_pools(self, member_sizes: Ints, costs: SampleCosts, window: int, budget: float) -> None:
        ends = np.append(0, np.cumsum(member_sizes))
        for start in range(0, len(member_sizes), window):
            ids = np.arange(ends[start], ends[min(start + window, len(member_sizes))])
            if len(ids):
                before = len(self._buckets)
                self._buckets += _make_buckets(ids, costs, budget)
                self._pools.append(range(before, len(self._buckets)))


def _make_buckets(ids: Ints, costs: SampleCosts, budget: float) -> list[tuple[Ints, int]]:
    """Buckets by target length, each of at least one full group, the large ones cut by source length."""
    ids = ids[np.argsort(-costs.target_N[ids], kind="stable")]
    class_N = -(-costs.target_N[ids] // costs.multiple)
    # Where the padded target length changes, a bucket may end.
    edges = [*(np.flatnonzero(np.diff(class_N)) + 1).tolist(), len(ids)]
    parts: list[Ints] = []
    start = 0
    for edge in edges:
        if edge - start >= 3 * _capacity(ids[start:edge], costs, budget):
            parts.append(ids[start:edge])
            start = edge
    if start < len(ids):
        rest = ids[start:]
        parts[-1:] = [np.concatenate([*parts[-1:], rest])]
    return [bucket for part in parts for bucket in _split_by_source(part, costs, budget)]


def _split_by_source(ids: Ints, costs: SampleCosts, budget: float) -> list[tuple[Ints, int]]:
    wanted = len(ids) // (_GROUPS_TO_SPLIT * _capacity(ids, costs, budget))
    parts = [ids]
    if wanted > 1:
        ordered = ids[np.argsort(costs.source_N[ids], kind="stable")]
        parts = np.array_split(ordered, min(wanted, _MOST_SOURCE_BUCKETS))
    return [(part, -(-len(part) // _capacity(part, costs, budget))) for part in parts]


def _capacity(ids: Ints, costs: SampleCosts, budget: float) -> int:
    """Samples that a group of these may have."""
    return max(1, int(budget // float(costs.width_N[ids].max())))


def share_out(groups: Sequence[Group], costs: SampleCosts, parts: int) -> list[tuple[Ints, Ints]]:
    """Split an update into micro-batches of like length and about equal work.

    Groups stay apart where the numbers allow it; else samples are cut by work, in order of length. Parts
    are in order of length, so that ranks that work side by side (part k * ranks + rank) have like shapes.

    Args:
        parts: how many, at most as many as there are samples.

    Returns:
        (epochs, sample ids) of each part, none empty.
    """
    epoch_N = np.concatenate([np.full(len(group.ids), group.epoch, dtype=np.int64) for group in groups])
    id_N = np.concatenate([group.ids for group in groups])
    group_N = np.repeat(np.arange(len(groups)), [len(group.ids) for group in groups])
    if parts == 1:
        return [(epoch_N, id_N)]
    width_G = np.array([costs.target_N[group.ids].max() for group in groups])
    rank_G = np.argsort(np.argsort(width_G, kind="stable"), kind="stable")
    by_group = parts % len(groups) == 0 and min(len(g.ids) for g in groups) >= parts // len(groups)
    outer_N = rank_G[group_N] if by_group or len(groups) % parts == 0 else np.zeros_like(group_N)
    order = np.lexsort((id_N, costs.source_N[id_N], costs.target_N[id_N], outer_N))
    if by_group:
        pieces = np.split(order, np.flatnonzero(np.diff(outer_N[order])) + 1)
        each = parts // len(groups)
        cut = [part for piece in pieces for part in _cut_by_work(piece, costs.rows_N[id_N[piece]], each)]
    elif len(groups) % parts == 0:
        each = len(groups) // parts
        cut = np.split(order, np.searchsorted(outer_N[order], np.arange(each, len(groups), each)))
    else:
        cut = _cut_by_work(order, costs.rows_N[id_N[order]], parts)
    return [(epoch_N[part], id_N[part]) for part in cut]


def _cut_by_work(items: Ints, work: NDArray[Any], parts: int) -> list[Ints]:
    """Runs of the items with about equal sums of work, none empty."""
    ends = np.cumsum(work)
    cuts = np.searchsorted(ends - work / 2, ends[-1] * np.arange(1, parts) / parts)
    for number in range(parts - 1):
        # At least one item in each run, before and behind the cut.
        least = int(cuts[number - 1]) + 1 if number else 1
        cuts[number] = min(max(int(cuts[number]), least), len(items) - (parts - 1 - number))
    return np.split(items, cuts)


def sample_costs(source: Source, kinds: RowKinds, config: RunConfig) -> SampleCosts:
    """Lengths of all samples, from the offsets on disk, and what they cost under the run's objective."""
    lengths = source.lengths()
    inner_N = lengths["target"]
    source_N = lengths.get("source", inner_N) + 2
    rows_N = expected_rows(inner_N, kinds.ar + kinds.ar_query, kinds.nar, kinds.aux, config.masking)
    rows_N *= config.objective.dropout_draws
    width_N = np.maximum(source_N, inner_N + 2)
    multiple = config.data.pad_multiple
    return SampleCosts(inner_N + 2, source_N, width_N.astype(np.float64), rows_N + source_N, multiple)


class TokenPlan:
    """About equally many tokens a step; a pure function of the step's number.

    Args:
        source: of the training split; several are refused with batches of tokens (`config.rules`).

    Raises:
        ConfigError: too many ranks or micro-batches for the smallest batch, or as :class:`TokenSchedule`.
    """

    def __init__(self, source: Source, kinds: RowKinds, config: RunConfig, share: RankShare) -> None:
        train, window = config.train, config.data.shuffle_window
        source.check_cache(config.data, 1)
        self.costs = sample_costs(source, kinds, config)
        budget, groups = train.batch_tokens / train.batch_groups, train.batch_groups
        self._schedule = TokenSchedule(train.seed, source.member_sizes, self.costs, window, budget, groups)
        self._share = share
        self._parts = share.size * share.accumulation
        if self._schedule.smallest_step < self._parts:
            raise ConfigError(
                f"the smallest batch has {self._schedule.smallest_step} samples, for {share.size} ranks x "
                f"{share.accumulation} micro-batches",
                f"train.batch_tokens = {train.batch_tokens}, gradient_accumulation_steps",
                "raise train.batch_tokens, or data.shuffle_window where its last members are few, or use "
                "fewer ranks or micro-batches",
            )

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        """This rank's micro-batches: (epochs, sample ids) of each, int64."""
        parts = share_out(self._schedule.groups(step), self.costs, self._parts)
        return parts[self._share.rank :: self._share.size]

    def read_ahead(self, step: int) -> None:
        """Nothing: the lengths have brought all shards."""
