"""Scores of translations against fairseq's, Moses' and sacreBLEU's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from janus_ds.errors import UsageError
from janus_ds.metrics.rouge import perl_draws
from janus_ds.metrics.scores import TextLines
from janus_ds.metrics.translation import (
    compare_translations,
    compound_bleu,
    length_ratio,
    remove_bpe,
    repetition,
    sacrebleu_13a,
    score_translations,
    split_compounds,
    tokenized_bleu,
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
def test_repetition_is_definition_a(origin: str) -> None:
    for case in metric_cases(f"repetition.{origin}"):
        found = repetition([line.split() for line in case["hyp"]])
        assert found == pytest.approx(case["expected"]["A_consecutive_percent"], abs=1e-9), case["id"]
    assert repetition([[5, 5, 7], []]) == pytest.approx(100 / 3)
    assert repetition([]) == 0


def compared(system: list[str], baseline: list[str], references: list[str]) -> dict[str, Any]:
    given = {"system": system, "references": references, "baseline": baseline}
    return compare_translations(*(TextLines(name, lines) for name, lines in given.items()))


def test_p_values_are_those_of_moses_and_sacrebleu() -> None:
    for case in metric_cases("significance.real"):
        found = compared(case["hyp1"], case["hyp2"], case["ref"])["tokenized_bleu"]
        assert found["p_moses"] == case["numpy_default_rng_12345_p_moses"], case["id"]
        if case["id"] != "same_system":  # where sacreBLEU's strict ">" claims a difference
            expected = case["sacrebleu_paired_bs"]["p_value"]
            assert found["p_sacrebleu"] == pytest.approx(expected, abs=1e-12), case["id"]


def test_a_better_system_is_told_from_a_worse_one_and_from_itself() -> None:
    better = compared(SYSTEM * 4, BASELINE * 4, REFERENCE * 4)
    same = compared(SYSTEM, SYSTEM, REFERENCE)
    for name, metric in {"sacrebleu": sacrebleu_13a, "tokenized_bleu": tokenized_bleu}.items():
        found = better[name]
        assert found["score"] == pytest.approx(metric(SYSTEM * 4, REFERENCE * 4).score)
        assert found["baseline"] == pytest.approx(metric(BASELINE * 4, REFERENCE * 4).score)
        assert found["p_moses"] < found["p_sacrebleu"] < 0.05
        middle, half = found["score_interval"]
        assert 0 < middle - half < found["score"] < middle + half <= 100
        assert (same[name]["p_moses"], same[name]["p_sacrebleu"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("system", "baseline", "references"),
    [
        (SYSTEM[:1], BASELINE[:1], REFERENCE[:1]),
        (SYSTEM[:1] * 3, BASELINE[:1] * 3, REFERENCE[:1] * 3),
        # Other words, equally wrong.
        (["a b c d e", "f g h i j"], ["a b c d k", "f g h i l"], ["a b c d m", "f g h i n"]),
    ],
)
def test_what_no_sample_can_tell_is_not_significant(
    system: list[str], baseline: list[str], references: list[str]
) -> None:
    found = compared(system, baseline, references)
    for name in ("sacrebleu", "tokenized_bleu"):
        assert (found[name]["p_moses"], found[name]["p_sacrebleu"]) == (1.0, 1.0)


def test_a_seed_that_is_none_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in ("abc", "-1", ""):
        monkeypatch.setenv("SACREBLEU_SEED", seed)
        with pytest.raises(UsageError, match="is no seed"):
            compared(SYSTEM, BASELINE, REFERENCE)
    for seed in ("7", "None"):
        monkeypatch.setenv("SACREBLEU_SEED", seed)
        assert compared(SYSTEM, BASELINE, REFERENCE)["seed"] == seed


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
    assert len(scores.warnings) == 3
    assert "1 hypotheses are empty" in scores.warnings[0]
    assert "1 have Moses escapes" in scores.warnings[1]
    assert "lower-cased" in scores.warnings[2]
    for line in ("As it was written.", "\u65e5\u672c"):
        text = TextLines("x", [line, line])
        assert not score_translations(text, text, "test").warnings
    generated = score_translations(hypotheses, hypotheses, "test", tokens=[[1, 1, 2], [3]])
    assert generated.metrics["repetition"] == 25
    assert length_ratio([""], [""]) == 0
