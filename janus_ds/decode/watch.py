"""The passes of a search, told as they happen: what the page of `janus-ds demo` shows.

    with watched(show) as watch:
        generator.generate("Guten Morgen!")

Searches look for a watch when they begin; without one, a pass costs nothing more. Made for one sentence.

Shape letters: B sentences, K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """The best candidate of a sentence after one pass of the decoder, without bos and eos."""

    tokens: tuple[int, ...]
    sureness: tuple[float, ...]
    """Probability of each token when it was chosen; 1 where it was given."""
    new: tuple[int, ...]
    """Places of the tokens that this pass chose."""


class Watch:
    """Gets the passes of a search.

    Args:
        show: called after each pass; what it raises ends the search.
    """

    def __init__(self, show: Callable[[Pass], None]) -> None:
        self.show = show
        self.seconds = 0.0
        """Time that watching took, for who measures the search."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the time inside as watching."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def current_watch() -> Watch | None:
    """The watch of this thread, if there is one."""
    return _WATCH.get()


@contextmanager
def watched(show: Callable[[Pass], None]) -> Iterator[Watch]:
    """Show the passes of the searches inside, of this thread."""
    watch = Watch(show)
    before = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(before)


class BeamTrace:
    """Follows the beams of one sentence by what a search asks its step function."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._rows: list[list[tuple[int, float]]] = []
        self._log_KV: Tensor | None = None

    def note(self, token_BK: Tensor, parent_BK: Tensor | None, logits_BKV: Tensor) -> None:
        """A call of the step function (:class:`janus_ds.decode.beam_search.CachedSteps`)."""
        with self._watch.busy():
            tokens = token_BK[0].tolist()
            if parent_BK is None or self._log_KV is None:
                self._rows = [[] for _ in tokens]
            else:
                parents = parent_BK[0].tolist()
                sure = self._log_KV[parents, tokens].exp().tolist()
                chosen = zip(tokens, parents, sure, strict=True)
                self._rows = [[*self._rows[parent], (token, share)] for token, parent, share in chosen]
                best, shares = zip(*self._rows[0], strict=True)
                self._watch.show(Pass(best, shares, (len(best) - 1,)))
            self._log_KV = logits_BKV[0].float().log_softmax(-1)
