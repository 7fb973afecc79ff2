"""`convert --from hf` and `--to hf`: forms of files, the report, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from janus_ds.checkpoint.tensors import read_weights, write_tensors
from janus_ds.cli.convert import main
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer
from janus_ds.data.text.tokenizer import ByteLevelBPE, load_tokenizer
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError, DataError, JanusError, UsageError
from tests.support.hf_folder import VOCAB_SIZE, hub_folder, hub_state


def convert(folder: Path, run: Path) -> None:
    assert main(["--from", "hf", str(folder), "--to", str(run)]) == 0


def refused(folder: Path, kind: type[JanusError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        main(["--from", "hf", str(folder), "--to", str(folder / "run")])
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.count("\n") == 2
    assert not (folder / "run" / "run.json").exists()


def test_a_folder_becomes_a_run_and_goes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = hub_folder(tmp_path / "hub")
    convert(hub, tmp_path / "run")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"used      {len(hub_state()) - 1} tensors of the file"
    assert "missing   lm_head.weight" in printed
    assert "added     length_head.weight" in printed
    report = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert sorted([*report["used"], "final_logits_bias"]) == sorted(hub_state())
    run = load_run(tmp_path / "run")
    assert (run.special.mask, run.special.vocab_size) == (VOCAB_SIZE - 1, VOCAB_SIZE)
    assert run.config.objective.ar_stream == "content"
    assert run.config.objective.decoder_start == "eos_bos"
    assert run.config.decode.beam_stop == "transformers"
    (found,) = Generator.from_checkpoint(tmp_path / "run", device="cpu", max_length=5).generate(["ab ce"])
    assert len(found.tokens) <= 5
    assert main(["--to", "hf", str(tmp_path / "run"), "--output", str(tmp_path / "back")]) == 0
    assert "ignored   length_head.weight" in capsys.readouterr().out
    back, first = load_file(tmp_path / "back" / "model.safetensors"), hub_state()
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)
    assert json.loads((hub / "config.json").read_text()) == json.loads(
        (tmp_path / "back" / "config.json").read_text()
    )
    (tmp_path / "back" / "vocab.json").unlink()
    fast = read_hf_tokenizer(tmp_path / "back")
    assert isinstance(fast, ByteLevelBPE)
    text = "abba <mask> cd.\nzz"
    assert fast.encode(text) == load_tokenizer(tmp_path / "run" / "tokenizer").encode(text)


def test_decoding_options_that_do_not_go_along_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(hub_folder(tmp_path / "hub"), tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    given = {"aux_order": "certain", "temperature": 0.5, "prefix": "ab", "threshold": 0.9}
    record["recipe"]["decode"] |= given
    # Rows of the encoder's table that BART's one size adds are zeros: no text may reach them.
    weights, positions = read_weights(tmp_path / "run" / "weights.safetensors"), "encoder.positions.weight"
    record["recipe"]["model"]["max_source_positions"] = 9
    record["recipe"]["data"]["block_tokens"] = 7
    write_tensors(
        tmp_path / "run" / "weights.safetensors", {**weights, positions: weights[positions][:9].clone()}
    )
    file.write_text(json.dumps(record))
    best = tmp_path / "run" / "checkpoints" / "best"
    best.mkdir(parents=True)
    (best / "best.json").write_text('{"step": 3}')
    capsys.readouterr()
    for kind in ("hf", "bart"):
        assert main(["--to", kind, str(tmp_path / "run"), "--output", str(tmp_path / kind)]) == 0
        told = capsys.readouterr().out
        for name, value in given.items():
            assert f"note      decode.{name} {value} is not known to the exported code" in told
        assert told.count("is not known") == len(given)
        # Those that `eval glge` scores.
        assert f"not the best: those are in {best}" in told
        settings = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert settings["model_max_length"] == 9


def test_all_forms_of_files_give_the_same_weights(tmp_path: Path) -> None:
    state = hub_state()
    names = sorted(state)
    first, second = {n: state[n] for n in names[:9]}, {n: state[n] for n in names[9:]}
    shards = {"a.safetensors": first, "b.safetensors": second}
    places = {n: shard for shard, part in shards.items() for n in part}
    copies = {
        f"model.{side}.embed_tokens.weight": state["model.shared.weight"] for side in ("encoder", "decoder")
    }
    copies["lm_head.weight"] = state["model.shared.weight"]
    bare = {n.removeprefix("model."): v for n, v in state.items() if n != "final_logits_bias"}
    convert(hub_folder(tmp_path / "whole"), tmp_path / "whole-run")
    for form in ("sharded", "pickled", "copies", "bare", "half"):
        folder = hub_folder(tmp_path / form)
        (folder / "model.safetensors").unlink()
        if form == "sharded":
            for shard, part in shards.items():
                save_file(part, folder / shard)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        elif form == "pickled":
            torch.save(state, folder / "pytorch_model.bin")
        elif form == "copies":
            torch.save({**state, **copies}, folder / "pytorch_model.bin")
        elif form == "bare":
            save_file({**bare, "encoder.version": torch.zeros(1)}, folder / "model.safetensors")
        else:
            save_file({n: v.half() for n, v in state.items()}, folder / "model.safetensors")
        convert(folder, tmp_path / f"{form}-run")
        ours, whole = (read_weights(tmp_path / f"{f}-run" / "weights.safetensors") for f in (form, "whole"))
        for name in whole:
            expected = whole[name].half().float() if form == "half" and "length" not in name else whole[name]
            assert torch.equal(ours[name], expected), (form, name)
    report = json.loads((tmp_path / "bare-run" / "conversion.json").read_text())
    assert report["ignored"] == ["encoder.version"]
    assert "shared.weight" in report["used"]


def test_fairseq_and_hugging_face_files_of_one_model_give_one_run(tmp_path: Path) -> None:
    state = {n.removeprefix("model."): v for n, v in hub_state().items() if n != "final_logits_bias"}
    table = state.pop("shared.weight")
    tied = ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")
    state |= {f"{name}.weight": table for name in tied}
    args = argparse.Namespace(encoder_attention_heads=2, decoder_attention_heads=2, activation_fn="gelu")
    torch.save({"args": args, "model": state}, tmp_path / "model.pt")
    convert(hub_folder(tmp_path / "hub"), tmp_path / "hf-run")
    flags = ["--to", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "hub")]
    assert main(["--from", "fairseq", str(tmp_path / "model.pt"), *flags]) == 0
    one, other = (read_weights(tmp_path / name / "weights.safetensors") for name in ("hf-run", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    ours, theirs = (load_run(tmp_path / name) for name in ("hf-run", "run"))
    assert ours.special == theirs.special
    assert ours.config.objective == theirs.config.objective
    # And back: every name of the file has its values again.
    assert main(["--to", "fairseq", str(tmp_path / "hf-run"), "--output", str(tmp_path / "back.pt")]) == 0
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert all(torch.equal(back[name], value) for name, value in state.items())
    # fairseq's fine-tuned models may end before <mask>.
    short = {n: v[:-1] if n.removesuffix(".weight") in tied else v for n, v in state.items()}
    torch.save({"args": args, "model": short}, tmp_path / "short.pt")
    flags = ["--to", str(tmp_path / "short"), "--tokenizer", str(tmp_path / "hub")]
    assert main(["--from", "fairseq", str(tmp_path / "short.pt"), *flags]) == 0
    assert load_run(tmp_path / "short").special == ours.special


def test_a_missing_mask_gets_a_row(tmp_path: Path) -> None:
    state = hub_state()
    state["model.shared.weight"] = state["model.shared.weight"][:-1].clone()
    del state["final_logits_bias"]
    folder = hub_folder(tmp_path / "hub", state, {"vocab_size": VOCAB_SIZE - 1})
    convert(folder, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.special.mask == VOCAB_SIZE - 1
    assert run.model.output_weight[VOCAB_SIZE - 1].any()
    report = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert f"embedding.weight[{VOCAB_SIZE - 1}] (<mask>)" in report["added"]


def test_settings_of_the_search_go_in_and_out(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", changes={"min_length": 9, "num_beams": 3})
    settings = {
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": "never",
        "no_repeat_ngram_size": 3,
        "min_length": 6,
        "max_length": 30,
        "repetition_penalty": 1.5,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    convert(folder, tmp_path / "run")
    decode = load_run(tmp_path / "run").config.decode
    assert (decode.beam, decode.beam_stop, decode.forbid) == (4, "never", "none")
    # Ours counts neither the start token nor <s> and </s>.
    assert (decode.min_length, decode.max_length) == (4, 27)
    notes = json.loads((tmp_path / "run" / "conversion.json").read_text())["notes"]
    assert [note for note in notes if "counterpart" in note] == [
        "do_sample True of the generation settings has no counterpart here"
    ]
    assert main(["--to", "hf", str(tmp_path / "run"), "--output", str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == settings
    # Without the file, transformers takes config.json's.
    (folder / "generation_config.json").unlink()
    convert(folder, tmp_path / "old")
    decode = load_run(tmp_path / "old").config.decode
    assert (decode.beam, decode.min_length, decode.forced_bos) == (3, 8, -1)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    cut = hub_folder(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(cut, CheckpointError, "cut or damaged", "model.safetensors", "again")
    (cut / "model.safetensors").unlink()
    refused(cut, CheckpointError, "holds no weights", "pytorch_model.bin")
    (cut / "pytorch_model.bin").write_bytes(data[:100])
    refused(cut, CheckpointError, "pytorch_model.bin")
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    refused(cut, CheckpointError, "a.safetensors", "missing")
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../a.safetensors"}}')
    refused(cut, CheckpointError, "weight_map")
    broken = hub_folder(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    refused(broken, CheckpointError, "not JSON", "config.json")


def test_other_models_are_refused(tmp_path: Path) -> None:
    changes = {
        "t5": ({"model_type": "t5"}, "'t5'"),
        "prenorm": ({"normalize_before": True}, "normalize_before"),
        "gelu_new": ({"activation_function": "gelu_new"}, "gelu_new"),
        "unequal": ({"decoder_ffn_dim": 32}, "decoder_ffn_dim 32"),
        "start": ({"decoder_start_token_id": 7}, "token 7"),
        "eos": ({"eos_token_id": 5}, "eos_token_id 5"),
        "gap": ({"d_model": None}, "d_model"),
    }
    for name, (change, word) in changes.items():
        folder = hub_folder(tmp_path / name, changes=change)
        if name == "start":
            (folder / "generation_config.json").unlink()
        refused(folder, CheckpointError, word, "config.json")
    negative = hub_folder(tmp_path / "negative")
    (negative / "generation_config.json").write_text('{"length_penalty": -0.5}')
    refused(negative, CheckpointError, "length_penalty is -0.5", "generation_config.json")
    mbart = {
        **hub_state(),
        **{f"model.{s}.layer_norm.weight": torch.ones(16) for s in ("encoder", "decoder")},
    }
    refused(
        hub_folder(tmp_path / "mbart", mbart), CheckpointError, "model.encoder.layer_norm.weight", "pre-norm"
    )
    biased = hub_state()
    biased["final_logits_bias"][0, 3] = 0.5
    refused(hub_folder(tmp_path / "biased", biased), CheckpointError, "final_logits_bias is not zero")
    loose = {**hub_state(), "lm_head.weight": torch.ones(VOCAB_SIZE, 16)}
    refused(hub_folder(tmp_path / "loose", loose), CheckpointError, "lm_head.weight is not tied")


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    wide = hub_folder(tmp_path / "wide", changes={"encoder_ffn_dim": 32, "decoder_ffn_dim": 32})
    refused(
        wide,
        CheckpointError,
        "disagree",
        "encoder.layers.0.fc1.weight has shape (24, 16), the model (32, 16)",
    )
    deep = hub_folder(tmp_path / "deep", changes={"decoder_layers": 3})
    refused(deep, CheckpointError, "disagree", "decoder.layers.2", "is missing")
    words = hub_folder(tmp_path / "words", changes={"vocab_size": VOCAB_SIZE + 1})
    refused(words, CheckpointError, "disagree", f"({VOCAB_SIZE}, 16)")
    large = hub_folder(tmp_path / "large", tokenizer=VOCAB_SIZE + 5)
    refused(large, CheckpointError, f"{VOCAB_SIZE + 5} symbols", f"{VOCAB_SIZE} rows")
    unread = hub_folder(tmp_path / "unread")
    (unread / "merges.txt").unlink()
    (unread / "vocab.json").rename(unread / "tokenizer.json")
    refused(unread, DataError, "tokenizer.json", "cannot be read")


def test_directions_must_be_clear(tmp_path: Path) -> None:
    for arguments in (["x", "--to", "hf"], ["--from", "hf", "x", "--to", "y", "--output", "z"]):
        with pytest.raises(UsageError, match="direction"):
            main(arguments)
    convert(hub_folder(tmp_path / "hub"), tmp_path / "run")
    with pytest.raises(UsageError, match="holds a model"):
        main(["--to", "hf", str(tmp_path / "run"), "--output", str(tmp_path / "hub")])
