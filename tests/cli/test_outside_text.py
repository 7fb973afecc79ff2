"""Text from outside (sources, outputs, names) is text wherever it is shown: terminal, logs, pages, cards."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from janus_ds.cli.decode_lines import Passage, as_blocks, as_json
from janus_ds.config.schema import DecodeConfig
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import markdown_text, one_line
from janus_ds.errors import DataError, PlainFormatter, exit_on_error
from janus_ds.evaluate.hf_folders import model_card
from janus_ds.report import page as page_module
from janus_ds.report.page import marked, write_report
from tests.support.hostile import ODD, PATHS, attacks, bounded, mutated, note, taken_or_refused

MARKUP = "<script>x</script> ![t](http://e/t.png) [l](http://e) <img src=x> http://e `c` **b** | $x$"
MARKUP += " {{7*7}} \"'&amp;"
EVIL = f"a\x1b]0;owned\x07b\x1b[2J\x9b31m\r{MARKUP}"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(place: str, text: str) -> None:
    found = len(CONTROL.findall(text))
    note("places where text from outside acts", 1, found > 0)
    assert not found, place


def test_sources_and_outputs_of_decode() -> None:
    passages = [Passage(source=EVIL, ids=[], reference=EVIL)]
    blocks = as_blocks(passages, 1, {})
    harmless("blocks", "".join(blocks))
    assert len(blocks) == 4
    (line,) = as_json(passages, 0, {"ar": [[Hypothesis((), 0.0, text=EVIL)]]}, 1)
    harmless("JSON", line)
    assert (json.loads(line)["source"], json.loads(line)["text"]) == (EVIL, one_line(EVIL))


def test_whatever_a_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8"))
    with pytest.raises(SystemExit):
        exit_on_error(lambda: print("first", EVIL, "", sep="\n"))
    text = printed.getvalue().decode()
    harmless("standard output", text)
    assert text == "first\n" + re.sub(CONTROL, lambda m: f"\\x{ord(m[0]):02x}", EVIL) + "\n\n"


def test_messages_and_logs() -> None:
    assert str(DataError("a\x1b]0;owned\x07", "b\r\x9b2J", "look")).splitlines() == [
        "error: a\\x1b]0;owned\\x07",
        "  where: b\\x0d\\x9b2J",
        "  to do: look",
    ]
    record = logging.LogRecord("janus_ds", logging.WARNING, "", 0, "%s is damaged", (EVIL,), None)
    harmless("log", PlainFormatter("%(levelname)s: %(message)s").format(record))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def no_markup(place: str, html: str) -> Page:
    """No link, script, or picture but those that stand in the page itself."""
    page = Page(html)
    foreign = [
        (tag, values)
        for tag, values in page.tags
        if tag in ("script", "a", "iframe")
        or (tag == "img" and not str(values.get("src")).startswith("data:"))
        or any(name.startswith("on") for name in values)
    ]
    note("places where text from outside acts", 1, len(foreign))
    assert not foreign, place
    return page


def make_run(folder: Path, scores: Any) -> Path:
    """A run whose every name and text is hostile."""
    base = folder / "eval" / "test"
    base.mkdir(parents=True)
    (base / "scores.json").write_text(json.dumps(scores))
    for name in ("references", "sources", "ar"):
        (base / f"{name}.txt").write_text(f"{EVIL[:-6]}\n".replace("\r", " "))
    record: dict[str, Any] = {
        "command": [EVIL],
        "recipe": {"objective": {"preset": EVIL}, "train": {"max_steps": 9}},
    }
    record["attempts"] = [{"time": EVIL, "command": [EVIL], "step": 0, "ended": EVIL}]
    record |= {"hardware": {"gpus": [EVIL], "machine": EVIL}, "versions": {"torch": EVIL}, "git_commit": EVIL}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text(json.dumps(LINES[0]))
    return folder


METRICS = {"sacrebleu": 1.0, EVIL: 2.0, "bleu4": 10**400, "f1": float("nan"), "chrf": 1e299}
SCORES = {
    "systems": {
        name: {"task": "nmt", "split": "test", "n": 1, "metrics": METRICS, "signatures": {EVIL: EVIL}}
        for name in ("ar", "nar-1", MARKUP.replace("/", ""))
    }
}


def test_a_report_has_only_its_own_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / MARKUP.replace("/", "") / "x\x1b[2J", SCORES)
    page = write_report([run], tmp_path / "report", "test", 6, ["report", EVIL])[0].read_text()
    harmless("report", page)
    text = no_markup("report", page).text
    assert "owned" in text
    assert "{{7*7}}" in text


def card_of(folder: Path) -> str:
    config = SimpleNamespace(name=EVIL, decode=DecodeConfig())
    run: Any = SimpleNamespace(config=config, model=SimpleNamespace(parameters=list))
    run.folder, run.weights, run.weights_sha256 = folder, folder / "weights.safetensors", "ab"
    return model_card(run, ["ar"], False, None)


def test_a_model_card_has_only_its_own_markup(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "run", SCORES))
    harmless("model card", card)
    assert "http://e" in no_markup("model card", markdown.markdown(card, extensions=["tables"])).text


def test_samples_in_tensorboard() -> None:
    text = markdown_text(EVIL)
    harmless("TensorBoard", text)
    assert MARKUP in no_markup("TensorBoard", markdown_to_safe_html(f"- **ar**: {text}")).text


def test_long_texts_are_not_compared_for_hours() -> None:
    long = "a b " * 50_000
    with bounded():
        assert marked(long, f"{long}c") == [{"kind": "same", "text": f"{long}c"}]
        assert marked("a" + " " * 100_000, "a") == [{"kind": "same", "text": "a"}]


def test_names_in_scores_lead_out_of_no_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("s3cret\n")
    (tmp_path / "run" / "report").mkdir(parents=True)
    for name, task in (("../../../secret", "nmt"), ("ar", "../../evil"), ("ar", "/tmp/evil")):
        folder = tmp_path / "run" / str(len(list(tmp_path.iterdir())))
        run = make_run(folder, {"systems": {name: {"task": task, "metrics": {"sacrebleu": 1.0}}}})
        page, *pictures = write_report([run], tmp_path / "run" / "report", "test", 6, [])
        outside = [path for path in pictures if path.resolve().parent != page.resolve().parent]
        note("names that write outside the folder", 1, len(outside))
        assert not outside
        assert "s3cret" not in page.read_text()
        shutil.rmtree(folder)


LINES = [{"step": 1, "ar": 1.0, "valid/bleu_ar": 2.0, "samples_total": 5}, {"step": 2, "ar": 2.0}]


@attacks(20)
@given(path=PATHS, odd=ODD, which=st.sampled_from(["scores", "run", "lines"]))
def test_mutated_run_folders(
    tmp_path_factory: pytest.TempPathFactory, path: list[int], odd: Any, which: str
) -> None:
    run = make_run(tmp_path_factory.mktemp("run") / "x", SCORES)
    scores, record = run / "eval" / "test" / "scores.json", run / "run.json"
    if which == "scores":
        scores.write_text(json.dumps(mutated(SCORES, path, odd)))
    elif which == "run":
        record.write_text(json.dumps(mutated(json.loads(record.read_text()), path, odd)))
    else:
        changed = mutated(LINES, path, odd)
        lines = changed if isinstance(changed, list) else [changed]
        (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    no_pictures = {name: lambda *_: [] for name in ("draw_task_pictures", "draw_curve_pictures")}
    with patch.multiple(page_module, **no_pictures), taken_or_refused():
        write_report([run], run / "report", "test", 6, [])
    with taken_or_refused():
        card_of(run)
