"""The committed pages of docs/results are what their drivers make of the JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convergence
import demo_denoiser
import demo_scores
import glge_squadqg
import pytest
import ways_to_decode

ROOT = Path(__file__).resolve().parents[2]
RESULTS, ASSETS = ROOT / "docs" / "results", ROOT / "janus_ds" / "assets"


def training() -> Any:
    return json.loads((ASSETS / "denoiser" / "run.json").read_text())["training"]


PAGES: dict[str, Callable[[Any], str]] = {
    "convergence": convergence.page,
    "glge_squadqg": glge_squadqg.page,
    "ways_to_decode": ways_to_decode.page,
    "demo_denoiser": lambda found: demo_denoiser.page(training(), found),
    "demo_de_en": lambda _: demo_scores.page(ASSETS / "demo"),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_made_of_its_json(name: str) -> None:
    figures = RESULTS / f"{name}.json"
    content = json.loads(figures.read_text()) if figures.is_file() else None
    assert PAGES[name](content) == (RESULTS / f"{name}.md").read_text()


def test_training_that_went_on_from_a_shipped_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text((ASSETS / "demo" / "scores.json").read_text())
    pairs, before = {"train": 9, "joined": 1, "short": 1234}, {"ar": 12.0, "janus": 50.0}
    first = {"pairs": pairs, "minutes": before, "ar_steps": 5000, "averaged_steps": [6750, 7000]}
    longer = {
        "pairs": pairs,
        "minutes": {"janus": 20.0},
        "averaged_steps": [2000],
        "overrides": ["a=1", "b=2"],
    }
    (tmp_path / "run.json").write_text(json.dumps({"training": {**longer, "started_from": first}}))
    told = (
        "5,000 updates AR (12 min), then 7,000 updates JANUS (50 min of wall time); from the mean of its "
        "last checkpoints on (`--start`, `--set a=1 b=2`) 2,000 updates JANUS (20 min), with 1,234 copies"
    )
    assert told in demo_scores.page(tmp_path)
