"""Blanks of a given target: what stands around them is kept, and what is put there is the search's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.cli.decode import main
from janus_ds.cli.decode_lines import Passage, with_targets
from janus_ds.config.modes import with_decode
from janus_ds.decode.generator import Generator
from janus_ds.decode.infill import Target
from janus_ds.decode.load import load_run
from janus_ds.decode.mask_predict import ANY_TOKEN, BEGINS_WORD, WITHIN_WORD
from janus_ds.errors import ConfigError, DataError, UsageError
from tests.decode.test_aux_search import PAPER, aux_logits
from tests.support.tiny_model import TINY, tiny_generator, tiny_model
from tests.support.two_stream import TOY

SOURCES = ["Das ist ein sehr großes Haus.", "Ich wohne in Berlin."]
TARGETS = ["That is  a <mask>___ house ☃.", "I ___ in ___ ."]


@pytest.fixture(scope="module")
def demo() -> dict[str, Generator]:
    run = load_run("demo", {"iterations": 2})
    return {
        mode: Generator(run.model, run.text, with_decode(run.config, {"mode": mode}))
        for mode in ("nar", "aux", "draft")
    }


@pytest.mark.parametrize("mode", ["nar", "aux"])
def test_given_text_is_kept_to_the_letter(demo: dict[str, Generator], mode: str) -> None:
    first, second = demo[mode].infill(SOURCES, TARGETS, (1, 2))
    assert first.text.startswith("That is  a ")
    assert first.text.endswith(" house ☃.")
    assert second.text.startswith("I live")
    assert second.text.endswith(" .")
    assert " in " in second.text
    for made in (first, second):
        assert made.passes
        assert made.mode == mode
    found = demo[mode].infill(SOURCES[0], "That is a very ___ house.")
    assert [item.text for item in found] == ["That is a very big house."]


def test_a_blank_takes_the_length_that_is_likeliest() -> None:
    """All combinations in one search are what each gives alone; given MASK-like tokens stay."""
    model = tiny_model(TINY, 1)
    for mode in ("nar", "aux"):
        generator = tiny_generator(model, PAPER, mode=mode, beam=1)
        rows = [(9, -1, 3, -1), (9, -1, -1, 3, -1), (9, -1, -1, 3, -1, -1)]
        alone = [
            generator.generate_ids([[7, 8, 9]], targets=[Target(("",), row, (row,))])[0][0] for row in rows
        ]
        together, _ = generator.generate_ids(
            [[7, 8, 9], [5, 6]],
            targets=[Target(("",), rows[0], tuple(rows)), Target(("",), rows[0], (rows[0],))],
        )
        best = sorted(alone, key=lambda item: -item.score)
        assert [item.tokens for item in together] == [item.tokens for item in best]
        assert [item.score for item in together] == pytest.approx([item.score for item in best])
        for item in together:
            kept = [token for place, token in enumerate(item.tokens) if place not in item.filled]
            assert kept == [9, 3]
            assert TOY.mask not in item.tokens


@pytest.mark.parametrize(("mode", "settings"), [("nar", {}), ("aux", {}), ("aux", {"temperature": 2.0})])
def test_a_blank_begins_as_the_text_before_it_says(
    demo: dict[str, Generator], mode: str, settings: dict[str, float]
) -> None:
    """Behind a space a word begins, behind a letter it goes on, whatever the model would rather write."""
    base = demo[mode]
    generator = Generator(base.model, base.text, with_decode(base.config, settings))
    decode, (first, *_) = generator._codec().decode, generator._codec().encode("a")
    wanted = {
        "That is a <mask>house.": [True],
        "Th<mask> is <mask> <mask> beautif<mask> house.": [False, True, False],
        "Hell<mask> , <mask> Tom ?": [False, True],
        "<mask> is good.": [],
    }
    for target, begins in wanted.items():
        (found,) = generator.infill(SOURCES[0], target, 2)
        rules = generator.targets(target, (2,))[0].candidates[0]
        ruled = [found.tokens[i] for i, rule in enumerate(rules) if rule in (BEGINS_WORD, WITHIN_WORD)]
        assert [decode([first, token])[1:2] == " " for token in ruled] == begins


@pytest.mark.parametrize("order", ["left_to_right", "certain"])
def test_samples_in_blanks_do_not_depend_on_the_targets_beside_them(order: str) -> None:
    base = tiny_generator(tiny_model(TINY, 1), PAPER, mode="aux", beam=1, temperature=1.0, seed=3)
    config = replace(base.config, masking=replace(base.config.masking, aux_order="random"))
    generator = Generator(base.model, None, with_decode(config, {"aux_order": order}))
    few, many = ((9, -1, 3), (9, -1, -1, 3)), tuple((-1,) * n for n in range(1, 8))
    first, second = Target(("",), few[0], few), Target(("",), many[0], many)
    (alone,) = generator.generate_ids([[7, 8, 9]], targets=[first])
    beside, other = generator.generate_ids([[7, 8, 9], [5, 6]], targets=[first, second])
    assert [item.tokens for item in beside] == [item.tokens for item in alone]
    assert (len(beside), len(other)) == (len(few), len(many))


def test_blanks_of_token_ids() -> None:
    """Numbers have no words that could begin."""
    (found,) = Generator.from_checkpoint("demo", mode="aux", ids=True).infill("5 6 7", "9 ___ 11")
    assert [found.tokens[0], found.tokens[2]] == [9, 11]
    assert found.text == f"9 {found.tokens[1]} 11"


@torch.no_grad()
def test_aux_fills_blanks_as_the_training_rows_say() -> None:
    model = tiny_model(TINY, 2)
    generator = tiny_generator(model, PAPER, mode="aux", beam=1)
    given = (ANY_TOKEN, 12, ANY_TOKEN, ANY_TOKEN, 14, ANY_TOKEN)
    (found,) = generator.generate_ids([[7, 8, 9, 10]], targets=[Target(("",), given, (given,))])
    written = {place: id_ for place, id_ in enumerate(given, 1) if id_ >= 0}
    slots = [place for place, id_ in enumerate(given, 1) if id_ < 0]
    for number, slot in enumerate(slots):
        ((_, allowed_NV),) = aux_logits(model, [[7, 8, 9, 10]], [written], [slots], TOY.mask)
        written[slot] = int(allowed_NV[number].argmax())
    assert list(found[0].tokens) == [written[place] for place in sorted(written)]
    assert found[0].filled == tuple(slot - 1 for slot in slots)


@pytest.mark.parametrize(
    ("target", "lengths", "told"),
    [
        ("nothing", (1,), "the target has no blank"),
        ("___ " * 99, (1,), "99 blanks are at least 99 positions"),
        ("___ a ___ b ___ c ___", (1, 2, 3), "more than 64 candidates"),
        ("___", (0,), "a blank cannot have 0 tokens"),
        ("That ___\u200b___ house.", (1,), "does not see what stands between two blanks"),
        ("___", (1, 1.5), r"a blank cannot have 1\.5 tokens"),
        ("___", (), "a blank cannot have no tokens"),
    ],
)
def test_targets_that_cannot_be_filled(
    demo: dict[str, Generator], target: str, lengths: tuple[Any, ...], told: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=told) as caught:
        demo["aux"].infill("Ja!", target, lengths)
    assert caught.value.where
    assert caught.value.fix
    with pytest.raises(ConfigError, match="mode draft writes from left to right"):
        demo["draft"].infill("Ja!", "___")
    with pytest.raises(DataError, match="of type NoneType") as caught:
        demo["aux"].infill(["Ja!"] * 2, ["___", None])  # type: ignore[list-item]
    assert caught.value.where == "line 2 of the target"


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target.txt"
    target.write_text("\n".join(TARGETS))

    def run(*options: str, sources: str = "\n".join(SOURCES)) -> str:
        (tmp_path / "sources.txt").write_text(sources)
        given = [] if "--heldout" in options else ["--input", str(tmp_path / "sources.txt")]
        assert main(["--demo", "--target", str(target), *given, *options]) == 0
        return capsys.readouterr().out

    first, second = run("--mode", "aux", "--blank-lengths", "1,2").splitlines()
    assert first.startswith("That is  a ")
    assert second.startswith("I live")
    assert "AUX" in run("--mode", "nar,aux") == run()
    target.write_text(f"{TARGETS[0]}\nI live here.")
    for mode in ("nar", "aux"):
        assert run("--mode", mode).splitlines()[1] == "I live here."
        assert run("--mode", mode, sources=f"{SOURCES[0]}\n\n").splitlines()[1] == "I live here."
    listed = [line.split(" ||| ") for line in run("--mode", "nar,aux", "--nbest", "1").splitlines()]
    assert [(number, mode) for number, _, mode, _ in listed] == [(n, m) for n in "01" for m in ("nar", "aux")]
    target.write_text("\n".join(TARGETS))
    for options, fault, told in (
        (("--mode", "draft"), UsageError, "mode draft does not use --target"),
        (("--mode", "nar", "--blank-lengths", "x"), UsageError, "'x' are no lengths"),
        (("--mode", "nar", "--blank-lengths", "1,²"), UsageError, "'1,²' are no lengths"),
        (("--mode", "nar", "--heldout", "2"), UsageError, "targets of their own"),
    ):
        with pytest.raises(fault, match=told):
            run(*options)
    # Before anything is decoded.
    monkeypatch.delattr(Generator, "generate_ids")
    with pytest.raises(DataError, match="fewer targets than inputs: 2 and 3"):
        run("--mode", "nar", sources="\n".join([*SOURCES, "Ja!"]))
    with pytest.raises(DataError, match="more targets than inputs: 2 and 1"):
        run("--mode", "nar", sources=SOURCES[0])
    # Of a pipe, whose lines are not known before.
    with pytest.raises(DataError, match="fewer targets than inputs"):
        with_targets([Passage([5], "Ja!")], iter(()), "targets.txt")
