"""Folders of Hugging Face's BART into run folders, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.checkpoint.manager import BEST_FILE, BEST_FOLDER
from janus_ds.checkpoint.manifest import step_of
from janus_ds.checkpoint.tensors import write_tensors
from janus_ds.config.modes import GREEDY, trained_modes
from janus_ds.config.presets import resolve
from janus_ds.config.schema import RUN_FILE, DataConfig, DecodeConfig, ObjectiveConfig, RunConfig
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from janus_ds.decode.load import LoadedRun, load_run
from janus_ds.decode.text import markdown_text
from janus_ds.errors import DataError, UsageError
from janus_ds.io import atomic_dir, disk_faults, mapping, read_json, write_atomic
from janus_ds.metrics.scores import finite_numbers, split_of_folder
from janus_ds.model.formats.fairseq import ConversionReport
from janus_ds.model.formats.hf_export import (
    export_config,
    export_generation,
    export_janus,
    export_weights,
)
from janus_ds.model.formats.hf_import import CONFIG_FILE, GENERATION_FILE, HfBart, load_hf_bart
from janus_ds.observe import write_run_record

_WEIGHTS, _TOKENIZER = "weights.safetensors", "tokenizer"
_NOT_EXPORTED = ("rescore", "threshold", "aux_order", "temperature", "prefix")
"""Fields of `DecodeConfig` that change outputs here alone."""


def from_hf(path: Path, folder: Path) -> ConversionReport:
    """Make a run folder of a BART, with its tokenizer if it has one.

    Args:
        folder: the run folder to make; it appears whole or not at all.
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


def to_hf(run: Path, folder: Path, bart: bool = False, licence: str | None = None) -> ConversionReport:
    """Write a run's newest weights as a folder that transformers loads, with all modes that were trained.

    Plain AR of BART's shape becomes a `BartForConditionalGeneration`, all else a model with its own code.

    Args:
        folder: the folder to make; it appears whole or not at all.
        bart: make a `BartForConditionalGeneration` of any run, which loses what BART does not have.
    """
    _refuse_full(folder, CONFIG_FILE, "a model")
    loaded = load_run(run)
    objective = loaded.config.objective
    modes = trained_modes(objective, ("ar", "nar", "aux"))
    plain = modes == ("ar",) and objective.ar_stream == "content" and loaded.config.model.layernorm_embedding
    if bart or plain:
        return write_hf(loaded, folder, licence)
    return _write_janus(loaded, folder, modes, licence)


def _write_janus(
    loaded: LoadedRun, folder: Path, modes: tuple[str, ...], licence: str | None
) -> ConversionReport:
    weights = loaded.model.state_dict()
    config, state = export_janus(loaded.config, loaded.special, weights, modes)
    code = Path(__file__).resolve().parents[1] / "model/formats/hf_modeling.py"
    files = {
        "modeling_janus.py": code.read_bytes(),
        "README.md": model_card(loaded, modes, True, licence).encode(),
    }
    notes = _write_folder(loaded, folder, config, state, files)
    notes.append(f"generate decodes in the modes {', '.join(modes)}")
    return ConversionReport(tuple(weights), (), (), tuple(notes))


def write_hf(loaded: LoadedRun, folder: Path, licence: str | None = None) -> ConversionReport:
    """A `BartForConditionalGeneration` of a run that has been read; its decoding options go along."""
    weights = loaded.model.state_dict()
    config = export_config(loaded.config, loaded.special)
    state = export_weights(weights, loaded.config.model, loaded.special.vocab_size)
    # BART has no query rows: what was trained with them decodes otherwise there, until it is fine-tuned.
    modes = ("ar",) if loaded.config.objective.ar_stream == "content" else ()
    files = {"README.md": model_card(loaded, modes, False, licence).encode()}
    notes = _notes(loaded) + _write_folder(loaded, folder, config, state, files)
    used = tuple(name for name in weights if name != "length_head.weight")
    return ConversionReport(used, ("length_head.weight",), ("final_logits_bias",), tuple(notes))


def _write_folder(
    loaded: LoadedRun,
    folder: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    files: dict[str, bytes],
) -> list[str]:
    """Configuration, search settings, weights, tokenizer (if the run has one) and further files, whole or
    not at all; gives what there is to say."""
    generation = export_generation(loaded.config, loaded.special)
    with disk_faults(folder), atomic_dir(folder) as new:
        _write_json(new / CONFIG_FILE, config)
        _write_json(new / GENERATION_FILE, generation)
        write_tensors(new / "model.safetensors", state)
        for name, content in files.items():
            write_atomic(new / name, content)
        notes = [
            f"decode.{name} {value} is not known to the exported code"
            for name in _NOT_EXPORTED
            if (value := getattr(loaded.config.decode, name)) != getattr(DecodeConfig, name)
        ]
        best, own = loaded.folder / "checkpoints" / BEST_FOLDER, loaded.weights.parent
        with suppress(OSError, ValueError):
            if own.name != BEST_FOLDER and read_json(best / BEST_FILE).get("step") != step_of(own):
                notes.append(f"the weights are those of {own.name}, not the best: those are in {best}")
        if loaded.text is None:
            return [*notes, "no tokenizer was written: the run has none"]
        # BART has one size for both tables, but rows beyond the encoder's own are zeros.
        write_hf_tokenizer(loaded.text, new, loaded.config.model.max_source_positions)
        return notes


