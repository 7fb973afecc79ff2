"""Scores of translations against fairseq's, Moses' and sacreBLEU's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from janus_ds.errors import DataError
from janus_ds.metrics.bleu import (
    compound_bleu,
    length_ratio,
    remove_bpe,
    repetition,
    sacrebleu_13a,
    split_compounds,
    tokenized_bleu,
)
from janus_ds.metrics.rouge import perl_draws
from janus_ds.metrics.scores import TextLines
from janus_ds.metrics.translation import (
    bleu_statistics,
    bootstrap_draws,
    compare,
    compare_translations,
    corpus_bleu,
    score_translations,
)
from tests.support.metric_fixtures import metric_cases

ORIGINS = ["own", "real"]
SYSTEM = ["the old boat left at dawn .", "nobody saw it in the morning", "we heard the bells again"]
PERL = [[170, 749, 96, 870, 577, 785], [102, 635, 803, 925, 775, 537]]
BASELINE = ["the boat went at dawn .", "nobody saw it at the morning", "we heard bells again"]
REFERENCE = ["the old boat left at dawn .", "nobody saw it that morning", "we heard the bells again"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_bleu_is_that_of_fairseq_and_sacrebleu(origin: str) -> None:
    for case in metric_cases(f"bleu_nmt.{origin}"):
        pair = case["hyp"], case["ref"]
        found = tokenized_bleu(*pair)
        assert found.score == pytest.approx(case["fairseq"]["score"], abs=0.005), case["id"]
        assert found.signature == case["sacrebleu_none"]["signature"]
        expected = case["compound_split"]["fairseq_score"]["score"]
        assert compound_bleu(*pair).score == pytest.approx(expected, abs=0.005), case["id"]
        if not case["bpe"]:
            detokenised = sacrebleu_13a(*pair)
            assert detokenised.score == pytest.approx(case["sacrebleu_13a"]["score"], abs=1e-9), case["id"]
            assert detokenised.signature == case["sacrebleu_13a"]["signature"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_bpe_and_compounds_are_cut_as_in_the_scripts(origin: str) -> None:
    for case in metric_cases(f"bleu_nmt.{origin}"):
        for side in ("hyp", "ref"):
            joined = case.get(f"{side}_after_bpe_removal", case[side])
            assert [remove_bpe(line) for line in case[side]] == [line.rstrip() for line in joined]
            if side in case["compound_split"]:
                assert [split_compounds(line) for line in joined] == case["compound_split"][side], case["id"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_bleu_from_added_statistics_is_sacrebleus(origin: str) -> None:
    for case in metric_cases(f"bleu_nmt.{origin}"):
        statistics = bleu_statistics(case["hyp"], case["ref"], "13a").sum(axis=0)
        expected = sacrebleu_13a(case["hyp"], case["ref"]).score
        assert float(corpus_bleu(statistics, "exp")) == pytest.approx(expected, abs=1e-9), case["id"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_repetition_is_definition_a(origin: str) -> None:
    for case in metric_cases(f"repetition.{origin}"):
        found = repetition([line.split() for line in case["hyp"]])
        assert found == pytest.approx(case["expected"]["A_consecutive_percent"], abs=1e-9), case["id"]
    assert repetition([[5, 5, 7], []]) == pytest.approx(100 / 3)
    assert repetition([]) == 0


def test_p_values_are_those_of_moses_and_sacrebleu() -> None:
    for case in metric_cases("significance.real"):
        count = case["n"]
        first, second = (bleu_statistics(case[side], case["ref"], "none") for side in ("hyp1", "hyp2"))
        found = compare(first, second, bootstrap_draws(count), "none")
        assert found.p_moses == case["numpy_default_rng_12345_p_moses"]
        if case["id"] != "same_system":  # where sacreBLEU's strict ">" claims a difference
            assert found.p_sacrebleu == pytest.approx(case["sacrebleu_paired_bs"]["p_value"], abs=1e-12)
        drawn = np.array(list(perl_draws(np.array([7]), count, 1000 * count))).reshape(1000, count)
        moses = compare(first, second, drawn, "none")
        expected = case["moses_srand_7"]
        assert moses.p_moses == expected["p_value"], case["id"]
        for mine, theirs in zip(
            (moses.score_interval, moses.baseline_interval), expected["ci95"], strict=True
        ):
            assert mine == pytest.approx([100 * value for value in theirs], abs=1e-9)


def test_the_bootstrap_is_sacrebleus_on_text_of_our_own() -> None:
    systems, references = [SYSTEM * 4, BASELINE * 4], REFERENCE * 4
    official = PairedTest(
        [("baseline", systems[1]), ("system", systems[0])], {"BLEU": BLEU()}, [references], "bs", 1000
    )
    expected = official()[1]["BLEU"][1]
    text = [
        TextLines(name, lines) for name, lines in (("s", systems[0]), ("r", references), ("b", systems[1]))
    ]
    found = compare_translations(*text)["sacrebleu"]
    assert found["score"] == pytest.approx(expected.score)
    assert found["p_sacrebleu"] == pytest.approx(expected.p_value)
    assert found["p_sacrebleu"] < 0.05


def test_a_system_does_not_differ_from_itself() -> None:
    statistics = bleu_statistics(SYSTEM, REFERENCE, "13a")
    found = compare(statistics, statistics, bootstrap_draws(len(SYSTEM)), "exp")
    assert (found.p_moses, found.p_sacrebleu) == (1.0, 1.0)


def test_perl_draws_are_perls() -> None:
    # perl -e 'srand(S); print join ",", map { int(rand(1000)) } 1..6'
    found = np.stack(list(perl_draws(np.array([0, 999]), 1000, 6)))
    assert found.T.tolist() == PERL


def test_all_scores_of_a_system_with_what_to_mind() -> None:
    hypotheses = TextLines("hyp", ["the ol@@ d boat left left", ""])
    scores = score_translations(
        hypotheses, TextLines("ref", ["the old boat left .", "it &apos;s late ."]), "test"
    )
    assert scores.metrics["repetition"] == pytest.approx(100 / 6)
    assert scores.metrics["repetition_words"] == pytest.approx(100 / 5)
    assert scores.metrics["length_ratio"] == pytest.approx(100 * 5 / 9)
    assert scores.as_dict() | {"metrics": {}, "signatures": {}, "warnings": []} == {
        "task": "nmt",
        "split": "test",
        "n": 2,
        "metrics": {},
        "signatures": {},
        "warnings": [],
    }
    assert set(scores.metrics) == set(scores.signatures)
    assert len(scores.warnings) == 2
    assert "1 hypotheses are empty" in scores.warnings[0]
    assert "1 have Moses escapes" in scores.warnings[1]
    generated = score_translations(hypotheses, hypotheses, "test", tokens=[[1, 1, 2], [3]])
    assert generated.metrics["repetition"] == 25
    assert length_ratio([""], [""]) == 0


def test_files_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"a has 1 lines, b has 2 lines"):
        score_translations(TextLines("a", ["x"]), TextLines("b", ["x", "y"]), "test")
