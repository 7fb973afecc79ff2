"""`janus-ds convert`: models of Hugging Face and fairseq into run folders, and back; means of checkpoints.

    janus-ds convert --from hf DIR --to RUN
    janus-ds convert --from fairseq model.pt --to RUN [--dict dict.txt | --tokenizer DIR]
    janus-ds convert --from run RUN --average 5 --to AVERAGED
    janus-ds convert --to hf RUN --output DIR [--license NAME]
    janus-ds convert --to bart RUN --output DIR
    janus-ds convert --to fairseq RUN --output model.pt

A converted folder holds what a run folder holds (`run.json`, `tokenizer/`, `weights.safetensors`), so
that decoding, `init` in a recipe and every other command take it, and `conversion.json`: what became
of every name in the file.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from janus_ds.batch import SpecialTokens
from janus_ds.checkpoint.tensors import write_tensors
from janus_ds.cli.arguments import at_least, new_parser
from janus_ds.config.locations import user_path
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, DecodeConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.decode.load import load_run
from janus_ds.decode.text import DICT_NAME, FairseqWords
from janus_ds.errors import CheckpointError, DataError, UsageError
from janus_ds.evaluate.evaluation import load_mean
from janus_ds.evaluate.hf_folders import REPORT_FILE, from_hf, refuse_run, to_hf, write_report
from janus_ds.io import atomic_dir, disk_faults, is_stream, make_folder, write_atomic
from janus_ds.model.formats.fairseq import ConversionReport, load_fairseq, to_fairseq
from janus_ds.observe import write_run_record

_WEIGHTS, _TOKENIZER = "weights.safetensors", "tokenizer"
_KINDS = ("hf", "fairseq")


def main(arguments: Sequence[str]) -> int:
    """Convert one checkpoint and print what became of its weights."""
    parsed = _parse(arguments)
    path, written = parsed.path, parsed.output or user_path(parsed.to)
    if parsed.source == "hf":
        if path.is_file():
            raise UsageError("a file, where a folder should be", str(path), "give the model's folder")
        report = from_hf(path, written)
    elif parsed.source == "fairseq":
        if parsed.dict and parsed.tokenizer:
            raise UsageError("two tokenizers were given", "--dict, --tokenizer", "give one of them")
        report = from_fairseq(path, written, parsed.dict or parsed.tokenizer, parsed.heads)
    elif parsed.source == "run":
        report = from_run(path, written, parsed.average or 1)
    elif parsed.to == "fairseq":
        report = _to_fairseq(path, written)
    else:
        report = to_hf(path, written, parsed.to == "bart", parsed.license)
    print("\n".join(report.lines()))
    if parsed.source is not None:
        print(f"every name: {written / REPORT_FILE}")
    print(f"written: {written}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("convert", "Models of Hugging Face and fairseq into run folders, and back.")
    add = parser.add_argument
    add("--from", dest="source", choices=(*_KINDS, "run"), help="what PATH is; --to names a run folder")
    add("path", type=user_path, help="hf: a folder; fairseq: a model.pt; else a run or checkpoint")
    mean = "run: mean of its last N checkpoints, as in eval; without it, the newest or the one named"
    add("--average", type=at_least(1), metavar="N", help=mean)
    add("--to", required=True, help="run folder to make; or hf, bart or fairseq, with --output")
    output = "hf: folder to make, with all ways of decoding; bart: the same as a plain BART, AR alone; "
    add("--output", type=user_path, help=output + "fairseq: model.pt to write")
    add("--license", metavar="NAME", help="hf, bart: of the weights, for the card")
    add("--dict", type=user_path, help="fairseq's dict.txt, for text that is cut into words")
    add("--tokenizer", type=user_path, help="folder with a SentencePiece or byte-level BPE model")
    add("--heads", type=at_least(1), help="attention heads, for fairseq files that do not tell")
    parsed = parser.parse_args(arguments)
    fix = "give --from KIND PATH --to RUN, or --to KIND RUN --output PLACE; see janus-ds convert --help"
    if (parsed.source is None) == (parsed.output is None):
        raise UsageError("the direction is not clear", "--from, --to, --output", fix)
    if parsed.output is not None and parsed.to not in (*_KINDS, "bart"):
        raise UsageError(f"there is no kind {parsed.to!r} to convert to", "--to", fix)
    _refuse_unused(parsed)
    return parsed


def _refuse_unused(parsed: argparse.Namespace) -> None:
    """Refuse, by name, an option that this kind of conversion would do nothing with."""
    exported = parsed.to in ("hf", "bart") and parsed.output is not None
    uses = dict.fromkeys(("dict", "tokenizer", "heads"), (parsed.source == "fairseq", "--from fairseq"))
    uses |= {"license": (exported, "--to hf or --to bart"), "average": (parsed.source == "run", "--from run")}
    for name, (used, kind) in uses.items():
        if getattr(parsed, name) is not None and not used:
            what = f"--{name} has no effect without {kind}"
            raise UsageError(what, f"--{name}", f"leave it out, or convert with {kind}")


def from_fairseq(
    path: Path, folder: Path, text: Path | None = None, heads: int | None = None
) -> ConversionReport:
    """Make a run folder of a fairseq checkpoint (NMT JANUS, JANUS-BART or BART).

    Args:
        folder: the run folder to make; it appears whole or not at all.
        text: a `dict.txt` or a tokenizer folder; None: the run decodes token ids.
        heads: attention heads, for files that do not tell.
    """
    refuse_run(folder)
    symbols = load_tokenizer(text).special.vocab_size if text is not None and text.is_dir() else None
    model, special, weights, report = load_fairseq(path, heads, symbols)
    config = _conventions(model, "length_head.weight" not in report.added, str(path))
    config = replace(config, name=folder.name)
    fingerprint = ""
    with disk_faults(folder), atomic_dir(folder) as new:
        if text is not None:
            fingerprint = _copy_text(text, new / _TOKENIZER, special)
        write_tensors(new / _WEIGHTS, weights)
        write_report(new, report)
        write_run_record(new, config, special, fingerprint, {"converted_from": path.name}, 0)
    return report


def from_run(path: Path, folder: Path, average: int = 1) -> ConversionReport:
    """Make a run folder of one checkpoint, or of the mean of a run's last ones, for all other commands.

    Args:
        folder: the run folder to make; it appears whole or not at all.
    """
    refuse_run(folder)
    run, files = load_mean(path, average, "cpu")
    weights, fingerprint = run.model.state_dict(), getattr(run.text, "fingerprint", "")
    steps = [file.parent.name for file in files]
    note = f"the mean of {', '.join(steps)}" if average > 1 else f"the weights of {steps[0]}"
    report = ConversionReport(tuple(weights), (), (), (note,))
    with disk_faults(folder), atomic_dir(folder) as new:
        if run.text is not None:
            shutil.copytree(run.folder / _TOKENIZER, new / _TOKENIZER)
        write_tensors(new / _WEIGHTS, weights)
        write_report(new, report)
        converted = {"converted_from": run.folder.resolve().name, "checkpoints": steps}
        write_run_record(new, replace(run.config, name=folder.name), run.special, fingerprint, converted, 0)
    return report


def _conventions(model: ModelConfig, has_length_head: bool, where: str) -> RunConfig:
    """How the model of a fairseq file was trained, as a run with every preset written out.

    A layer norm after the embeddings tells BART (content `e b w1 ..`) from NMT (content `b y1 ..`).

    Raises:
        CheckpointError: a plain NMT Transformer, whose decoder starts from eos.
    """
    bart = model.layernorm_embedding
    if not bart and not has_length_head:
        raise CheckpointError(
            "there is no length head: in fairseq that is a plain Transformer, whose decoder starts from eos",
            where,
            "convert models of NMT JANUS or of BART",
        )
    # A block is read and written.
    most = min(model.max_target_positions, model.max_source_positions if bart else model.max_target_positions)
    data = DataConfig(task="denoise" if bart else "pair", block_tokens=most - 2)
    objective = ObjectiveConfig(preset="ar")
    if has_length_head:
        objective = ObjectiveConfig(preset="released", weight_length=0.1, mask_symbol="unk")
    mode = "nar" if has_length_head else "ar"
    decode = DecodeConfig(mode=mode, iterations=10, length_beam=3, beam_stop="fairseq")
    return resolve(RunConfig(model=model, data=data, objective=objective, decode=decode))


def _copy_text(text: Path, folder: Path, special: SpecialTokens) -> str:
    """Put the tokenizer into the run folder, if it is the model's; gives its fingerprint."""
    if not text.is_dir():
        words = FairseqWords(text, special)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(text, folder / DICT_NAME)
        return words.fingerprint
    tokenizer = load_tokenizer(text)
    if tokenizer.special != special:
        raise DataError(
            f"the tokenizer has {tokenizer.special}, the model {special}",
            str(text),
            "give the tokenizer that the model was trained with",
        )
    tokenizer.save(folder)
    return tokenizer.fingerprint


