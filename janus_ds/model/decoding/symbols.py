"""Which symbols AR begins with, ends with and never writes, of a run."""

from __future__ import annotations

from dataclasses import dataclass

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

ANY = -1
"""In `decode.forced_bos` and `decode.forced_eos`: nothing is forced."""


@dataclass(frozen=True)
class ArSymbols:
    """Symbols of a search.

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
