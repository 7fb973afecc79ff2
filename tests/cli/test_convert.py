"""`python -m janus_ds convert`: what is read, reported, refused, and written back."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus_ds.cli.convert import main
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.data.prepare.train_tokenizer import train_words
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError, ConfigError, DataError, JanusError, UsageError
from tests.support.hf_models import letters_tokenizer
from tests.support.released import FIXTURE, save_fairseq
from tests.support.tiny_run import make_random_run, make_run

WORDS = [f"w{i}" for i in range(22)] + ["un@@", "seen"]


@pytest.fixture
def nmt(tmp_path: Path) -> Path:
    """The released code's fixture as a fairseq file."""
    return save_fairseq(tmp_path / "model.pt", fixture_state(), heads=2)


def fixture_state() -> dict[str, Tensor]:
    return dict(FIXTURE["state_dict"])


def bart_state() -> dict[str, Tensor]:
    """The same weights in BART's form: a norm after the embeddings, no length head."""
    state = {name: value for name, value in fixture_state().items() if "embed_length" not in name}
    for side in ("encoder", "decoder"):
        state |= {
            f"{side}.layernorm_embedding.weight": torch.ones(32),
            f"{side}.layernorm_embedding.bias": torch.zeros(32),
        }
    return state


def write_dict(path: Path, words: list[str] = WORDS) -> Path:
    path.write_text("".join(f"{word} {100 - i}\n" for i, word in enumerate(words)))
    return path


def test_an_nmt_file_becomes_a_run_with_its_dictionary(
    nmt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--to", str(run), "--dict", str(write_dict(tmp_path / "dict.txt"))]
    assert main(["--from", "fairseq", str(nmt), *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"used      {len(fixture_state()) - 4} tensors of the file"
    assert {"ignored   encoder.version", "ignored   decoder.version"} <= set(printed)
    assert not any(line.startswith("added") for line in printed)
    assert printed[-1] == f"written: {run}"
    for mode in ("ar", "nar"):
        # Ids 4.. are the words; the fixture's source 9 8 7 6 5 4 is translated to 5 .. 10.
        generator = Generator.from_checkpoint(run, mode, device="cpu")
        (found,) = generator.generate(["w5 w4 w3 w2 w1 w0"])
        assert found.text == "w1 w2 w3 w4 w5 w6"
        assert generator.text is not None
        assert generator.text.encode("w0 un@@ seen never") == [4, 26, 27, 3]
        assert generator.text.decode([0, 26, 27, 4, 2, 1]) == "unseen w0"


def test_a_bart_file_decodes_autoregressively_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_fairseq(tmp_path / "bart.pt", bart_state())
    main(["--from", "fairseq", str(tmp_path / "bart.pt"), "--to", str(tmp_path / "run"), "--heads", "2"])
    assert "added     length_head.weight" in capsys.readouterr().out
    generator = Generator.from_checkpoint(tmp_path / "run", ids=True, device="cpu", max_length=5)
    objective, special = generator.config.objective, generator.special
    assert (objective.ar_stream, objective.decoder_start, special.mask) == ("content", "eos_bos", 27)
    assert len(generator.generate(["5 6 27"])[0].tokens) <= 5
    with pytest.raises(ConfigError, match="not trained to decode in mode 'nar'"):
        Generator.from_checkpoint(tmp_path / "run", "nar", ids=True, device="cpu")
    # Its length head was never trained, so the file that is written back has none.
    back_again = ["--to", "fairseq", str(tmp_path / "run"), "--output", str(tmp_path / "back.pt")]
    main(back_again)
    refused(UsageError, "the file is there already", back_again)
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == bart_state().keys()
    # fairseq would take other words for the special symbols.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["special_tokens"] |= {"bos": 1, "pad": 3, "unk": 0}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    refused(CheckpointError, "are 1, 3, 2, 0 in the run", [*back_again[:-1], str(tmp_path / "other.pt")])


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (ObjectiveConfig("paper"), "length_convention inner, mask_symbol mask, ar_query_position predicted"),
        (ObjectiveConfig("released", mask_symbol="mask"), "mask_symbol mask"),
        (ObjectiveConfig("ar"), "no length head"),
    ],
)
def test_what_fairseq_would_decode_otherwise_is_not_written(
    tmp_path: Path, objective: ObjectiveConfig, told: str
) -> None:
    run, back = (
        tmp_path / "run",
        ["--to", "fairseq", str(tmp_path / "run"), "--output", str(tmp_path / "x.pt")],
    )
    shape = ModelConfig(d_model=8, heads=2, ffn_dim=8, layernorm_embedding=False)
    make_random_run(run, objective, train_words(WORDS), shape)
    refused(CheckpointError, told, back)
    assert not (tmp_path / "x.pt").exists()


def test_a_bart_whose_decoder_starts_with_bos_is_no_fairseq_bart(nmt: Path, tmp_path: Path) -> None:
    make_random_run(
        tmp_path / "run",
        ObjectiveConfig("ar"),
        train_words(WORDS),
        ModelConfig(d_model=8, heads=2, ffn_dim=8),
    )
    command = ["--to", "fairseq", str(tmp_path / "run"), "--output", str(tmp_path / "x.pt")]
    refused(CheckpointError, "decoder_start bos", command)
    # What came from fairseq goes back.
    main(["--from", "fairseq", str(nmt), "--to", str(tmp_path / "nmt")])
    assert main(["--to", "fairseq", str(tmp_path / "nmt"), "--output", str(tmp_path / "back.pt")]) == 0


def test_made_up_words_of_barts_dictionary_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of bart.base goes on with 936 of them, before <mask>, which BART's tokenizer does not have."""
    letters_tokenizer(tmp_path / "words", 45)
    table, state = torch.randn(45, 32), bart_state()
    longer = torch.cat([table[:-1], torch.ones(9, 32), table[-1:]])
    tied = ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")
    save_fairseq(tmp_path / "bart.pt", {**state, **{f"{name}.weight": longer for name in tied}}, heads=2)
    flags = ["--to", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "words")]
    assert main(["--from", "fairseq", str(tmp_path / "bart.pt"), *flags]) == 0
    assert "9 rows before <mask>" in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    assert (run.special.mask, run.special.vocab_size) == (44, 45)
    assert torch.equal(run.model.output_weight[:45], table)


