"""launch/experiments/demo_denoiser.py: its text has nothing of the bundled corpus; a whole run."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import demo_denoiser as driver
import pytest

from janus_ds.errors import UsageError
from tests.support.experiment_runs import drive
from tests.support.texts import documents

DOCUMENTS = documents(80)


def shared(folder: Path) -> tuple[Path, str]:
    """Collections of two novels, one of them bundled in part, and of articles; and a bundled paragraph."""
    bundled = next(text for text in next(driver.documents(driver.BUNDLED)) if len(text) > 80)
    known, new = [f"KNOWN\n{bundled}\nThe end."], ["\n".join(DOCUMENTS[:40])]
    for name, texts in (("novels", known + new), ("wikipedia", DOCUMENTS[40:])):
        place, file = driver.SOURCES[name]
        (folder / place).mkdir(parents=True)
        (folder / place / file).write_bytes(lzma.compress("\n\n".join(texts).encode()))
    return folder, bundled


def test_the_text_has_nothing_of_the_bundled_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, bundled = shared(tmp_path / "shared")
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


def test_long_documents_are_cut_at_paragraphs() -> None:
    paragraphs = ["a" * 5000, "b" * 6000, "c" * 5000, "d" * 20000, "e"]
    parts = list(driver.pieces(paragraphs))
    assert "\n".join(parts).split("\n") == paragraphs
    assert [len(part) for part in parts] == [11001, 5000, 20000, 1]


@pytest.mark.parametrize("begun", [True, False])
def test_a_page_compares_with_what_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    content = json.loads((driver.ROOT / "docs/results/demo_denoiser.json").read_text())

    def run_logged(folder: Path, name: str, command: list[str]) -> None:
        told = content if begun else {key: value for key, value in content.items() if key != "before"}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(told))

    monkeypatch.setattr(driver, "run_logged", run_logged)
    page = tmp_path / "page.md"
    options = driver.parse(["--root", str(tmp_path), "--page", str(page), "--quickstart", str(tmp_path)])
    if begun:
        driver.make_page(options)
        assert json.loads(page.with_suffix(".json").read_text()) == content
        assert page.read_text() == (driver.ROOT / "docs/results/demo_denoiser.md").read_text()
        return
    with pytest.raises(UsageError, match="began with was not measured"):
        driver.make_page(options)
    assert not page.with_suffix(".json").exists()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_from_text_to_asset(tmp_path: Path) -> None:
    folder, _ = shared(tmp_path / "shared")
    root, asset = tmp_path / "root", tmp_path / "asset"
    small = ["model.d_model=16", "model.ffn_dim=16", "model.heads=2"]
    small += ["train.save_every=2", "train.valid_every=0"]
    drive(
        "demo_denoiser",
        root,
        folder,
        "--vocab",
        "120",
        "--steps",
        "4",
        "--longer-steps",
        "4",
        "--set",
        *small,
    )
    drive("demo_denoiser", root, folder, "--ship", "--asset", str(asset))
    record = json.loads((asset / "run.json").read_text())
    assert record["training"]["averaged_steps"] == [2, 4]
    assert record["recipe"]["objective"]["preset"] == "ar_query"
