"""ROUGE against files2rouge with the real ROUGE-1.5.5, and the preparation of the four tasks."""

from __future__ import annotations

from typing import Any

import pytest

from janus_ds.metrics.glge_text import cnndm_summaries, files2rouge_summaries, gigaword_summaries
from janus_ds.metrics.rouge import NAMES, _order_of_instances, rouge, rouge_stem, split_sentences
from tests.support.metric_fixtures import metric_cases

# From ROUGE-1.5.5's own stemmer; the first row is where other Porter stemmers differ.
STEMS = {
    **{"agreement": "agreem", "accidental": "accid", "continent": "contin", "geology": "geologi"},
    **{"possibly": "possibl", "archaeology": "archaeolog", "boys": "boi", "enjoys": "enjoi"},
    **{"caresses": "caress", "ponies": "poni", "feed": "feed", "agreed": "agre", "hopping": "hop"},
    **{"falling": "fall", "hissing": "hiss", "filing": "file", "sized": "size", "happy": "happi"},
    **{"relational": "relat", "vietnamization": "vietnam", "electriciti": "electr", "goodness": "good"},
    **{"adoption": "adopt", "extension": "extens", "replacement": "replac", "controll": "control"},
    **{"was": "was", "dying": "dy", "syzygy": "syzygi", "1990s": "1990"},
}


def scored(case: dict[str, Any], first: str, second: str) -> tuple[dict[str, float], list[list[float]]]:
    models, peers = ([split_sentences(line) for line in case[side]] for side in (first, second))
    found = rouge(models, peers)
    return found.official, found.lines.T.tolist()


@pytest.mark.parametrize("origin", ["own", "real"])
def test_scores_are_those_of_files2rouge_to_the_last_digit(origin: str) -> None:
    for case in metric_cases(f"rouge_xsum.{origin}"):
        if "error" in case["files2rouge_head"]:
            continue
        found, lines = scored(case, "hyp", "ref")
        assert found == case["files2rouge_head"], case["id"]
        assert lines == [case["files2rouge_head_per_line"][name] for name in NAMES], case["id"]
        swapped, _ = scored(case, "ref", "hyp")
        assert swapped == case["files2rouge_head_reference_first"], case["id"]


def test_empty_lines_score_zero() -> None:
    found = rouge([[""], ["a b"]], [["a b"], ["a b"]])
    assert found.lines.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert found.mean == dict.fromkeys(NAMES, 0.5)
    with pytest.raises(ValueError):
        rouge([], [])
    with pytest.raises(ValueError):
        rouge([["a"]], [])


def test_words_are_stemmed_as_by_rouge() -> None:
    assert {word: rouge_stem(word) for word in STEMS} == STEMS


def test_lines_are_drawn_in_the_order_of_pyrouges_files() -> None:
    # Files 0 1 10 11 2 ... 9 are numbered 1 to 12, and drawn from in the order 1 10 11 12 2 ... 9.
    assert _order_of_instances(12) == [0, 7, 8, 9, 1, 10, 11, 2, 3, 4, 5, 6]


def test_the_bootstrap_mean_stays_near_the_plain_mean() -> None:
    words = list("abcdefghij")
    models = [[" ".join(words[:k])] for k in range(1, 11)] * 4
    found = rouge(models, [[" ".join(words)]] * 40)
    for name in NAMES:
        assert 0 < abs(found.official[name] - found.mean[name]) < 0.01


def test_gigaword_joins_words_and_hides_ones() -> None:
    models, peers = gigaword_summaries(["it ' s 1 - 0 ( sic )"], ["it 's #-# -lrb- sic -rrb- "])
    assert models == [["it 's #-# -lrb- sic -rrb-"]]
    assert peers == [["it 's #-0 -lrb- sic -rrb-"]]


def test_cnndm_keeps_new_sentences_of_five_words() -> None:
    old = "the cat sat on the mat ."
    seven_of_ten = "the cat sat on mat . a one two three"  # six old words and "a" is new: 6/10
    eight_of_ten = "the cat sat on mat . a one big dog"  # eight of ten distinct words are known by now
    line = (
        f"{old} [X_SEP] too short [X_SEP] {seven_of_ten} [X_SEP] {eight_of_ten} [X_SEP] ( it ) is , new now"
    )
    models, peers = cnndm_summaries([line], ["One . <S_SEP> Two ."])
    assert models == [["One .", "Two ."]]
    assert peers == [[old, seven_of_ten, "-LRB- it -RRB- is , new now"]]
    # A model that was trained on references writes their mark.
    assert cnndm_summaries([line.replace("[X_SEP]", "<S_SEP>")], ["One ."])[1] == peers


def test_xsum_puts_the_hypothesis_in_the_place_of_the_model() -> None:
    models, peers = files2rouge_summaries(["a . b ."], ["c. d."])
    assert (models, peers) == ([["a", " b", ""]], [["c. d."]])
