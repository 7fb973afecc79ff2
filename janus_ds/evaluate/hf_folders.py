"""Folders of Hugging Face's BART into run folders, and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from janus_ds.checkpoint.tensors import write_tensors
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from janus_ds.data.text.tokenizer import ByteLevelBPE
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.errors import UsageError
from janus_ds.io import atomic_dir, disk_faults, write_atomic
from janus_ds.model.formats.bart_names import ConversionReport
from janus_ds.model.formats.hf_export import export_config, export_generation, export_weights
from janus_ds.model.formats.hf_import import CONFIG_FILE, HfBart, load_hf_bart
from janus_ds.model.formats.hf_search import GENERATION_FILE
from janus_ds.observe.run_record import RUN_FILE, write_run_record

_WEIGHTS, _TOKENIZER = "weights.safetensors", "tokenizer"


def from_hf(path: Path, folder: Path) -> ConversionReport:
    """Make a run folder of a BART, with its tokenizer if it has one.

    Args:
        path: a folder with `config.json`, weights, and tokenizer files.
        folder: the run folder to make; it appears whole or not at all.

    Raises:
        CheckpointError: files are missing, damaged, of another kind of model, or do not belong together.
        DataError: the tokenizer is damaged or of another kind.
        UsageError: the folder is not empty.
    """
    refuse_run(folder)
    tokenizer = read_hf_tokenizer(path)
    bart = load_hf_bart(path, None if tokenizer is None else tokenizer.special)
    with disk_faults(folder), atomic_dir(folder) as new:
        if tokenizer is not None:
            tokenizer.save(new / _TOKENIZER)
        write_tensors(new / _WEIGHTS, bart.weights)
        write_report(new, bart.report)
        fingerprint = "" if tokenizer is None else tokenizer.fingerprint
        converted = {"converted_from": path.resolve().name}
        write_run_record(new, _as_run(bart, folder.name), bart.special, fingerprint, converted, 0)
    return bart.report


def to_hf(run: Path, folder: Path) -> ConversionReport:
    """Write a run's newest weights as a folder that `BartForConditionalGeneration` loads.

    Args:
        run: a run folder or one of its checkpoints.
        folder: the folder to make; it appears whole or not at all.

    Raises:
        CheckpointError: the run cannot be read, or its shape is none of Hugging Face's BART.
        UsageError: the folder is not empty.
    """
    _refuse_full(folder, CONFIG_FILE, "a model")
    return write_hf(load_run(run), folder)


def write_hf(loaded: LoadedRun, folder: Path) -> ConversionReport:
    """The same for a run that has been read, with its decoding options as the settings of `generate`.

    Raises:
        CheckpointError: its shape is none of Hugging Face's BART.
    """
    weights = loaded.model.state_dict()
    config = export_config(loaded.config, loaded.special)
    generation = export_generation(loaded.config, loaded.special)
    state = export_weights(weights, loaded.config.model, loaded.special.vocab_size)
    with disk_faults(folder), atomic_dir(folder) as new:
        _write_json(new / CONFIG_FILE, config)
        _write_json(new / GENERATION_FILE, generation)
        write_tensors(new / "model.safetensors", state)
        if isinstance(loaded.text, ByteLevelBPE):
            write_hf_tokenizer(loaded.text, new, config["max_position_embeddings"])
    used = tuple(name for name in weights if name != "length_head.weight")
    return ConversionReport(used, ("length_head.weight",), ("final_logits_bias",), tuple(_notes(loaded)))


def _as_run(bart: HfBart, name: str) -> RunConfig:
    longest = bart.model.max_target_positions - 2
    run = RunConfig(
        name=name,
        model=bart.model,
        data=DataConfig(block_tokens=min(DataConfig.block_tokens, longest)),
        objective=ObjectiveConfig(preset="ar", decoder_start=bart.decoder_start),
        decode=bart.decode,
    )
    return resolve(run)


def _notes(loaded: LoadedRun) -> list[str]:
    notes = ["unused rows of the position tables are zeros"]
    model = loaded.config.model
    if model.max_source_positions != model.max_target_positions:
        notes.append("the shorter position table is filled up with zeros: BART has one size for both")
    if loaded.config.objective.ar_stream == "query":
        notes.append(
            "the run was trained with query rows, which transformers does not have: fine-tune the "
            "exported model before decoding with it, or fine-tune with the preset `ar` before exporting"
        )
    if not isinstance(loaded.text, ByteLevelBPE):
        notes.append("no tokenizer was written: the run's is not BART's byte-level BPE")
    return notes


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


REPORT_FILE = "conversion.json"


def refuse_run(folder: Path) -> None:
    """Keep a run, or anything else, from being written over.

    Raises:
        UsageError: the folder is not empty.
    """
    _refuse_full(folder, RUN_FILE, "a run")


def _refuse_full(folder: Path, file: str, thing: str) -> None:
    if (folder / file).exists():
        raise UsageError(f"the folder holds {thing} already", str(folder), "give another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError("the folder is not empty", str(folder), "give another folder")
    if folder.exists() and not folder.is_dir():
        raise UsageError("a file is where the folder should be", str(folder), "give another folder")


def write_report(folder: Path, report: ConversionReport) -> None:
    """Write what became of every name into `conversion.json`."""
    write_atomic(folder / REPORT_FILE, (json.dumps(asdict(report), indent=1) + "\n").encode())
