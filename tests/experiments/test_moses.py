"""Moses tokens: rules one by one, and the way back and forth on the official IWSLT14 references."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from moses import moses_detokenize, moses_tokenize

from janus_ds.metrics.scores import read_lines


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Well, it's 3,000 people.", "Well , it &apos;s 3,000 people ."),
        ("Mr. Smith left. He won't return!", "Mr. Smith left . He won &apos;t return !"),
        ('He said: "Yes (maybe)."', "He said : &quot; Yes ( maybe ) . &quot;"),
        ("In the u.s. we wait ... [here] & there", "In the u.s. we wait ... &#91; here &#93; &amp; there"),
        ("the 1990's, the dogs' bowls", "the 1990 &apos;s , the dogs &apos; bowls"),
        ("No. 7 is well-known; 10 % of 5.5 <b>", "No. 7 is well-known ; 10 % of 5.5 &lt; b &gt;"),
        ("", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert moses_tokenize(text) == tokens


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("well , it &apos;s ( very ) late .", "well, it's (very) late."),
        ("he said : &quot; yes &quot; , and left .", 'he said: "yes", and left.'),
        ("der preis , 5 $ 3 , ist gut !", "der preis, 5 $3, ist gut!"),
        ("a &amp; b &#91; c &#93;", "a & b [c]"),
        ("", ""),
    ],
)
def test_plain_text(tokens: str, text: str) -> None:
    assert moses_detokenize(tokens) == text


def test_official_references_come_back() -> None:
    given = os.environ.get("JANUS_SHARED_DATA")
    if not given or not (Path(given) / "iwslt14_de-en").is_dir():
        pytest.skip("JANUS_SHARED_DATA with iwslt14_de-en is not set")
    lines = read_lines(Path(given) / "iwslt14_de-en" / "tok.test.en").lines
    same = sum(moses_tokenize(moses_detokenize(line)) == line for line in lines)
    # The rest was lower-cased after it was tokenised, which hides where sentences end.
    assert same / len(lines) > 0.96
