"""What decoding gives back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ScoredTokens:
    """One candidate of a search, as token ids.

    Attributes:
        tokens: the inner tokens y_1 .. y_N, without bos and eos.
        score: what candidates of the same input are ranked by; higher is better, at most 0.
    """

    tokens: tuple[int, ...]
    score: float
    passes: int = field(default=0, compare=False)
    """Decoder passes that its sentence took part in; in AR, steps until its search ended."""
    token_scores: tuple[float, ...] = field(default=(), compare=False)
    """Log-probability of each token, by AR's search or sampling."""
    filled: tuple[int, ...] = field(default=(), compare=False)
    """Places of the tokens that a search put into a given target."""
    mode: str = field(default="", compare=False)
    """Where it is not the one asked for: ar, where drafts did not pay."""
    seconds: float = field(default=0.0, compare=False)
    """From the start of its batch (in AR, of its sentence) to the end, in wall time."""


@dataclass(frozen=True)
class Hypothesis:
    """One output of a generator.

    Attributes:
        text: the decoded text.
        tokens: the ids behind the text, without bos and eos.
        score: AR: sum of log-probabilities / number of generated tokens ** length penalty (eos is a
            generated token). NAR: average log-probability of a token (`decode.nar_score`). Mode aux: the
            same, by AUX.
        mode: "ar", "nar", "draft" or "aux"; "ar" instead of "draft" where drafts did not pay.
        passes, seconds: see :class:`ScoredTokens`.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    mode: str
    passes: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
