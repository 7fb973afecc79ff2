"""Real text for a small question-generation experiment: SQuAD in GLGE's layout, Wikipedia in SQuAD's style.

The official test set is lower-cased text with Penn Treebank tokens between spaces, so everything that a
small model learns from is brought into that form (:func:`treebank_lower`). Inputs are single sentences, as
in the split of Du et al. (2017), whose test set GLGE took over: answers and passages of the test set are
not part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from janus_ds.data.prepare.blocks import split_sentences
from janus_ds.data.prepare.pair_files import read_pairs
from janus_ds.data.text.documents import DocumentReader, DocumentRule
from janus_ds.io import disk_faults, write_atomic

DEV_PAIRS = 1_000
"""Pairs of SQuAD's dev set that are kept for validation, at least; the others are training pairs."""

Pair = tuple[str, str]

_EVEN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- "}
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RULES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r'(^|[\s(\[{<])"', r"\1 `` "),
        (r'"', " '' "),
        (r"(^|\s)'(?=\w)(?!(?:s|m|d|ll|re|ve)\b)", r"\1` "),
        (r"([()\[\]{}])", lambda match: f" {_BRACKETS[match.group()]} "),
        (r"(\.\.\.|[;?!%$#@£€=<>*])", r" \1 "),
        (r"(?<!\d),|,(?!\d)", " , "),
        (r"(?<!\d):|:(?!\d)", " : "),
        (r"([^\s.])\.(?=\s*(?:'')?\s*$)", r"\1 . "),
        (r"(?<=\w)n't\b", " n't"),
        (r"(?<=[^\s'`])'(s|m|d|ll|re|ve)?(?=\s|$)", r" '\1"),
        (r"\bcannot\b", "can not"),
    )
]


def treebank_lower(sentence: str) -> str:
    """One sentence, lower-cased, with Penn Treebank tokens between single spaces.

    By rule, so not in every case as the CoreNLP of the official data: of 4,370 questions of SQuAD that the
    test set holds, 99 % become the same.
    """
    text = sentence.lower().translate(_EVEN)
    for pattern, by in _RULES:
        text = pattern.sub(by, text)
    return " ".join(text.split())


def write_squadqg(shared: Path, folder: Path) -> dict[str, int]:
    """Write `org_data/{train,dev,test}.{src,tgt}`; returns what was counted.

    Test is the official one, untouched. Dev is the end of SQuAD's dev set, cut between two sentences; its
    other pairs and those of `reqa_train` are the training set, but for pairs whose sentence or question is
    in test or dev.

    Args:
        shared: the folder with `squadqg/`.
        folder: where `org_data` is made.

    Raises:
        DataError: a file is missing, or its sides have different numbers of lines.
        ResourceError: the folder cannot be written.
    """
    given = shared / "squadqg"
    test = list(read_pairs(given / "du2017.test.src.xz", given / "du2017.test.tgt"))
    held = list(read_pairs(given / "du2017.dev.src.xz", given / "du2017.dev.tgt"))
    cut = _sentence_start(held, len(held) - DEV_PAIRS)
    reqa = read_pairs(given / "reqa_train.sentence.src", given / "reqa_train.question.tgt")
    own = [*((treebank_lower(source), treebank_lower(target)) for source, target in reqa), *held[:cut]]
    splits = {"train": _apart(own, [*test, *held[cut:]]), "dev": held[cut:], "test": test}
    inside = folder / "org_data"
    with disk_faults(inside):
        inside.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        for side, name in enumerate(("src", "tgt")):
            write_atomic(inside / f"{split}.{name}", "".join(f"{pair[side]}\n" for pair in pairs).encode())
    left_out = len(own) - len(splits["train"])
    return {**{split: len(pairs) for split, pairs in splits.items()}, "left_out": left_out}


def write_wikipedia(shared: Path, path: Path, megabytes: int) -> int:
    """Write the first articles in the style of the questions; returns the number of articles.

    Args:
        shared: the folder with `pretrain_wikipedia_en/`.
        path: one sentence a line, a blank line after each article.
        megabytes: of the given text that are used (the last article is whole).

    Raises:
        DataError: the file is missing.
        ResourceError: the file cannot be written.
    """
    articles = taken = 0
    lines: list[str] = []
    text = DocumentReader([shared / "pretrain_wikipedia_en" / "wiki.txt.xz"], DocumentRule("text"))
    for article, _ in text.read():
        sentences = (part for paragraph in article.split("\n") for part in split_sentences(paragraph))
        lines += [*map(treebank_lower, sentences), ""]
        articles += 1
        taken += len(article.encode()) + 2
        if taken >= megabytes * 1_000_000:
            break
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return articles


def _sentence_start(pairs: Sequence[Pair], wanted: int) -> int:
    """The last place up to `wanted` where another sentence begins."""
    starts = [0, *(place for place, (one, two) in enumerate(pairwise(pairs), 1) if one[0] != two[0])]
    return max(place for place in starts if place <= max(wanted, 0))


def _apart(pairs: Iterable[Pair], held_out: Sequence[Pair]) -> list[Pair]:
    sources, targets = ({pair[side] for pair in held_out} for side in (0, 1))
    return [pair for pair in pairs if pair[0] not in sources and pair[1] not in targets]
