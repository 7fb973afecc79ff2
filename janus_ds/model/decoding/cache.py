"""What decoding keeps between steps: the encoded source and the content rows seen so far; and what a run says
of AR's rows and symbols.

The keys and values of the encoder states are computed once per sentence; beams, length candidates and
both streams are folded into the query axis. The cache holds each content key once (the released code
holds it twice, so that it decodes differently from how it trains) and is never reordered: a beam knows
its past by a row of `past_BKN`.

A step takes a block of T tokens for every beam, most often one. Every sentence stands at a point of its
own (`taken_B`): a place whose sentence is finished takes the next one, and of a block that was only
drafted the rows that are not accepted are dropped again.

Shape letters: B sentences, K beams, T tokens of a block, R = T x K content rows of a step (row t x K + k),
N columns of the pool (content token t of slot k is column t x K + k), S source tokens, D width, H heads,
E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ObjectiveConfig, RunConfig
from janus_ds.errors import ConfigError
from janus_ds.model.attention import KeysValues, additive_mask

ANY = -1
"""In `decode.forced_bos` and `decode.forced_eos`: nothing is forced."""
_FIRST_STEPS = 32
"""Tokens a beam that a new pool has room for."""


@dataclass(frozen=True)
class EncoderOutput:
    """An encoded batch of sources."""

    states_BSD: Tensor
    valid_BS: Tensor
    mask_B11S: Tensor | None
    """Additive mask of padding; None where nothing is padded."""
    source: tuple[KeysValues, ...]
    """Keys and values for the cross-attention of each decoder layer."""

    @property
    def sentences(self) -> int:
        """B."""
        return self.states_BSD.shape[0]

    def select(self, sentence_B: Tensor) -> EncoderOutput:
        """The memory of some sentences only, by index, in any order."""
        mask = self.mask_B11S
        return EncoderOutput(
            self.states_BSD[sentence_B],
            self.valid_BS[sentence_B],
            None if mask is None else mask[sentence_B],
            tuple((k[sentence_B], v[sentence_B]) for k, v in self.source),
        )

    def replaced(self, place_X: Tensor, other: EncoderOutput) -> EncoderOutput:
        """The memory with other sentences at some places; as wide as the longest source that is left."""
        kept_B = torch.ones(self.sentences, dtype=torch.bool, device=place_X.device)
        kept_B[place_X] = False
        length_B = torch.cat([self.valid_BS[kept_B].sum(1), other.valid_BS.sum(1)])
        width = int(length_B.max())

        def put(old: Tensor, new: Tensor, dim: int) -> Tensor:
            fitted = _fit(old, width, dim)
            fitted = fitted.clone() if fitted.data_ptr() == old.data_ptr() else fitted
            fitted[place_X] = _fit(new, width, dim)
            return fitted

        valid_BS = put(self.valid_BS, other.valid_BS, 1)
        states_BSD = put(self.states_BSD, other.states_BSD, 1)
        source = tuple(
            (put(k, other_k, 2), put(v, other_v, 2))
            for (k, v), (other_k, other_v) in zip(self.source, other.source, strict=True)
        )
        mask = None if bool(valid_BS.all()) else additive_mask(valid_BS[:, None, None], states_BSD.dtype)
        return EncoderOutput(states_BSD, valid_BS, mask, source)


@dataclass(frozen=True)
class ArStream:
    """How AR rows are made in decoding, as the model was trained (`ObjectiveConfig`).

    `ar_stream: content` has no query row; else the query that follows the content row at position t
    stands at t + `query_offset`: 1 for `ar_query_position: predicted` with `decoder_start: bos`, else 0.
    """

    two_stream: bool
    query_offset: int
    query_token: int
    """The MASK of query rows."""

    @classmethod
    def of(cls, objective: ObjectiveConfig, special: SpecialTokens) -> ArStream:
        """The rows that a resolved objective trains."""
        ahead = objective.ar_query_position == "predicted" and objective.decoder_start == "bos"
        mask = special.unk if objective.mask_symbol == "unk" else special.mask
        return cls(objective.ar_stream == "query", int(ahead), mask)


@dataclass(frozen=True)
class ArSymbols:
    """Which symbols AR begins with, ends with and never writes.

    Attributes:
        start: what the decoder is fed first.
        first: the token that every output begins with; None: none is forced.
        last: the token that an output of the greatest length ends with; None: none is forced.
        forbidden: never written, ascending.
    """

    start: int
    first: int | None
    last: int | None
    forbidden: tuple[int, ...]

    @classmethod
    def of(cls, run: RunConfig, special: SpecialTokens) -> ArSymbols:
        """As a resolved run says.

        Raises:
            ConfigError: an id beyond the vocabulary.
        """
        decode, bart = run.decode, run.objective.decoder_start == "eos_bos"
        first, last = decode.forced_bos, decode.forced_eos
        if first is None:
            first = special.bos if bart else ANY
        if decode.forbid == "specials":
            forbidden = {special.bos, special.pad, special.unk, special.mask}
        else:
            forbidden = set() if decode.forbid == "none" else {int(id_) for id_ in decode.forbid.split()}
        largest = max(first, ANY if last is None else last, *forbidden, ANY)
        if largest >= special.vocab_size:
            raise ConfigError(
                f"{largest} is no token: the vocabulary has {special.vocab_size}",
                "decode.forced_bos, decode.forced_eos, decode.forbid",
                f"give ids from 0 to {special.vocab_size - 1}",
            )
        return cls(
            start=special.eos if bart else special.bos,
            first=None if first == ANY else first,
            last=special.eos if last is None else None if last == ANY else last,
            forbidden=tuple(sorted(forbidden)),
        )

    @property
    def lead(self) -> int:
        """Tokens of an output that are forced first, and count as none of it."""
        return int(self.first is not None)

    def most_steps(self, run: RunConfig) -> int:
        """Tokens that an output has at most, with those that are forced and eos.

        Content rows stand at positions 0 .. T - 1; without bos among them, the last position is eos's.
        """
        steps = run.model.max_target_positions - (0 if run.objective.decoder_start == "eos_bos" else 1)
        longest = run.decode.max_length
        return min(steps, longest + self.lead + 1) if longest else steps


@dataclass
class KVCache:
    """State of an AR search: `JanusModel.ar_block` appends a block of content rows per beam to it."""

    memory: EncoderOutput
    stream: ArStream
    beams: int
    keys: list[Tensor]
    """For each layer (B, H, N, E); columns without a row are zeros."""
    values: list[Tensor]
    past_BKN: Tensor
    """Which columns are the past of each beam, boolean; those from taken x K on do not count."""
    taken_B: Tensor
    """Tokens that the beams of each sentence were given and have kept."""
    host_taken_B: Tensor
    """The same on the host, so that nothing is asked of the device."""
    reach: int = 0
    """No sentence has taken more tokens than this."""
    even: bool = True
    """All sentences have taken `reach` tokens."""
    _block: int = field(default=0, repr=False)

    def follow(self, parent_BK: Tensor) -> None:
        """Let beam k go on from beam parent_BK[b, k]; called between two steps."""
        index = parent_BK[:, :, None].expand_as(self.past_BKN)
        self.past_BKN = self.past_BKN.gather(1, index)

    def accept(self, kept_B: Tensor) -> None:
        """Keep the first tokens of the last block only, for each sentence its number (0 .. T), on the host.

        The rows behind them are dropped: nothing sees them any more, and the next block takes their place.
        `taken_B` is not sent to a device: who drops rows sends it along with the next block.
        """
        self.host_taken_B = self.host_taken_B - self._block + kept_B
        if self.taken_B.device.type == "cpu":
            self.taken_B = self.host_taken_B
        self._block = 0
        self._measure()

    def select(self, sentence_B: Tensor) -> KVCache:
        """The cache of some sentences only, by index (the finished ones need no more steps)."""
        chosen = replace(
            self,
            memory=self.memory.select(sentence_B),
            keys=[k[sentence_B] for k in self.keys],
            values=[v[sentence_B] for v in self.values],
            past_BKN=self.past_BKN[sentence_B],
            taken_B=self.taken_B[sentence_B],
            host_taken_B=self.host_taken_B[sentence_B.cpu()],
        )
        if not self.even:
            chosen._measure()
        return chosen

    def refill(self, place_X: Tensor, memory: EncoderOutput) -> None:
        """Let new sentences begin at some places, whose sentences are finished.

        Args:
            place_X: indices of the places.
            memory: X sources; they may be narrower than those of the cache, or wider.
        """
        self.memory = self.memory.replaced(place_X, memory)
        # What stands in their columns is hidden by `taken_B`, and marked anew as it is written over.
        self.taken_B = self.taken_B.index_fill(0, place_X, 0)
        self.host_taken_B = self.host_taken_B.index_fill(0, place_X.cpu(), 0)
        self._measure()

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; the pool doubles, so that its shapes are few."""
        wanted, columns = (self.reach + tokens) * self.beams, self.past_BKN.shape[2]
        if wanted <= columns:
            return
        more = max(2 * columns, -(-wanted // self.beams) * self.beams) - columns
        self.keys = [F.pad(k, (0, 0, 0, more)) for k in self.keys]
        self.values = [F.pad(v, (0, 0, 0, more)) for v in self.values]
        self.past_BKN = F.pad(self.past_BKN, (0, more))

    def advance(self, tokens: int) -> None:
        """Count a block that every beam was given."""
        self.taken_B, self.host_taken_B = self.taken_B + tokens, self.host_taken_B + tokens
        self.reach += tokens
        self._block = tokens

    def _measure(self) -> None:
        taken = self.host_taken_B.tolist() or [0]
        self.reach, self.even = max(taken), min(taken) == max(taken)


def _fit(x: Tensor, width: int, dim: int) -> Tensor:
    """Cut a dimension to a width, or fill it up with zeros (False)."""
    if x.shape[dim] >= width:
        return x.narrow(dim, 0, width)
    shape = list(x.shape)
    shape[dim] = width - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def new_cache(memory: EncoderOutput, stream: ArStream, beams: int, max_steps: int) -> KVCache:
    """A cache without rows for at most `max_steps` tokens a beam; its pool grows as it is filled."""
    sentences, columns = memory.sentences, beams * min(max_steps, _FIRST_STEPS)
    values = [k.new_zeros(sentences, k.shape[1], columns, k.shape[3]) for k, _ in memory.source]
    past = memory.valid_BS.new_zeros(sentences, beams, columns)
    taken = torch.zeros(sentences, dtype=torch.long)
    keys = [torch.zeros_like(v) for v in values]
    return KVCache(memory, stream, beams, keys, values, past, taken.to(past.device), taken)