def _to_fairseq(run: Path, file: Path) -> ConversionReport:
    """Write a run's weights as a fairseq file.

    Raises:
        UsageError: something is there already.
        CheckpointError: the run was trained by other conventions than fairseq's code decodes such a file by,
            or with other ids of special symbols.
    """
    if file.exists() and not is_stream(file):
        raise UsageError("the file is there already", str(file), "give another file, or remove this one")
    loaded = load_run(run)
    model, objective, special = loaded.config.model, loaded.config.objective, loaded.special
    ids = special.bos, special.pad, special.eos, special.unk
    if ids != (0, 1, 2, 3):
        what = f"<s>, <pad>, </s>, <unk> are {', '.join(map(str, ids))} in the run, 0, 1, 2, 3 in fairseq"
        raise CheckpointError(what, str(loaded.folder), "train with a tokenizer that has them there")
    weights = loaded.model.state_dict()
    names = list(weights)
    if not objective.weight_length:
        del weights["length_head.weight"]  # never trained
    theirs = _conventions(model, bool(objective.weight_length), str(loaded.folder)).objective
    ruled = ["decoder_start", *["length_convention", "mask_symbol"] * bool(objective.weight_length)]
    # Where the decoder starts with eos, a query stands at its token's place in either convention.
    ruled += ["ar_query_position"] * bool(objective.weight_ar and theirs.decoder_start == "bos")
    others = [name for name in ruled if getattr(objective, name) != getattr(theirs, name)]
    if others:
        found = ", ".join(f"{name} {getattr(objective, name)}" for name in others)
        wanted = " ".join(f"objective.{name}={getattr(theirs, name)}" for name in others)
        what = f"the run was trained by conventions that fairseq's models do not have: {found}"
        raise CheckpointError(what, str(loaded.folder), f"train with {wanted}")
    settings = argparse.Namespace(
        encoder_attention_heads=model.heads,
        decoder_attention_heads=model.heads,
        activation_fn=model.activation,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        activation_dropout=model.activation_dropout,
        no_scale_embedding=not model.scale_embedding,
    )
    # In memory first: torch's writer answers a full disk with an error of its own.
    content = io.BytesIO()
    torch.save({"args": settings, "model": to_fairseq(weights, special)}, content)
    make_folder(file.parent)
    write_atomic(file, content.getvalue())
    left_out = tuple(name for name in names if name not in weights)
    return ConversionReport(tuple(weights), left_out, (), ("unused rows of the position tables are zeros",))
