"""How GLGE's scripts prepare text before they score it: words rejoined, summaries cut into sentences.

XSum and MSNews go through files2rouge; CNN/DailyMail, Gigaword and question generation through the scripts of
UniLM, which GLGE took over. Outputs of models with BERT's vocabulary have "don ' t", "3 , 000" and
"well - known"; UniLM's scripts put them together in the style of the Penn Treebank.
All tests of letters, digits and white space are those of ASCII, as in the Python 2 scripts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from janus_ds.metrics.rouge import Summary, split_sentences

LOWER_BRACKETS: Mapping[str, str] = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"[UNK]": "UNK", "&": "&amp;", "<": "&lt;", ">": "&gt;"},
}
"""What question generation and Gigaword write for single tokens."""

CASED_BRACKETS: Mapping[str, str] = {
    **{"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"},
}
"""What CNN/DailyMail writes."""

_SPACE = " \t\n\r\x0b\x0c"
_SPACES = re.compile(f"[{_SPACE}]+")
_CLITICS = ("s", "d", "ll")


def ascii_strip(text: str) -> str:
    """Strip ASCII white space only."""
    return text.strip(_SPACE)


def ascii_lower(text: str) -> str:
    """Lower-case A to Z only."""
    return text.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def rejoin(text: str, table: Mapping[str, str]) -> str:
    """Join split words, numbers, quotes and hyphens.

    Args:
        text: tokens between white space.
        table: tokens to exchange, `LOWER_BRACKETS` or `CASED_BRACKETS`.

    Returns:
        Tokens between single spaces.
    """
    tokens = [token for token in _SPACES.split(text) if token]
    return " ".join(_Rejoiner(tokens, table).run())


class _Rejoiner:
    """One pass over the tokens; the first rule that takes any of them wins."""

    def __init__(self, tokens: list[str], table: Mapping[str, str]) -> None:
        self._tokens = tokens
        self._table = table
        self._done: list[str] = []
        self._at = 0
        self._in_double = False
        self._in_single = False
        # A hyphen was glued to the word before it, and draws the word behind it, too.
        self._glued_hyphen = self._glued_hyphen_before = False
        self._rules: tuple[Callable[[], int], ...] = (
            self._exchange,
            self._double_quote,
            self._apostrophe,
            self._ellipsis,
            self._number,
            self._initials,
            self._hyphen,
            self._behind_hyphen,
            self._as_it_is,
        )

    def run(self) -> list[str]:
        while self._at < len(self._tokens):
            self._glued_hyphen_before, self._glued_hyphen = self._glued_hyphen, False
            self._at += next(taken for rule in self._rules if (taken := rule()))
        return self._done

    def _ahead(self, distance: int) -> str:
        """The token so far ahead, or nothing behind the end."""
        place = self._at + distance
        return self._tokens[place] if place < len(self._tokens) else ""

    def _last(self) -> str:
        return self._done[-1] if self._done else ""

    def _put(self, token: str, taken: int) -> int:
        self._done.append(token)
        return taken

    def _append(self, piece: str, taken: int) -> int:
        self._done[-1] += piece
        return taken

    def _exchange(self) -> int:
        token = self._ahead(0)
        return self._put(self._table[token], 1) if token in self._table else 0

    def _double_quote(self) -> int:
        if self._ahead(0) != '"':
            return 0
        self._in_double = not self._in_double
        return self._put("``" if self._in_double else "''", 1)

    def _apostrophe(self) -> int:
        if self._ahead(0) != "'":
            return 0
        if self._last().endswith("n") and self._ahead(1) == "t":
            self._done[-1] = self._done[-1][:-1]
            return self._put("n't", 2)
        if self._ahead(1) in _CLITICS:
            return self._put("'" + self._ahead(1), 2)
        self._in_single = not self._in_single
        return self._put("`" if self._in_single else "'", 1)

    def _ellipsis(self) -> int:
        dots = self._ahead(0) == self._ahead(1) == self._ahead(2) == "."
        return self._put("...", 3) if dots else 0

    def _number(self) -> int:
        token, last, following = self._ahead(0), self._last(), self._ahead(1)
        if token == "," and _digits_and_commas(last) and _digits_and_commas(following):
            return self._append("," + following, 2)
        if token == "." and _digits(last) and _digits(following):
            return self._append("." + following, 2)
        return 0

    def _initials(self) -> int:
        if not (self._ahead(0) == "." and _capital(self._last()) and self._initial_ahead(1)):
            return 0
        end = 3
        while self._initial_ahead(end + 1):
            end += 2
        # However many tokens are joined, only two count as read, and the rest comes once more; and the
        # loop looks one token too far. The scripts do so, and their numbers depend on it.
        return self._append("".join(self._tokens[self._at : self._at + end]), 2)

    def _initial_ahead(self, distance: int) -> bool:
        return _capital(self._ahead(distance)) and self._ahead(distance + 1) == "."

    def _hyphen(self) -> int:
        if self._ahead(0) != "-":
            return 0
        following = self._ahead(1)
        if following == "-":
            return self._put("--", 2)
        if self._at == 0 or not following or self._last() in string.punctuation or _punctuation(following):
            return self._put("-", 1)
        self._glued_hyphen = True
        return self._append("-", 1)

    def _behind_hyphen(self) -> int:
        token = self._ahead(0)
        return self._append(token, 1) if self._glued_hyphen_before and not _punctuation(token) else 0

    def _as_it_is(self) -> int:
        return self._put(self._ahead(0), 1)


def _punctuation(token: str) -> bool:
    return token[0] in string.punctuation


def _digits(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _digits_and_commas(token: str) -> bool:
    return bool(token) and all(letter in "0123456789," for letter in token)


def _capital(token: str) -> bool:
    return len(token) == 1 and token in string.ascii_uppercase


Summaries = tuple[list[Summary], list[Summary]]
"""Models and peers, as `rouge` takes them."""

SENTENCE_MARK = "[X_SEP]"
"""What stands between the sentences of a CNN/DailyMail hypothesis."""

_REFERENCE_MARK = " <S_SEP> "
_SHORTEST = 5
_KNOWN_SHARE = 0.7


def files2rouge_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """XSum, MSNews: sentences end at " ."; the hypotheses take the place of the models, since GLGE's
    eval.py and today's files2rouge disagree about the order of the files."""
    return [split_sentences(line) for line in hypotheses], [split_sentences(line) for line in references]


def gigaword_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """Gigaword: hypotheses are rejoined, and "1" becomes "#", which stands for digits in the references."""
    peers: list[Summary] = [[rejoin(line, LOWER_BRACKETS).replace("1", "#")] for line in hypotheses]
    return [[line.strip()] for line in references], peers


def cnndm_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """CNN/DailyMail: sentences between [X_SEP] are rejoined; those of four words or fewer are dropped, and
    those with more than 70 % of their distinct words in the sentences before."""
    models: list[Summary] = [line.strip().split(_REFERENCE_MARK) for line in references]
    peers: list[Summary] = [
        _novel([rejoin(part, CASED_BRACKETS) for part in line.split(SENTENCE_MARK)]) for line in hypotheses
    ]
    return models, peers


def _novel(sentences: list[str]) -> list[str]:
    kept = []
    known: set[str] = set()
    for sentence in sentences:
        words = sentence.lower().split()
        if len(words) < _SHORTEST:
            continue
        if len(known.intersection(words)) / len(set(words)) <= _KNOWN_SHARE:
            kept.append(sentence)
        known.update(words)
    return kept
