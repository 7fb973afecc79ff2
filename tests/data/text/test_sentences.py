"""The sentence rule by examples, and blocks of complete sentences."""

# ruff: noqa: RUF001

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ds.data.prepare.blocks import cut_rows, encode_blocks, split_sentences
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.prepare.train_tokenizer import train_sentencepiece
from janus_ds.data.text.tokenizer import ByteLevelBPE, Tokenizer
from tests.data.text.test_tokenizer import small_byte_level
from tests.support.hostile import bounded


@pytest.mark.parametrize(
    "sentences",
    [
        ["He came.", "She left!", "Who?", "Nobody..."],
        ["Mr. Smith met J. S. Bach.", '"It was I."', "They agreed."],
        ['"Stop!" he cried.', '"Why?" she asked.'],
        ["See fig. 2 and No. 3, e.g. the U.S. ships.", "No.", "He said no.", "On Jan. 5 it ended."],
        ["It costs 3.50 dollars (more or less.)", "(So be it.)", "The end"],
        ["Then ... nothing.", "1984 came."],
    ],
)
def test_examples_of_the_rule(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_line_ends_white_space_and_east_asian_stops():
    assert split_sentences("A title\nThe  text\tgoes on.  \n\n") == ["A title", "The text goes on."]
    assert split_sentences("今日は。元気ですか？はい。") == ["今日は。", "元気ですか？", "はい。"]
    assert split_sentences(" \n ") == []


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte-level"])
def test_no_space_comes_between_sentences_that_have_none(kind):
    """A model would write one behind each, and read other tokens than it has learnt from."""
    texts = ["今日は天気。元気ですか？はい、元気。", "日本の首都。京都は？", "日本。 首都は？\n京都。"]
    if kind == "byte-level":
        tokenizer: Tokenizer = ByteLevelBPE(*small_byte_level().values())
    else:
        tokenizer = train_sentencepiece(texts * 20, kind, 25, "identity")

    def blocks(length: int) -> list[list[int]]:
        settings = PrepareSettings(block_tokens=length, valid_share=0.0)
        return [
            row.tolist() for row in encode_blocks(tokenizer, settings, texts)[0]["train"]["target"].rows()
        ]

    assert blocks(200) == [tokenizer.encode(" ".join(text.split())) for text in texts]
    # A block that begins with such a sentence is what the tokenizer makes of it.
    for block in blocks(10) if kind != "byte-level" else ():
        assert block == tokenizer.encode(tokenizer.decode(block))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aB.!? \n\"'()1。é", max_size=60))
def test_no_character_is_lost(text):
    parts = split_sentences(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part == " ".join(part.split()) and part for part in parts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 10))
def test_blocks_hold_all_tokens_and_no_more_than_the_limit(lengths, limit):
    blocks, overlong = cut_rows([[7] * length for length in lengths], limit)
    assert sum(blocks) == sum(lengths)
    assert all(0 < length <= limit for length in blocks)
    assert overlong == sum(length > limit for length in lengths)
    if not overlong:  # borders of blocks are borders of sentences, and no block could be longer
        ends = {sum(lengths[: n + 1]) for n in range(len(lengths))}
        borders = [sum(blocks[: n + 1]) for n in range(len(blocks))]
        assert set(borders) <= ends
        starts = [0, *borders]
        fullest = [max(end for end in ends if end <= start + limit) for start in starts[:-1]]
        assert fullest == borders


def test_time_grows_with_the_length_alone():
    """Runs of stops, as in tables of contents, once took the square of it."""
    texts = ("." * 1_000_000, "?!" * 500_000, '."' * 500_000, "." * 100_000 + '"' * 900_000)
    for text in texts:
        with bounded():  # the square of these lengths takes a quarter of an hour
            assert split_sentences(text) == [text]


def test_the_tokens_of_a_block_that_begins_are_taken_anew():
    rows = [[1, 1], [2, 2, 2], [3, 3], [4]]
    blocks, _ = cut_rows(rows, 4, head=lambda number: [number * 10])
    assert rows == [[1, 1], [10], [3, 3], [4]]
    assert blocks == [2, 4]