def test_the_mean_of_checkpoints_becomes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters_tokenizer(tmp_path / "data" / "tokenizer", 60)
    run, whole, last = (tmp_path / name for name in ("run", "mean", "last"))
    make_run(run, tmp_path / "data", "ar")
    base = ["--from", "run", str(run)]
    assert main([*base, "--average", "2", "--to", str(whole)]) == 0
    assert "the mean of step-00000005, step-00000010" in capsys.readouterr().out
    assert main([*base, "--to", str(last)]) == 0
    mean, newest, own = load_run(whole), load_run(last), load_run(run)
    for name, value in own.model.state_dict().items():
        torch.testing.assert_close(mean.model.state_dict()[name], value * 0.75)  # steps 5 and 10
        assert torch.equal(newest.model.state_dict()[name], value)
    assert replace(mean.config, name=own.config.name) == own.config
    sentence = Generator.from_checkpoint(last, device="cpu").generate(["a b"])[0]
    assert sentence.text == Generator.from_checkpoint(run, device="cpu").generate(["a b"])[0].text
    two, step = ["--average", "2"], str(run / "checkpoints" / "step-00000005")
    refused(UsageError, "one of its checkpoints is named", ["--from", "run", step, *two, "--to", "a"])
    refused(UsageError, "--average has no effect", ["--to", "hf", str(run), "--output", "b", *two])
    refused(UsageError, "holds a run already", [*base, "--to", str(whole)])


def refused(error: type[JanusError], text: str, arguments: list[str]) -> None:
    with pytest.raises(error, match=text) as caught:
        main(arguments)
    assert caught.value.where
    assert caught.value.fix


def test_a_file_without_a_length_head_is_refused(tmp_path: Path) -> None:
    plain = {name: value for name, value in fixture_state().items() if "embed_length" not in name}
    save_fairseq(tmp_path / "plain.pt", plain, heads=2)
    words = ["--from", "fairseq", str(tmp_path / "plain.pt"), "--to", str(tmp_path / "run")]
    refused(CheckpointError, "no length head", words)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_foreign_tokenizer_and_a_full_folder_are_refused(nmt: Path, tmp_path: Path) -> None:
    base = ["--from", "fairseq", str(nmt), "--to", str(tmp_path / "run")]
    short = write_dict(tmp_path / "short.txt", WORDS[:5])
    refused(DataError, "9 symbols, the model 28", [*base, "--dict", str(short)])
    (tmp_path / "odd.txt").write_text("word 5\nword\n")
    with pytest.raises(DataError) as caught:
        main([*base, "--dict", str(tmp_path / "odd.txt")])
    assert caught.value.where.endswith("odd.txt, line 2")
    (tmp_path / "empty").mkdir()
    refused(DataError, "holds no tokenizer", [*base, "--tokenizer", str(tmp_path / "empty")])
    refused(UsageError, "two tokenizers", [*base, "--dict", "a", "--tokenizer", "b"])
    refused(UsageError, "--license has no effect", [*base, "--license", "mit"])
    refused(UsageError, "--heads has no effect", ["--to", "hf", "a", "--output", "b", "--heads", "2"])
    main(base)
    refused(UsageError, "holds a run already", base)
