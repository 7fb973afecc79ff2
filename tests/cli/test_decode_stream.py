"""`janus-ds decode` as a tool in a pipe: lines appear as they are decoded, one for each input, in UTF-8."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from janus_ds.cli import decode
from janus_ds.cli.decode_lines import DecodeProgress
from janus_ds.decode.generator import Generator
from janus_ds.decode.text import one_line
from janus_ds.errors import ConfigError, DataError, UsageError
from tests.support.programs import ROOT

FAST = ["--demo", "--mode", "nar", "--iterations", "0", "--device", "cpu"]
LONG = "nein " * 200


def lines_of(path: Path, *arguments: object) -> list[str]:
    assert decode.main([*FAST, "--output", str(path), *map(str, arguments)]) == 0
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_lines_are_there_while_decoding_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe that stays open gets its answer; after an interruption the finished lines are in OUT.part."""
    out = tmp_path / "out.txt"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "eval/decode.py"), *FAST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
    )
    assert run.stdin is not None
    assert run.stdout is not None
    try:
        for _ in range(2):
            run.stdin.write("Können Sie das Fenster öffnen…?\n".encode())
            run.stdin.flush()
            assert select.select([run.stdout], [], [], 900)[0]
            assert run.stdout.readline().strip()
    finally:
        run.kill()
        run.communicate()

    many, done = tmp_path / "in.txt", 0
    many.write_text("Guten Morgen.\n" * 100)

    def interrupt(self: Generator, *arguments: object) -> object:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return generate_ids(self, *arguments)  # type: ignore[arg-type]

    generate_ids = Generator.generate_ids
    monkeypatch.setattr(Generator, "generate_ids", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lines_of(out, "--input", many)
    part = tmp_path / "out.txt.part"
    assert len(part.read_text().split("\n")) == 16 + 32 + 1
    assert f"not complete: 48 lines are in {part}" in capsys.readouterr().err
    assert not out.exists()
    # The same command again begins anew.
    assert len(lines_of(out, "--input", many)) == 100
    assert not part.exists()


def test_batches_and_windows_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    sentences = ["Guten Morgen.", "Wie geht es dir heute?", "", "Das Wetter ist schön, und wir gehen."]
    source.write_text("".join(f"{line}\n" for line in sentences * 15), encoding="utf-8")
    found = lines_of(tmp_path / "out.txt", "--input", source)
    assert found == lines_of(tmp_path / "out2.txt", "--input", source, "--batch-tokens", 30)
    assert found[:4] * 15 == found
    assert found[2] == ""
    for words, *options in (
        ("a batch cannot have", "--batch-tokens", 0),
        ("a batch cannot have", "--batch-tokens", -3),
        ("--beam 3 finds no 5 outputs", "--beam", 3, "--nbest", 5),
        ("--length-beam 1 finds no 2 outputs", "--mode", "nar", "--length-beam", 1, "--nbest", 2),
        ("progress cannot be told", "--progress-seconds", "nan"),
        ("there is no device 'meta'", "--device", "meta"),
        ("there is no mode ''", "--mode", ""),
    ):
        with pytest.raises(UsageError, match=words):
            lines_of(tmp_path / "out.txt", "--input", source, *options)
    with pytest.raises(UsageError, match="one file"):
        lines_of(source, "--input", source)
    assert source.read_text(encoding="utf-8").startswith("Guten")


def test_inputs_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text(f"Guten Morgen.\n{LONG}\nWie geht es dir?\n")
    cut = lines_of(out, "--input", source)
    assert "1 of 3 inputs is longer" in capsys.readouterr().err
    skipped = lines_of(out, "--input", source, "--on-long", "skip")
    assert "(line 2) and was skipped" in capsys.readouterr().err
    assert cut[1]
    assert skipped == [cut[0], "", cut[2]]
    targets = tmp_path / "targets.txt"
    targets.write_text("Good ___.\nA ___.\nHow are ___?\n")
    filled = lines_of(out, "--input", source, "--target", targets, "--on-long", "skip")
    assert filled[1] == ""
    assert filled[::2] == lines_of(out, "--input", source, "--target", targets)[::2]
    out.write_text("".join(f"{line}\n" for line in skipped))
    with pytest.raises(DataError, match="the model reads up to") as caught:
        lines_of(out, "--input", source, "--on-long", "stop")
    assert caught.value.where == "line 2 of the input"
    assert (tmp_path / "out.txt.part").read_text().split("\n") == [cut[0], ""]
    assert out.read_text().split("\n")[:-1] == skipped


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\r\nc", "a b  c"),
        ("a\u2028b\x85c\x0bd\x1ce\x00f", "a b c d e f"),
        ("half \ud83d of it", "half \ufffd of it"),
        (" tab\tstays, ½… as well ", "tab\tstays, ½… as well"),
    ],
)
def test_one_line_whatever_a_model_writes(text: str, line: str) -> None:
    assert one_line(text) == line
    assert len(line.encode().decode().splitlines()) == 1


