"""fairseq files in and out, and the files that are refused."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.formats.fairseq import load_fairseq, to_fairseq
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY

ARGS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "activation_fn": "relu", "dropout": 0.3}


def fairseq_state(config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as fairseq writes it, and the same weights under our names."""
    model = tiny_model(config).float()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights["embedding.weight"][TOY.vocab_size :] = 0
    return to_fairseq(weights, TOY), weights


def written(path: Path, state: dict[str, Tensor], **rest: Any) -> Path:
    torch.save({"model": state, "extra_state": {"epoch": 3}, **rest}, path)
    return path


def refused(path: Path, *words: str, heads: int | None = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_fairseq(path, heads)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["args", "cfg"])
def test_an_nmt_file_comes_back_whole(tmp_path: Path, kind: str) -> None:
    state, weights = fairseq_state(TINY_NMT)
    settings = {"args": argparse.Namespace(**ARGS)} if kind == "args" else {"cfg": {"model": ARGS}}
    config, special, found, report = load_fairseq(written(tmp_path / "model.pt", state, **settings))
    assert config == replace(TINY_NMT, dropout=0.3, init_std=0.02)
    assert special == SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=3, vocab_size=29)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert set(report.ignored) == {"encoder.version", "decoder.version"}
    assert report.added == ()
    again = to_fairseq(found, special)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    load_weights(JanusModel(config, special, ParallelLayers()), found)


def test_a_bart_file_gets_a_length_head_and_its_own_mask(tmp_path: Path) -> None:
    state, _ = fairseq_state(replace(TINY, d_model=128))
    del state["decoder.embed_length.weight"]
    state["classification_heads.mnli.dense.weight"] = torch.zeros(2, 2)
    state = {name: x.half() for name, x in state.items()}
    config, special, found, report = load_fairseq(written(tmp_path / "bart.pt", state))
    assert special.mask == TOY.vocab_size - 1
    assert (config.heads, config.activation, config.layernorm_embedding) == (2, "gelu", True)
    assert not config.scale_embedding
    assert config.length_classes is None
    assert report.added == ("length_head.weight",)
    assert found["length_head.weight"].shape == (16, 128)
    assert "classification_heads.mnli.dense.weight" in report.ignored
    assert any("heads: 2 assumed" in note for note in report.notes)
    assert all(x.dtype == torch.float32 for x in found.values())
    assert load_fairseq(tmp_path / "bart.pt", heads=8)[0].heads == 8


class Trap:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


def test_files_that_cannot_be_taken_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, _ = fairseq_state(TINY_NMT)
    args = argparse.Namespace(**ARGS)
    refused(written(tmp_path / "trap.pt", state, args=Trap()), "refers to print", "argparse.Namespace")
    assert "code ran" not in capsys.readouterr().out
    whole = written(tmp_path / "cut.pt", state, args=args)
    whole.write_bytes(whole.read_bytes()[:5000])
    refused(whole, "cannot be read", "again")
    (tmp_path / "text.pt").write_text("no checkpoint at all")
    refused(tmp_path / "text.pt", "not a torch checkpoint")
    refused(written(tmp_path / "headless.pt", state), "how many attention heads", "--heads")
    refused(written(tmp_path / "other.pt", {"weight": torch.zeros(1)}), "encoder.embed_tokens.weight")
    narrow = {name: x for name, x in fairseq_state(TINY)[0].items() if "embed_length" not in name}
    refused(written(tmp_path / "narrow.pt", narrow), "how many attention heads", "multiple of 64", "--heads")
    pre_norm = argparse.Namespace(**ARGS, encoder_normalize_before=True)
    refused(written(tmp_path / "pre.pt", state, args=pre_norm), "pre-norm")
    uneven = argparse.Namespace(**(ARGS | {"decoder_attention_heads": 2}))
    refused(written(tmp_path / "uneven.pt", state, args=uneven), "[2, 4]")
    refused(written(tmp_path / "told.pt", state, args=args), "has 4 attention heads, not 2", heads=2)
    assert load_fairseq(tmp_path / "told.pt", 4)[0].heads == 4
    loose = state | {"decoder.output_projection.weight": torch.zeros(29, 16)}
    refused(written(tmp_path / "loose.pt", loose, args=args), "not tied")
    gap = {name: x for name, x in state.items() if name != "decoder.layers.1.fc2.bias"}
    refused(written(tmp_path / "gap.pt", gap, args=args), "decoder.layers.1.fc2.bias is missing")
    wide = state | {"decoder.layers.1.fc1.weight": torch.zeros(25, 16)}
    refused(written(tmp_path / "wide.pt", wide, args=args), "decoder.layers.1.fc1.weight", "(25, 16)")
