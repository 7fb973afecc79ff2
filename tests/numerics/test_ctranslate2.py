"""Exported models of plain AR convert with CTranslate2 and decode there, text in and text out, as here."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.cli.convert import main
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.data.prepare.train_tokenizer import train_sentencepiece
from janus_ds.decode.generator import Generator
from tests.support.hf_models import Shape, build_bart, letters_tokenizer
from tests.support.tiny_run import make_random_run

transformers = pytest.importorskip("transformers")
ctranslate2 = pytest.importorskip("ctranslate2")

TEXTS = ["ab cd efg", "x", "the quick brown fox jumps"]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_an_exported_model_decodes_in_ctranslate2(tmp_path: Path, kind: str) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    if kind == "sentencepiece":
        bart = ModelConfig(
            d_model=32, heads=2, ffn_dim=48, encoder_layers=1, decoder_layers=1, max_source_positions=64,
            max_target_positions=64, init_std=0.4, layernorm_embedding=True, scale_embedding=False,
        )  # fmt: skip
        objective = ObjectiveConfig("ar", decoder_start="eos_bos")
        make_random_run(run, objective, train_sentencepiece(TEXTS * 9, "bpe", 60), bart)
    else:
        build_bart(Shape(vocab_size=120)).save_pretrained(tmp_path / "hf")
        letters_tokenizer(tmp_path / "hf", 120)
        assert main(["--from", "hf", str(tmp_path / "hf"), "--to", str(run)]) == 0
    assert main(["--to", "hf", str(run), "--output", str(back)]) == 0
    ctranslate2.converters.TransformersConverter(str(back)).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    generator = Generator.from_checkpoint(run, "ar", device="cpu", beam=1, max_length=12, forbid="specials")
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    found = translator.translate_batch(
        [tokenizer.convert_ids_to_tokens(row) for row in tokenizer(TEXTS)["input_ids"]],
        beam_size=1,
        target_prefix=[["<s>"]] * len(TEXTS),
        suppress_sequences=[["<s>"], ["<pad>"], ["<unk>"], ["<mask>"]],
        max_decoding_length=13,
    )
    ours = generator.generate(TEXTS)
    assert any(len(item.tokens) > 4 for item in ours)
    for theirs, item in zip(found, ours, strict=True):
        ids = tokenizer.convert_tokens_to_ids(theirs.hypotheses[0])
        # Behind the forced <s>; CTranslate2 forces no eos at the limit.
        text = tokenizer.decode(ids[1 : 1 + len(item.tokens)], skip_special_tokens=True)
        assert text == item.text
