"""How GLGE's scripts prepare text before they score it: words rejoined, summaries cut into sentences.

XSum and MSNews go through files2rouge; CNN/DailyMail, Gigaword and question generation through the scripts of
UniLM, which GLGE took over. Outputs of models with BERT's vocabulary have "don ' t", "3 , 000" and
"well - known"; UniLM's scripts put them together in the style of the Penn Treebank.
All tests of letters, digits and white space are those of ASCII, as in the Python 2 scripts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

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
    """Join split words, numbers, quotes and hyphens; of the rules the first that takes a token wins.

    Args:
        text: tokens between white space.
        table: tokens to exchange, `LOWER_BRACKETS` or `CASED_BRACKETS`.

    Returns:
        Tokens between single spaces.
    """
    tokens = [token for token in _SPACES.split(text) if token]
    ahead = [*tokens, "", "", "", ""]
    done: list[str] = []
    in_double = in_single = glued = False
    at = 0
    while at < len(tokens):
        token, following, last, taken = tokens[at], ahead[at + 1], done[-1] if done else "", 1
        # A hyphen was glued to the word before it, and draws the word behind it, too.
        behind_hyphen, glued = glued, False
        if token in table:
            done.append(table[token])
        elif token == '"':
            in_double = not in_double
            done.append("``" if in_double else "''")
        elif token == "'" and last.endswith("n") and following == "t":
            done[-1:], taken = [last[:-1], "n't"], 2
        elif token == "'" and following in _CLITICS:
            taken = 2
            done.append("'" + following)
        elif token == "'":
            in_single = not in_single
            done.append("`" if in_single else "'")
        elif token == following == ahead[at + 2] == ".":
            taken = 3
            done.append("...")
        elif _in_number(last, token, following):
            taken = 2
            done[-1] += token + following
        elif token == "." and _capital(last) and _capital(following) and ahead[at + 2] == ".":
            end = at + 3
            while _capital("".join(tokens[end + 1 : end + 2])) and tokens[end + 2 : end + 3] == ["."]:
                end += 2
            # However many tokens are joined, only two count as read, and the rest comes once more; and the
            # loop looks one token too far. The scripts do so, and their numbers depend on it.
            taken = 2
            done[-1] += "".join(tokens[at:end])
        elif token == following == "-":
            taken = 2
            done.append("--")
        elif token == "-" and done and following and not (last in string.punctuation or _mark(following)):
            glued = True
            done[-1] += "-"
        elif token != "-" and behind_hyphen and not _mark(token):
            done[-1] += token
        else:
            done.append(token)
        at += taken
    return " ".join(done)


def _mark(token: str) -> bool:
    return token[0] in string.punctuation


def _in_number(last: str, token: str, following: str) -> bool:
    """A comma or a point between digits."""
    digits = {",": "0123456789,", ".": "0123456789"}.get(token, "")
    return bool(last and following) and set(last + following) <= set(digits)


def _capital(token: str) -> bool:
    return len(token) == 1 and token in string.ascii_uppercase


Summaries = tuple[list[Summary], list[Summary]]
"""Models and peers, as `rouge` takes them."""

SENTENCE_MARK = "[X_SEP]"
"""What stands between the sentences of a CNN/DailyMail hypothesis."""

REFERENCE_MARK = "<S_SEP>"
"""What stands there in a reference, and so in the outputs of a model that was trained on references."""
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
    """CNN/DailyMail: sentences between [X_SEP], or <S_SEP>, are rejoined; those of four words or fewer are
    dropped, and those with more than 70 % of their distinct words in the sentences before."""
    models: list[Summary] = [line.strip().split(f" {REFERENCE_MARK} ") for line in references]
    marked = (line.replace(REFERENCE_MARK, SENTENCE_MARK) for line in hypotheses)
    peers: list[Summary] = [
        _novel([rejoin(part, CASED_BRACKETS) for part in line.split(SENTENCE_MARK)]) for line in marked
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
