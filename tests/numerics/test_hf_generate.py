"""Published models decode as their settings ask: token by token what `generate` of transformers gives.

Every group of searches (greedy, and a beam of 4 with three length penalties) runs over random models whose
sentences end early or late, and over random combinations of the settings that published BARTs come with.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.cli.convert import main
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.model.formats.hf_export import export_generation
from janus_ds.model.formats.hf_import import GENERATION_FILE, read_search
from tests.support.hf_models import SHAPES, build_bart, padded_sources

transformers = pytest.importorskip("transformers")

SHAPE = SHAPES["small"]
MASK = SHAPE.vocab_size - 1
BIASES = (5.0, 8.0, 14.0)
CHOICES: dict[str, list[Any]] = {
    "no_repeat_ngram_size": [0, 1, 2, 3],
    "min_length": [0, 2, 6, 11],
    "repetition_penalty": [1.0, 1.0, 1.4, 0.8],
    "early_stopping": [False, True, "never"],
    "forced_bos_token_id": [0, 0, None, 7],
    "forced_eos_token_id": [2, 2, None, 9],
    "max_length": [12, 24, 40],
    "bad_words_ids": [None, [[0], [1], [3], [MASK]], [[5], [3]]],
}
GROUPS = [(1, 1.0), (4, 0.5), (4, 1.0), (4, 2.0)]
SENTENCES = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> list[tuple[Any, LoadedRun, Path]]:
    """Models of transformers whose eos is likelier and likelier, each with the run made of it."""
    found = []
    for seed, bias in enumerate(BIASES):
        folder = tmp_path_factory.mktemp(f"bias-{bias}")
        bart = build_bart(SHAPE, seed)
        with torch.no_grad():
            # The mean of what meets the output layer is the last norm's bias.
            mean = bart.model.decoder.layers[-1].final_layer_norm.bias.normal_(0.0, 1.0)
            bart.model.shared.weight[2] += bias * mean / mean.square().sum()
        bart.save_pretrained(folder / "hf")
        assert main(["--from", "hf", str(folder / "hf"), "--to", str(folder / "run")]) == 0
        found.append((bart, load_run(folder / "run"), folder / "hf"))
    return found


def searches(models: list[tuple[Any, LoadedRun, Path]], beam: int, penalty: float, count: int) -> list[bool]:
    """Run `count` searches both ways and compare their outputs; whether each stopped by itself."""
    draw, stopped = random.Random(f"{beam} {penalty}"), []
    while len(stopped) < count:
        bart, run, folder = models[draw.randrange(len(models))]
        settings = {name: draw.choice(values) for name, values in CHOICES.items()}
        settings |= {"num_beams": beam, "length_penalty": penalty, "decoder_start_token_id": 2}
        settings |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
        settings = {name: value for name, value in settings.items() if value is not None}
        (folder / GENERATION_FILE).write_text(json.dumps(settings))
        notes: list[str] = []
        search = read_search(folder, {}, run.special, SHAPE.positions, notes)
        assert not notes
        source_BS, mask_BS = padded_sources(
            SHAPE.vocab_size, [draw.randint(3, 20) for _ in range(SENTENCES)], draw.randrange(1000)
        )
        bart.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        rows = bart.generate(input_ids=source_BS, attention_mask=mask_BS)
        config = replace(run.config, decode=search[1])
        inner = [row[1 : int(n) - 1].tolist() for row, n in zip(source_BS, mask_BS.sum(1), strict=True)]
        ours = Generator(run.model, None, config, batch_sentences=5).generate_ids(inner)
        for own, row in zip(ours, rows.tolist(), strict=True):
            expected = written(row[1:], settings)
            assert list(own[0].tokens) == expected, settings
            stopped.append(len(expected) < settings["max_length"] - 3)
        # Written back, they are the same search.
        (folder / GENERATION_FILE).write_text(json.dumps(export_generation(config, run.special)))
        assert read_search(folder, {}, run.special, SHAPE.positions, notes) == search
    return stopped


def written(row: list[int], settings: dict[str, Any]) -> list[int]:
    """What `generate` wrote, without the forced <s>, eos, and what pads it."""
    skip = int(settings.get("forced_bos_token_id") == 0)
    return row[skip : row.index(2) if 2 in row else None]


@pytest.mark.parametrize(("beam", "penalty"), GROUPS)
@pytest.mark.parametrize("count", [60, pytest.param(504, marks=pytest.mark.heavy)])
def test_searches_give_the_tokens_of_generate(models: Any, beam: int, penalty: float, count: int) -> None:
    stopped = searches(models, beam, penalty, count)
    assert len(stopped) >= count
    print(f"\nbeam {beam}, penalty {penalty}: {len(stopped)} searches equal, {sum(stopped)} ended early")
    assert 2 * sum(stopped) >= len(stopped)