def _as_run(bart: HfBart, name: str) -> RunConfig:
    run = RunConfig(
        name=name,
        model=bart.model,
        data=DataConfig(block_tokens=bart.model.max_target_positions - 2),
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
    return notes


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


REPORT_FILE = "conversion.json"


def refuse_run(folder: Path) -> None:
    """Keep a run, or anything else, from being written over."""
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


_LOAD = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER"{trust})
"""
_BEGIN = 'inputs = tokenizer(["Some text."], return_tensors="pt", padding=True)\n'
_WAYS = {
    "ar": "rows = model.generate(**inputs)                              # token by token, beam search\n",
    "nar": 'rows = model.generate(**inputs, mode="nar", iterations=4)    # all at once, refined four times\n',
    "aux": 'rows = model.generate(**inputs, mode="aux")                  # NAR drafts, AUX judges\n',
}
_END = "print(tokenizer.batch_decode(rows, skip_special_tokens=True))\n"


def model_card(run: LoadedRun, modes: Sequence[str], own_code: bool, licence: str | None) -> str:
    """The card, with a header as the hub reads it.

    Args:
        run: what is exported; scores are those that its folder has of these weights and of whole splits
            (`scores.json`, `eval/*/scores.json`).
        modes: in which the exported model decodes as the run does; none: it has no scores.
        licence: of the weights, as the hub names it; None: not said.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    ways = "".join(_WAYS[mode] for mode in modes)
    code = _LOAD.format(trust=trust) + (_BEGIN + ways + _END if modes else "")
    does = f"decodes {', '.join(modes)}" if modes else "to be fine-tuned before it decodes"
    found = "\n\n".join(_tables(run, modes))
    header = ["library_name: transformers", "tags: [janus]", *([f"license: {licence}"] if licence else [])]
    said = f"`{licence}`." if licence else "Not named when the model was exported (`convert --license NAME`)."
    parameters = sum(weight.numel() for weight in run.model.parameters())
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {markdown_text(run.config.name)}",
        f"Encoder-decoder, {parameters:,} parameters, written by janus_ds; {does}.\n"
        'The method: "JANUS: Joint Autoregressive and Non-autoregressive Training with Auxiliary Loss\n'
        'for Sequence Generation" (EMNLP 2022).',
        f"## Use\n\n```python\n{code}```",
        f"## Scores\n\n{found or 'None of these weights as they decode here were found with the run.'}",
        f"## Licence\n\n{said}",
    ]
    return "\n\n".join(parts) + "\n"


def _tables(run: LoadedRun, modes: Sequence[str]) -> Iterator[str]:
    """A table for each split that was scored: systems down, metrics across."""
    for split, scored in _scored(run.folder).items():
        ours = {name: mapping(x) for name, x in scored.items() if _is_of(name, mapping(x), run, modes)}
        systems = {name: finite_numbers(x.get("metrics", x)) for name, x in ours.items()}
        metrics = sorted({name for scores in systems.values() for name in scores})
        if not metrics:
            continue
        rows = [["system", *metrics], ["---"] * (1 + len(metrics))]
        rows += [[name, *(_shown(scores.get(m)) for m in metrics)] for name, scores in systems.items()]
        lines = [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in rows]
        yield "\n".join([f"{markdown_text(split)}:", "", *lines])


def _scored(folder: Path) -> dict[str, dict[str, Any]]:
    """By split, the scores of each system: those of the last evaluation first, then of earlier ones, whose
    files lie beside its own."""
    found: dict[str, dict[str, Any]] = {}
    tables = [folder / "scores.json", *sorted(folder.glob("eval/*/scores.json"))]
    for path in [*tables, *sorted(folder.glob("eval/*/*.scores.json"))]:
        split = path.parent.name
        if split_of_folder(split) != split:
            continue
        try:
            values = read_json(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            fix = "remove the file, or score the run again"
            raise DataError(f"the scores cannot be read ({error})", str(path), fix) from None
        if path not in tables:
            values = {"systems": {path.name.removesuffix(".scores.json"): values}}
        for name, part in ({split: values} if "systems" in values else values).items():
            for system, scores in mapping(mapping(part).get("systems")).items():
                found.setdefault(name, {}).setdefault(system, scores)
    return found


def _is_of(system: str, scores: Mapping[str, Any], run: LoadedRun, modes: Sequence[str]) -> bool:
    """Whether a system's scores are of the run's loaded weights, decoded as the run does, as far as told, and
    as the exported model can."""
    weights = run.weights.parent
    told: dict[str, Any] = {"average": 1, "weights_sha256": run.weights_sha256}
    with suppress(OSError, ValueError):
        # Earlier versions told the step of the best weights, which become others as a run goes on.
        told["step"] = read_json(weights / BEST_FILE).get("step")
    told |= {"checkpoint": weights.name} if weights != run.folder else {}
    # int8 products are of other weights than those that are exported.
    as_exported = scores.get("precision") != "int8"
    asked = mapping(scores.get("decode"))
    as_exported &= asked.get("mode", *modes[:1]) in modes
    as_exported &= asked.keys().isdisjoint(("rescore", "threshold"))
    # The name of a system says the others.
    own = {name: getattr(run.config.decode, name) for name in ("beam", "length_beam", "temperature")}
    as_exported &= system == GREEDY or all(own.get(name, value) == value for name, value in asked.items())
    return as_exported and all(scores.get(name, value) == value for name, value in told.items())


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
