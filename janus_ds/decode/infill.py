"""Given targets with blanks: NAR or AUX fills these, and what stands around them is kept to the letter.

A blank is `___` (three underscores or more) or `<mask>`, and stands for one token, or for as many as any of
several lengths says: each combination of lengths is one candidate of its sentence, and all are filled in the
passes of one search (`mask_predict.py`, `aux_search.py`), which sees given tokens as settled. Blanks with
nothing but spaces between them are filled as one. Behind a space a blank begins with the beginning of a word,
behind anything else with what may go on from there.

Shape letters: B sentences, C candidates, R = B * C rows, L longest row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
from torch import Tensor

from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.mask_predict import ANY_TOKEN, BEGINS_WORD, WITHIN_WORD, MaskPredictSettings
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import IdText, TextCodec
from janus_ds.errors import ConfigError, DataError

BLANK = rf"(?:_{{3,}}|{re.escape(MASK_TEXT)})"
"""What a blank is, as a regular expression."""
_RUN = re.compile(rf"{BLANK}(?:\s*{BLANK})*")
_MOST_CANDIDATES = 64


@dataclass(frozen=True)
class Target:
    """A text with blanks, or with none.

    Attributes:
        parts: the text before, between and behind blanks.
        ids: its inner tokens, and for each blank a number below 0: which token may be put there (`ANY_TOKEN`,
            `BEGINS_WORD`, `WITHIN_WORD`).
        candidates: the same with so many tokens for each blank as is tried, at least one.
    """

    parts: tuple[str, ...]
    ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]

    @property
    def has_blank(self) -> bool:
        """Something is to be filled."""
        return any(id_ < 0 for id_ in self.ids)

    def text(self, item: Hypothesis, codec: TextCodec) -> str:
        """The given text with what was found for its blanks."""
        runs = [
            [item.tokens[place] for _, place in group]
            for _, group in groupby(enumerate(item.filled), lambda pair: pair[1] - pair[0])
        ]
        fills = [codec.decode(run).strip() for run in runs]
        return "".join(part + fill for part, fill in zip(self.parts, [*fills, ""], strict=True))


def parse_target(
    text: str, codec: TextCodec, mask: int, lengths: Sequence[int], most: int, number: int
) -> Target:
    """Read a target with blanks.

    Args:
        lengths: tokens to try for each blank.
        most: inner tokens that a target may have.
        number: of its line, for messages.

    Raises:
        ConfigError: no length, or one that is no whole number from 1 on.
        DataError: too many combinations of lengths, or more tokens than positions.
    """
    where = f"line {number} of the target"
    wrong = [count for count in lengths if not isinstance(count, int) or count < 1]
    if wrong or not lengths:
        what = f"a blank cannot have {wrong[0] if wrong else 'no'} tokens"
        raise ConfigError(what, "blank lengths", "give 1 or more")
    blanks = len(re.findall(BLANK, text))
    encoded = codec.encode(re.sub(BLANK, MASK_TEXT, text))
    if encoded.count(mask) != blanks:
        raise DataError("the tokenizer does not see every blank", where, "put spaces around blanks")
    if sum(hidden for hidden, _ in groupby(id_ == mask for id_ in encoded)) != len(_RUN.findall(text)):
        what = "the tokenizer does not see what stands between two blanks"
        raise DataError(what, where, "write a word between them, or spaces alone")
    if not blanks:
        return Target((text,), tuple(encoded), (tuple(encoded),))
    rule = iter(_rules(text))
    ids = tuple(next(rule) if id_ == mask else id_ for id_ in encoded)
    if len(set(lengths)) ** blanks > _MOST_CANDIDATES:
        raise DataError(
            f"{len(set(lengths))} lengths for each of {blanks} blanks are more than {_MOST_CANDIDATES} "
            "candidates", where, "give fewer lengths, or fewer blanks",
        )  # fmt: skip
    given, least = len(ids) - blanks, len(ids) + blanks * (min(lengths) - 1)
    if least > most:
        raise DataError(
            f"{given} tokens and {blanks} blanks are at least {least} positions; the model has {most}",
            where, "take blanks or words out of the target, or try shorter blanks",
        )  # fmt: skip
    found: dict[tuple[int, ...], None] = {}
    for counts in product(dict.fromkeys(lengths), repeat=blanks):
        count = iter(counts)
        row = tuple(x for id_ in ids for x in [id_, *[ANY_TOKEN] * (next(count) - 1 if id_ < 0 else 0)])
        if len(row) <= most:
            found[row] = None
    return Target(tuple(_RUN.split(text)), ids, tuple(found))


def _rules(text: str) -> list[int]:
    """What may be put at each blank, by the text before it; of several in a row the first alone is ruled."""
    found = []
    for run in _RUN.finditer(text):
        before = text[: run.start()]
        rule = BEGINS_WORD if before[-1:].isspace() else WITHIN_WORD if before else ANY_TOKEN
        found += [rule, *[ANY_TOKEN] * (len(re.findall(BLANK, run.group())) - 1)]
    return found


def word_beginnings(codec: TextCodec, size: int) -> Tensor | None:
    """Which of so many tokens begin a word: written behind another token, a space and a letter or digit.

    Returns:
        bool, shape (V,); None where all do or none does, and for texts of numbers.
    """
    if isinstance(codec, IdText):
        return None
    (first, *_) = codec.encode("a")
    written = codec.decode([first])
    behind = [codec.decode([first, id_])[len(written) :] for id_ in range(size)]
    begins_V = torch.tensor([text[:1].isspace() and text[1:2].isalnum() for text in behind])
    return begins_V if begins_V.any() and not begins_V.all() else None


def given_rows(targets: Sequence[Target], settings: MaskPredictSettings) -> tuple[Tensor, Tensor]:
    """All candidates as rows of a search: lengths (B, C) with bos and eos; tokens (R, L), below 0 at blanks.

    A sentence with fewer candidates is filled up by rows without tokens, in which a search finds nothing.
    """
    most = max(len(target.candidates) for target in targets)
    rows = [
        [settings.bos, *row, settings.eos]
        for target in targets
        for row in target.candidates + ((),) * (most - len(target.candidates))
    ]
    length_R = torch.tensor([len(row) for row in rows])
    width = int(length_R.max())
    token_RL = torch.tensor([row + [settings.pad] * (width - len(row)) for row in rows])
    return length_R.view(-1, most), token_RL
