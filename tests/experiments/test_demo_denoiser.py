"""launch/experiments/demo_denoiser.py: its text has nothing of the bundled corpus; its page; a whole run."""

from __future__ import annotations

import importlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.texts import documents

DOCUMENTS = documents(80)
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "experiments" / "demo_denoiser.py"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "launch" / "experiments")
    return importlib.import_module("demo_denoiser")


def shared(folder: Path, driver: ModuleType) -> tuple[Path, str]:
    """Collections of two novels, one of them bundled in part, and of articles; and a bundled paragraph."""
    bundled = next(text for text in next(driver.documents(driver.BUNDLED)) if len(text) > 80)
    known, new = [f"KNOWN\n{bundled}\nThe end."], ["\n".join(DOCUMENTS[:40])]
    for name, texts in (("novels", known + new), ("wikipedia", DOCUMENTS[40:])):
        place, file = driver.SOURCES[name]
        (folder / place).mkdir(parents=True)
        (folder / place / file).write_bytes(lzma.compress("\n\n".join(texts).encode()))
    return folder, bundled


def test_the_text_has_nothing_of_the_bundled_corpus(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bundled = shared(tmp_path / "shared", driver)
    monkeypatch.setenv("JANUS_SHARED_DATA", str(folder))
    counts = driver.write_text(tmp_path / "text.txt", 1, 1)
    text = (tmp_path / "text.txt").read_text()
    assert (counts["novels"], counts["novels_left_out"]) == (1, 1)
    assert counts["articles"] == len(DOCUMENTS[40:])
    assert bundled not in text
    assert "KNOWN" not in text
    assert DOCUMENTS[0] in text
    assert counts["bytes"] == (tmp_path / "text.txt").stat().st_size
    # Only as much as is asked for, whatever the order.
    some = driver.draw(DOCUMENTS, 0.002)
    assert some == driver.draw(reversed(DOCUMENTS), 0.002)
    assert 0 < sum(len(text.encode()) for text in some) <= 2000


def test_long_documents_are_cut_at_paragraphs(driver: ModuleType) -> None:
    paragraphs = ["a" * 5000, "b" * 6000, "c" * 5000, "d" * 20000, "e"]
    parts = list(driver.pieces(paragraphs))
    assert "\n".join(parts).split("\n") == paragraphs
    assert [len(part) for part in parts] == [11001, 5000, 20000, 1]


def test_the_page_says_what_was_measured(driver: ModuleType) -> None:
    counts = {"novels": 83, "novels_left_out": 10, "articles": 2261, "bytes": 31983132}
    held_out = {"denoiser": {"500": 4.5, "1000": 3.5}, "longer": {"1000": 2.5}}
    minutes = {"denoiser": 30.0, "longer": 60.0}
    training = {"text": counts, "held_out": held_out, "minutes": minutes, "averaged_steps": [750, 1000]}
    shown = [{"source": "a <mask> c", "reference": "a b c", "ar": "a b c", "nar": "a d c", "aux": "a e c"}]
    found = {"step": 300, "steps": 450, "passages": 4, "tokens": 1234, "shown": shown}
    found |= {"before": {"ar": 0.5, "nar": 0.125, "aux": 0}, "after": {"ar": 0.25, "nar": 1.0, "aux": 0.75}}
    found["rare"] = {"ar": 0.02, "nar": 0.05}
    page = driver.page_text(training, found)
    assert "AR 2, NAR 5 are found" in page
    assert "1,000 updates of 16 passages in 30 minutes of wall time, then 1,000 of 32 in 60 " in page
    assert "3.50 (update 1000); then 2.50 (update 1000)." in page
    assert "(450 updates)" in page
    assert "after update 300" in page
    assert "| NAR: all at once, from both sides | 12.5 % | 100.0 % |" in page
    assert "| AUX: one after another, from both sides | 0.0 % | 75.0 % |" in page
    assert "nar       a d c\naux       a e c" in page


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_from_text_to_asset(driver: ModuleType, tmp_path: Path) -> None:
    folder, _ = shared(tmp_path / "shared", driver)
    root, asset = tmp_path / "root", tmp_path / "asset"
    env = {**os.environ, "JANUS_SHARED_DATA": str(folder), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    small = [
        "model.d_model=16",
        "model.ffn_dim=16",
        "model.heads=2",
        "train.save_every=2",
        "train.valid_every=0",
    ]
    train = ["--vocab", "120", "--steps", "4", "--longer-steps", "4", "--set", *small]
    for options in (train, ["--ship", "--asset", str(asset)]):
        command = [sys.executable, str(SCRIPT), "--root", str(root), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        logs = "\n".join(path.read_text()[-1500:] for path in root.rglob("*.log"))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    record = json.loads((asset / "run.json").read_text())
    assert record["training"]["averaged_steps"] == [2, 4]
    assert record["recipe"]["objective"]["preset"] == "ar_query"
