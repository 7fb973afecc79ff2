"""What decoding on a device exchanges with the host, step by step; the tokens are those of the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode.infill import Target
from tests.support.operations import host_traffic, on_device
from tests.support.tiny_model import TINY, tiny_generator, tiny_model
from tests.support.two_stream import TOY

CONFIG = replace(TINY, max_target_positions=64)
RULES = {"no_repeat_ngram_size": 2, "repetition_penalty": 2.0}
ONE = [[5, 9, 13, 17, 21, 6]]
MANY = [*ONE, [7, 8], [9], [5, 6, 7, 8], [21, 5, 9], [6, 5], [13] * 5]
CASES = {
    "beam": ("ar", {"beam": 3}, {"max_length": 10}, {"max_length": 34}),
    "greedy": ("ar", {"beam": 1}, {"max_length": 10}, {"max_length": 34}),
    "rules": (
        "ar",
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        {"max_length": 9},
        {"max_length": 17},
    ),
    "nar": ("nar", {"length_beam": 3}, {"iterations": 2}, {"iterations": 6}),
    "threshold": ("nar", {"length_beam": 3, "iterations": None}, {"threshold": 0.1}, {"threshold": 0.9}),
    "draft": ("draft", {}, {"max_length": 8}, {"max_length": 28}),
    "aux": ("aux", {"length_beam": 1}, {"max_length": 6}, {"max_length": 14}),
}
"""Mode, settings, and two ways to change them, of which the second takes more passes."""
SHARES = {"ar": (1 / 8, 0), "nar": (1, 1), "aux": (1, 1), "draft": (1, 1)}
"""Copies from and to the device for each pass: beam search asks every 8 steps whether all is finished."""


SHORT = {"max_length": 18}
OTHER_WAYS = {
    "places refilled": ("ar", {"beam": 2, **SHORT}),
    "samples": ("ar", {"beam": 2, "temperature": 1.0, "top_k": 9, "top_p": 0.9, **SHORT}),
    "samples, rules": ("ar", {"temperature": 1.0, **RULES, **SHORT}),
    "drafts, drawn": ("draft", {"temperature": 0.8, **SHORT}),
    "aux, drawn": ("aux", {"temperature": 0.8}),
    "rescored": ("nar", {"rescore": "ar", "iterations": 1}),
    "released": ("nar", {"nar_score": "released", "iterations": 2}),
    "blanks": ("nar", {"iterations": 2}),
    "blanks, aux": ("aux", {}),
}
"""Mode and settings; all on sentences of several lengths, more than fit a batch."""


def traffic(
    patch: pytest.MonkeyPatch, mode: str, decode: dict[str, Any], given: list[list[int]], blanks: bool = False
) -> tuple[Counter[str], int]:
    """Transfers of one call by kind, and its passes."""
    model = tiny_model(CONFIG, seed=0)
    # No output ends before its longest length, which is also the likeliest for the length head.
    with torch.no_grad():
        model.embedding.weight[TOY.eos] = 0.0
        model.length_head.weight[14] += 9.0 * model.encode(*_padded(given[0])).states_BSD.mean((0, 1))
    built = tiny_generator(model, ObjectiveConfig(preset="paper"), mode=mode, **decode)
    targets = [Target((), (7, -1), ((7, -1), (7, -1, -1)))] * len(given) if blanks else None
    wanted = built.generate_ids(given, targets=targets)
    on_device(model)
    with host_traffic(patch) as seen:
        found = built.generate_ids(given, targets=targets)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [item.tokens for item in ours] == [item.tokens for item in theirs]
    kinds: Counter[str] = Counter()
    for (kind, _), count in seen.items():
        kinds[kind] += count
    return kinds, max(item.passes for item in found[0])


def _padded(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    row = [TOY.bos, *tokens, TOY.eos]
    return torch.tensor([row]), torch.tensor([len(row)])


@pytest.mark.parametrize("name", CASES)
def test_a_pass_waits_for_the_host_no_more_often_than_it_must(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, shared, short, long = CASES[name]
    few, passes = traffic(monkeypatch, mode, shared | short, ONE)
    many, more = traffic(monkeypatch, mode, shared | long, ONE)
    assert more >= passes + 2
    reads, uploads = SHARES[mode]
    assert many["read"] - few["read"] <= reads * (more - passes)
    assert many["upload"] - few["upload"] <= uploads * (more - passes)
    assert many["boolean index"] == few["boolean index"] == many["mixed"] == 0


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_no_operation_mixes_tensors_of_host_and_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = traffic(monkeypatch, *OTHER_WAYS[name], MANY, blanks=name.startswith("blanks"))
    assert seen["mixed"] == 0
    assert seen["upload"]


def test_passes_are_those_of_the_cpu_though_it_is_asked_less_often_whether_all_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(CONFIG, seed=0)
    built = tiny_generator(model, ObjectiveConfig(preset="paper"), mode="ar", beam=2, max_length=34)
    wanted = [[item.passes for item in group] for group in built.generate_ids(MANY)]
    on_device(model)
    with host_traffic(monkeypatch):
        found = [[item.passes for item in group] for group in built.generate_ids(MANY)]
    assert found == wanted
    assert any(group[0] % 8 and group[0] < 34 for group in wanted), "all end when they are asked"
