"""An exported model converts with CTranslate2 and decodes there to the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.cli.convert import main
from janus_ds.decode.generator import Generator
from tests.support.hf_models import Shape, build_bart, letters_tokenizer

pytest.importorskip("transformers")
ctranslate2 = pytest.importorskip("ctranslate2")

TEXTS = ["ab cd efg", "x", "the quick brown fox jumps"]


def test_an_exported_model_decodes_in_ctranslate2(tmp_path: Path) -> None:
    build_bart(Shape(vocab_size=120)).save_pretrained(tmp_path / "hf")
    letters_tokenizer(tmp_path / "hf", 120)
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["--from", "hf", str(tmp_path / "hf"), "--to", str(run)]) == 0
    assert main(["--to", "hf", str(run), "--output", str(back)]) == 0
    ctranslate2.converters.TransformersConverter(str(back)).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    generator = Generator.from_checkpoint(run, "ar", device="cpu", beam=1, max_length=12)
    assert generator.text is not None
    symbols = generator.text._tokenizer  # type: ignore[attr-defined]
    sources = [[symbols.id_to_token(i) for i in (0, *generator.text.encode(text), 2)] for text in TEXTS]
    found = translator.translate_batch(
        sources,
        beam_size=1,
        target_prefix=[["<s>"]] * len(TEXTS),
        suppress_sequences=[["<s>"], ["<pad>"], ["<unk>"], ["<mask>"]],
        max_decoding_length=13,
    )
    ours = generator.generate(TEXTS)
    assert any(len(item.tokens) > 4 for item in ours)
    for theirs, item in zip(found, ours, strict=True):
        tokens = [symbols.token_to_id(t) for t in theirs.hypotheses[0] if t not in ("<s>", "</s>")]
        assert tokens[: len(item.tokens)] == list(item.tokens)