def test_dated_progress(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, often = DecodeProgress(30.0, True), DecodeProgress(1e-9, True)
    for progress in (quiet, often):
        progress(1)
        progress.end(2)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2].split(",")[0] for line in said] == ["decoded 1 lines", "decoded 2 lines"]


def test_samples_and_what_is_known_of_outputs(tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Guten Morgen.\nWie geht es dir?\n")

    def lines(*arguments: str) -> list[str]:
        flags = ["--demo", "--device", "cpu", "--input", str(source), "--output", str(out)]
        assert decode.main([*flags, "--max-length", "10", *arguments]) == 0
        return out.read_text(encoding="utf-8").splitlines()

    hot = ["--mode", "ar", "--temperature", "1.5", "--top-p", "0.95", "--top-k", "50"]
    assert lines(*hot, "--seed", "3") == lines(*hot, "--seed", "3") != lines(*hot, "--seed", "4")
    rows = [json.loads(line) for line in lines(*hot, "--nbest", "2", "--jsonl")]
    assert [(row["line"], row["rank"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in rows:
        assert row["mode"] == "ar"
        assert len(row["token_scores"]) == row["passes"] - 1
        assert row["seconds"] > 0
    nbest = [line.split(" ||| ") for line in lines("--mode", "nar", "--nbest", "3", "--iterations", "1")]
    assert [number for number, _, _ in nbest] == ["0"] * 3 + ["1"] * 3
    scores = [float(score) for _, _, score in nbest]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    both = [json.loads(line) for line in lines("--mode", "ar,nar", "--jsonl", "--beam", "2")]
    assert [row["mode"] for row in both] == ["ar", "nar"] * 2
    assert both[1]["passes"] > 0
    assert both[0]["token_scores"]
    # So many at once are not drafted: what AR writes alone is still the row of the mode that was asked for.
    source.write_text("Guten Morgen.\nWie geht es dir?\n" * 3)
    both = [json.loads(line) for line in lines("--mode", "ar,draft", "--jsonl", "--beam", "2")]
    assert [row["mode"] for row in both] == ["ar", "draft"] * 6
    source.write_text("Guten Morgen.\nWie geht es dir?\n")
    begun = lines("--mode", "ar", "--beam", "2", "--prefix", "My old")
    assert [line[:6] for line in begun] == ["My old"] * 2
    with pytest.raises(ConfigError, match="the prefix has 12 tokens"):
        lines("--mode", "ar", "--prefix", "the " * 12)
    with pytest.raises(ConfigError, match="the tokenizer does not know"):
        lines("--mode", "ar", "--prefix", "\u4f60\u597d")


@pytest.mark.parametrize(
    ("mode", "options", "named"),
    [
        ("ar", ["--iterations", "2"], "--iterations"),
        ("ar,draft", ["--length-beam", "2"], "--length-beam"),
        ("nar", ["--early-stopping"], "--early-stopping"),
        ("ar", ["--aux-order", "certain"], "--aux-order"),
        ("ar", ["--top-p", "0.9"], "--top-p"),
        ("ar", ["--seed", "2"], "--seed"),
        ("ar", ["--early-stopping"], "--early-stopping"),
        ("ar", ["--data", "somewhere"], "--data"),
        ("ar", ["--nbest", "2", "--show-source"], "--nbest, --show-source"),
        ("ar", ["--nbest", "0"], "--nbest"),
        ("ar", ["--temperature", "1", "--beam", "2"], "--beam, --temperature"),
        ("nar", ["--target", "FILE", "--length-beam", "2"], "--length-beam, --target"),
        ("aux", ["--target", "FILE", "--nar-score", "paper"], "--nar-score, --target"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(mode: str, options: list[str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode.main(["--demo", "--device", "cpu", "--mode", mode, *options])
    assert caught.value.where == named
