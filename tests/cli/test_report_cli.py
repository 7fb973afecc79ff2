"""`eval/report.py` and the results page of the Multi30k experiment, on made-up runs."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from janus_ds.__main__ import main
from janus_ds.errors import JanusError, UsageError
from tests.support.report_runs import MadeUp

MODES = {"ar": (30.0, 50.0, 40.0), "nar-0": (20.0, 300.0, 5.0), "nar-10": (28.0, 40.0, 44.0)}
VOID = {"meta", "img", "br"}


def run(*arguments: object) -> int:
    """`janus-ds` in this process."""
    return main([str(argument) for argument in arguments])


class Balanced(HTMLParser):
    """Collects open elements, and what an element points to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_page(folder: Path) -> tuple[str, list[str]]:
    """The page and what it points to; every element is closed."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text, parser.links


def test_one_page_holds_everything(tmp_path, capsys):
    first = MadeUp(modes={**MODES, "nar + rescore": (29.0, 30.0, 50.0)}).write(tmp_path / "janus")
    plain = MadeUp("ar", modes={"ar": (31.0, 60.0, 38.0)}, curves=["ar"]).write(tmp_path / "ar<1>")
    begun = MadeUp("cmlm", steps=40, curves=["nar"]).write(tmp_path / "cmlm")
    out = tmp_path / "report"
    assert run("report", first, plain, begun, "--output", out, "--samples", 3) == 0
    assert "wrote" in capsys.readouterr().out
    text, links = read_page(out)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["index.html", "losses.png", "nmt_iterations.png", "nmt_time.png", "validation_bleu.png"]
    # Self-contained: the pictures are in it, byte for byte, and nothing points outside.
    assert all(link.startswith("data:image/png;base64,") for link in links)
    inside = {base64.b64decode(link.split(",")[1]) for link in links}
    assert inside == {path.read_bytes() for path in out.glob("*.png")}
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    for part in (
        "3 runs; nmt test, n = 3; made 20",
        "ar&lt;1&gt;",
        "<b>cmlm</b>: not finished, or stopped early: 40 of 1,000 updates",
        "nar + rescore",
        "two dogs &lt;run&gt; &amp; play",
        "warning, ar&lt;1&gt;: &lt;few&gt; sentences",
        "commit 0123456789ab",
        "launch/finetune.py --set",
        "janus-ds report",
        "scored: step-00001000, mean of 5 checkpoint(s)",
    ):
        assert part in text, part
    assert "ar<1>" not in text
    # Pictures of an earlier report do not stay beside a page that has none; what is not its own does.
    (out / "mine.png").write_bytes(b"mine")
    assert run("report", begun, "--output", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "losses.png", "mine.png"]


def test_runs_that_were_scored_on_other_texts_are_told(tmp_path):
    first, second, third = (MadeUp(modes={"ar": (30.0, 60.0, 38.0)}).write(tmp_path / name) for name in "abc")
    (third / "eval/test/references.txt").write_text("other\nlines\nhere\n")
    assert run("report", first, second, third, "--output", tmp_path / "page") == 0
    text, _ = read_page(tmp_path / "page")
    told = "nmt: scored on another text than a; their figures do not compare"
    assert text.count(told) == text.count(f"<b>c</b>: {told}") == 1


def test_scores_of_glge_and_runs_without_scores_make_pages(tmp_path):
    folder = tmp_path / "glge"
    folder.mkdir()
    scores = {"task": "xsum", "split": "test", "n": 2, "metrics": {"rouge1": 41.0, "overall": 30.0}}
    (folder / "scores.json").write_text(json.dumps(scores))
    assert run("report", folder, "--output", tmp_path / "a") == 0
    text, links = read_page(tmp_path / "a")
    assert links == []
    for part in (
        "ROUGE-1",
        "41.00",
        "no metrics.jsonl",
        "No outputs lie beside",
        "No run has measured speeds",
    ):
        assert part in text
    begun = MadeUp(steps=40, curves=[]).write(tmp_path / "begun")
    assert run("report", begun, "--output", tmp_path / "b", "--samples", 0) == 0
    text, links = read_page(tmp_path / "b")
    assert len(links) == 1
    assert "No run has scores yet" in text


def test_faults_have_three_parts(tmp_path, capsys, monkeypatch):
    good = MadeUp(steps=20).write(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")

    def fault(*arguments: object) -> JanusError:
        with pytest.raises(JanusError) as caught:
            run("report", *arguments)
        assert all((caught.value.what, caught.value.where, caught.value.fix))
        return caught.value

    for arguments in ((tmp_path / "rum",), (tmp_path / "empty",), ("--output", tmp_path / "x")):
        assert isinstance(fault(*arguments), UsageError)
    assert "did you mean 'run'" in fault(tmp_path / "rum").fix
    assert "-1 samples" in fault(good, "--samples", -1).what
    assert isinstance(fault(good, "--output", tmp_path / "file" / "x"), UsageError)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    missing = fault(good, "--output", tmp_path / "x")
    assert missing.exit_code == 8
    assert "janus_ds[plots]" in missing.fix
    assert not (tmp_path / "x").exists()
