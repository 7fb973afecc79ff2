"""Mask-predict without a model: re-mask counts, length candidates, order of filling, ties, scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from janus_ds.decode.generator import Generator
from janus_ds.decode.mask_predict import MaskPredictSettings, length_candidates, mask_predict, remask_counts

BOS, PAD, EOS, UNK, MASK, VOCAB = 0, 1, 2, 3, 4, 10
SPECIALS = (BOS, PAD, EOS, UNK, MASK)


@pytest.mark.parametrize(
    ("iterations", "inner", "counts"),
    [
        (1, 5, [2]),
        (1, 10, [5]),
        (1, 24, [12]),
        (4, 5, [4, 3, 2, 1]),
        (4, 10, [8, 6, 4, 2]),
        (4, 24, [19, 14, 9, 4]),
        (10, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (10, 24, [21, 19, 17, 15, 13, 10, 8, 6, 4, 2]),
    ],
)
def test_remask_counts_of_the_released_code(iterations: int, inner: int, counts: list[int]) -> None:
    passes = iterations + 1
    inner_R = torch.tensor([inner, 1])
    found = [remask_counts(inner_R, step, passes) for step in range(iterations)]
    assert [int(row[0]) for row in found] == counts
    assert all(int(row[1]) == 0 for row in found)


def test_length_candidates() -> None:
    logits_BK = torch.tensor([[0.0, 0.1, 5.0, 4.0, 3.0, 0.2], [9.0, 0.0, 1.0, 8.0, 2.0, 7.0]])
    # paper: the likeliest classes, best first, as lengths with bos and eos; at least one inner token.
    assert length_candidates(logits_BK, "paper", 3, "inner", 99).tolist() == [[4, 5, 6], [3, 5, 7]]
    assert length_candidates(logits_BK, "paper", 3, "inner", 6).tolist() == [[4, 5, 6], [3, 5, 6]]
    assert length_candidates(logits_BK, "paper", 9, "inner", 99).shape == (2, 6)
    # released: neighbours of the likeliest class, which counts bos and eos already.
    assert length_candidates(logits_BK, "released", 1, "with_specials", 99).tolist() == [[2], [2]]
    assert length_candidates(logits_BK, "released", 3, "with_specials", 99).tolist() == [[2, 2, 3], [2, 2, 2]]
    logits_BK[:, 5] = 10
    assert length_candidates(logits_BK, "released", 3, "with_specials", 99).tolist() == [[4, 5, 6]] * 2
    assert length_candidates(logits_BK, "released", 2, "with_specials", 99).tolist() == [[4, 5]] * 2
    assert length_candidates(logits_BK, "released", 5, "with_specials", 6).tolist() == [[3, 4, 5, 6, 6]] * 2


class Script:
    """A decoder that writes down what it is asked and answers from a table of log-probabilities.

    Column c of every row gets token `best[c]` with log-probability `score[pass][c]`.
    """

    def __init__(self, best: list[int], scores: list[list[float]]) -> None:
        self.best, self.scores = best, scores
        self.asked: list[list[list[int]]] = []
        self.seen: list[list[list[int]]] = []
        self.kept: list[list[int]] = []

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor, most: int) -> Tensor:
        rows, width = token_RL.shape
        self.asked.append([[i % width for i in picked_P.tolist() if i // width == r] for r in range(rows)])
        assert most == max(len(columns) for columns in self.asked[-1])
        self.seen.append(token_RL.tolist())
        return picked_P % width

    def keep(self, sentence_B: Tensor) -> None:
        self.kept.append(sentence_B.tolist())

    def logits(self, hidden_XD: Tensor) -> Tensor:
        score = self.scores[len(self.asked) - 1]
        logits = torch.full((len(hidden_XD), VOCAB), -math.inf, dtype=torch.float64)
        for row, column in zip(logits, hidden_XD.tolist(), strict=True):
            p = math.exp(score[column])
            # The rest of the probability goes to one special and one plain token, half each.
            shares = torch.tensor([p, (1 - p) / 2, (1 - p) / 2], dtype=torch.float64)
            row[[self.best[column], MASK, VOCAB - 1]] = shares.log()
        return logits


def settings(iterations: int, **changes: object) -> MaskPredictSettings:
    values = {
        "iterations": iterations,
        "bos": BOS,
        "eos": EOS,
        "pad": PAD,
        "mask": MASK,
        "forbidden": SPECIALS,
    }
    return MaskPredictSettings(**(values | changes))  # type: ignore[arg-type]


def test_the_least_certain_tokens_are_predicted_again_and_scores_are_the_last_ones() -> None:
    first = [0.0, -0.1, -0.4, -0.2, -0.4, -0.05, 0.0]
    second = [0.0, -0.01, -0.02, -0.03, -0.04, -0.05, 0.0]
    decoder = Script([0, 5, 6, 7, 8, 7, 0], [first, second])
    (found,) = mask_predict(decoder, torch.tensor([[7, 5]]), settings(1))
    # Pass 0 asks for all inner positions; of n = 5 (3), the 2 (1) least certain follow, ties from the left.
    assert decoder.asked[0] == [[1, 2, 3, 4, 5], [1, 2, 3]]
    assert decoder.seen[1] == [[BOS, 5, MASK, 7, MASK, 7, EOS], [BOS, 5, MASK, 7, EOS, PAD, PAD]]
    assert decoder.asked[1] == [[2, 4], [2]]
    by_tokens = {item.tokens: item.score for item in found}
    assert by_tokens[(5, 6, 7, 8, 7)] == pytest.approx((-0.1 - 0.02 - 0.2 - 0.04 - 0.05) / 5, abs=1e-12)
    assert by_tokens[(5, 6, 7)] == pytest.approx((-0.1 - 0.02 - 0.2) / 3, abs=1e-12)
    assert found[0].score == max(by_tokens.values())


def test_equally_uncertain_tokens_are_masked_from_the_left() -> None:
    flat = [[-0.3] * 6] * 2
    decoder = Script([0, 5, 6, 7, 8, 0], flat)
    mask_predict(decoder, torch.tensor([[6]]), settings(1))
    assert decoder.seen[1] == [[BOS, MASK, MASK, 7, 8, EOS]]


def test_released_scores_count_bos_and_eos_and_forbid_nothing() -> None:
    # Position 2 predicts MASK at first, so it is asked again though it is among the certain ones.
    first, later = [0.0, -0.3, -0.01, -0.3, 0.0], [0.0, -0.2, -0.1, -0.2, 0.0]
    decoder = Script([0, 5, UNK, 7, 0], [first, later])
    rules = settings(1, mask=UNK, forbidden=(), score="released")
    ((found,),) = mask_predict(decoder, torch.tensor([[5]]), rules)
    assert decoder.seen[1] == [[BOS, UNK, UNK, 7, EOS]]
    assert decoder.asked[1] == [[1, 2]]
    assert found.tokens == (5, UNK, 7)
    assert found.score == pytest.approx((-0.2 - 0.1 - 0.3) / 5, abs=1e-12)


def test_specials_are_forbidden_inside() -> None:
    # MASK is likelier than token 9, both likelier than token 5.
    scores = [[0.0, math.log(0.2), 0.0]]
    ((found,),) = mask_predict(Script([0, 5, 0], scores), torch.tensor([[3]]), settings(0))
    assert found.tokens == (9,)
    assert found.score == pytest.approx(math.log(0.4))
    ((found,),) = mask_predict(Script([0, 5, 0], scores), torch.tensor([[3]]), settings(0, forbidden=()))
    assert found.tokens == (MASK,)


def test_passes_stop_when_nothing_is_masked() -> None:
    decoder = Script([0, 5, 6, 0], [[-0.1] * 4] * 20)
    mask_predict(decoder, torch.tensor([[4]]), settings(10))
    # n = 2: floor(2 * (1 - (t + 1) / 11)) is 1 for t = 0 .. 4 and 0 afterwards, so 6 passes of 11; the
    # last 4 are given what the second was given.
    assert len(decoder.asked) == 2
    assert mask_predict(decoder, torch.tensor([[2]]), settings(3))[0][0].tokens == ()
    assert len(decoder.asked) == 2


@pytest.mark.parametrize("mode", ["nar", "aux"])
def test_lengths_that_are_cut_to_one_give_one_output(mode: str) -> None:
    made = Generator.from_checkpoint("demo", mode, device="cpu", max_length=2, length_beam=5)
    assert [len(item.tokens) for item in made.generate_nbest("Ich gehe nach Hause.")[0]] == [2]
