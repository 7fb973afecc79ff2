"""What is decoded and how it is scored: translation, and the tasks of GLGE with their speed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from janus_ds.checkpoint.manager import BEST_FOLDER
from janus_ds.config.modes import check_mode, trained_modes, with_decode
from janus_ds.data.prepare.pair_files import (
    GLGE_SPLITS,
    PairText,
    find_split,
    held_out_text,
    prepared_request,
    read_pairs,
    side_limit,
    task_limits,
)
from janus_ds.data.stream.index import MANIFEST_NAME, Manifest, is_lower_cased
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import LoadedRun, load_run, prepare_for_inference
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.errors import CheckpointError, DataError, UsageError
from janus_ds.evaluate.evaluation import (
    EvalRequest,
    Evaluated,
    Progress,
    check_vocabulary,
    load_checkpoint,
    one_by_one,
    run_evaluation,
    systems_of,
)
from janus_ds.evaluate.latency import (
    OURS,
    ROUNDS,
    THEIRS,
    WARM_UP,
    DecodeOne,
    LatencyReport,
    device_name,
    hf_ar,
    measure,
    precision_of,
    timed_sources,
)
from janus_ds.io import mapping
from janus_ds.metrics.glge import Meteor, Task, TaskTexts, score_task
from janus_ds.metrics.scores import Scores, TextLines, check_same_length, read_lines, save_json
from janus_ds.metrics.translation import bootstrap_seed, compare_translations, score_translations

NMT_COLUMNS = ("sacrebleu", "tokenized_bleu", "compound_bleu", "chrf", "repetition", "length_ratio")


def evaluate(request: EvalRequest, progress: Progress | None = None) -> Evaluated:
    """Translate, score, measure and write."""
    baseline = read_lines(request.baseline) if request.baseline else None
    if baseline is not None:
        # Before hours of decoding.
        bootstrap_seed()
    run = load_checkpoint(request)
    return run_evaluation(request, run, _Translation(request.split, baseline), progress)


def _data_of(request: EvalRequest, run: LoadedRun) -> Path:
    """The data directory that is asked for, or else the one of training."""
    data = request.data or Path(run.config.data.path or "")
    if request.data is None and not (run.config.data.path and data.is_dir()):
        what = "the data that the run was trained on is not there"
        raise UsageError(what, run.config.data.path or str(run.folder), "give --data DIR")
    return data


class _Translation:
    """Text prepared by `prepare_data.py --task nmt`, scored by BLEU and its like."""

    def __init__(self, split: str, baseline: TextLines | None) -> None:
        self._split = split
        self._baseline = baseline
        self._odd_case = False

    def read(self, request: EvalRequest, run: LoadedRun) -> PairText:
        data = _data_of(request, run)
        text = held_out_text(data, request.split).first(request.limit)
        check_vocabulary(run, data)
        self._odd_case = is_lower_cased(run.config.data.path) and not is_lower_cased(data)
        if self._baseline is not None:
            check_same_length(self._baseline, self._references(text))
        return text

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: PairText) -> Scores:
        references = self._references(text)
        scores = score_translations(outputs, references, self._split, [h.tokens for h in found])
        if self._odd_case:
            what = "the model was trained on lower-cased text: prepare this text with --lowercase, too"
            scores.warnings.append(what)
        if self._baseline is None:
            return scores
        significance = compare_translations(outputs, references, self._baseline)
        return replace(scores, extra={"significance": significance})

    def _references(self, text: PairText) -> TextLines:
        return TextLines(text.names[1], text.references or [])


def evaluate_glge(
    request: EvalRequest,
    task: Task,
    meteor: Meteor = "it was not asked for",
    timed: int = 0,
    ar_checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Decode, score, measure and write; `scores.json` has the systems, and the latency if it was measured.

    Args:
        meteor: METEOR's program, or why there is none.
        timed: sentences decoded one by one to measure speed; 0: it is not measured.
        ar_checkpoint: a run whose AR is the 1.0x of the speed-ups; None: the run itself, if it has AR.
    """
    request = replace(request, latency_sentences=0)
    run = load_checkpoint(request)
    # Before hours of decoding: it may not be there, or not fit.
    base = run if ar_checkpoint is None or not timed else _other_run(ar_checkpoint, run, request)
    found = run_evaluation(request, run, _GlgeSplit(task, request.split, meteor), progress)
    if not timed or not any(found.sources):
        return found
    report = measure_glge(request, run, found.sources, timed, base, progress)
    for result in found.systems:
        # Under the name of ours another run's AR may have been timed.
        if result.name != OURS or base is run:
            result.speed["ms_per_sentence_batch_1"] = report.systems[result.name].mean
            save_json(result.file.with_name(f"{result.name}.scores.json"), result.scores.as_dict())
    systems = {result.name: result.scores.as_dict() for result in found.systems}
    save_json(request.folder(run) / "scores.json", {"systems": systems, "latency": report.as_dict()})
    return replace(found, latency=report)


def measure_glge(
    request: EvalRequest,
    run: LoadedRun,
    sources: Sequence[Sequence[int]],
    samples: int,
    base: LoadedRun | None = None,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time every system of a request, and both kinds of AR, one sentence at a time; the sentences are taken
    evenly from all over the split, empty ones left out.

    Args:
        base: the run whose AR is the 1.0x of the speed-ups; None: `run` itself.
    """
    chosen = timed_sources(sources, samples)
    notes: list[str] = []
    base = base or run
    generators = systems_of(request, run)
    if base is not run or "ar" in trained_modes(base.config.objective):
        decode = with_decode(base.config, {**request.decode, "mode": "ar"})
        # In front, and in the place of the run's own AR if another one is the base.
        generators = {OURS: Generator(base.model, base.text, decode)} | {
            name: generator for name, generator in generators.items() if name != OURS
        }
        notes += [f"{OURS} is the run {base.config.name}"] if base is not run else []
    else:
        notes.append("the run was not trained for AR; --ar-checkpoint RUN gives it something to compare with")
    systems: dict[str, DecodeOne] = {name: partial(one_by_one, made) for name, made in generators.items()}
    with tempfile.TemporaryDirectory(prefix="janus-hf-") as folder:
        peer = _peer(base, request, systems, chosen, Path(folder), notes)
        if peer is not None:  # the AR systems first
            ours = {name: decode for name, decode in systems.items() if name == OURS}
            systems = {**ours, THEIRS: peer, **systems}
        found = measure(systems, chosen, request.device, progress)
    conditions = _conditions(request, run, base, len(chosen))
    if request.inference.int8 and THEIRS in found:
        conditions[f"precision of {THEIRS}"] = "fp32"
    return LatencyReport(found, conditions, notes)


def _other_run(path: Path, run: LoadedRun, request: EvalRequest) -> LoadedRun:
    other = load_run(path, None, request.device)
    check_mode(with_decode(other.config, {**request.decode, "mode": "ar"}))
    prepare_for_inference(other.model, request.inference)
    if getattr(other.codec(), "fingerprint", None) != getattr(run.codec(), "fingerprint", None):
        raise CheckpointError(
            "the two runs have different vocabularies",
            f"{run.folder} and {other.folder}",
            "give an --ar-checkpoint that was trained with the same tokenizer",
        )
    return other


def _peer(
    base: LoadedRun,
    request: EvalRequest,
    systems: Mapping[str, DecodeOne],
    sources: Sequence[Sequence[int]],
    folder: Path,
    notes: list[str],
) -> DecodeOne | None:
    """transformers' AR of the base; None, with a note, where there cannot be one."""
    if importlib.util.find_spec("transformers") is None:
        notes.append("transformers is not installed, so there is no HF AR: pip install 'janus_ds[hf]'")
        return None
    base = replace(base, config=with_decode(base.config, {**request.decode, "mode": "ar"}))
    same_weights = base.config.objective.ar_stream == "content" and OURS in systems
    lengths: dict[tuple[int, ...], int] | None = None
    if not same_weights:
        name = OURS if OURS in systems else list(systems)[-1]
        lengths = {tuple(source): systems[name](source) for source in sources}
    try:
        peer = hf_ar(base, folder, lengths, request.device)
    except CheckpointError as error:
        notes.append(f"there is no HF AR: {error.what}")
        return None
    version = importlib.metadata.version("transformers")
    if same_weights:
        notes.append(f"{THEIRS}: generate of transformers {version} with the weights of {OURS}")
    else:
        notes.append(
            f"{THEIRS}: a BART of the same shape in transformers {version}, held to the lengths of "
            f"{name}'s outputs, since these weights were not trained for plain AR, which is all that it has"
        )
    return peer


def _conditions(request: EvalRequest, run: LoadedRun, base: LoadedRun, samples: int) -> dict[str, Any]:
    # Some modes know no beam; the one of AR is told.
    ar, own = (with_decode(x.config, {**request.decode, "mode": "ar"}).decode for x in (base, run))
    return {
        "batch": 1,
        "samples": samples,
        "rounds": ROUNDS,
        "warm-up": min(WARM_UP, samples),
        "device": device_name(request.device),
        "precision": precision_of(run.model, request.inference),
        "beam": ar.beam,
        "length beam": own.length_beam,
        "torch": torch.__version__,
    }


def with_best(checkpoint: Path, average: int) -> Path:
    """The run's best checkpoint where training kept one (`train.keep_best`) and nothing else is named."""
    best = checkpoint / "checkpoints" / BEST_FOLDER
    return best if average == 1 and best.is_dir() else checkpoint


class _GlgeSplit:
    """A split of one task, prepared or in the official layout."""

    def __init__(self, task: Task, split: str, meteor: Meteor) -> None:
        self._task = task
        self._split = split
        self._meteor = meteor

    def read(self, request: EvalRequest, run: LoadedRun) -> PairText:
        data = _data_of(request, run)
        if (data / MANIFEST_NAME).is_file():
            files, limit = self._prepared(data, run)
        else:
            files, limit = find_split(data, self._task.name, self._split), task_limits(self._task.name).source
        source, target = files
        pairs = list(read_pairs(source, target))
        references = None if target is None else [pair[1] for pair in pairs]
        names = (str(source), str(target))
        return PairText([pair[0] for pair in pairs], references, names, limit).first(request.limit)

    def _prepared(self, data: Path, run: LoadedRun) -> tuple[tuple[Path, Path | None], int]:
        """The text that `prepare_glge.py` keeps, and the longest source of its settings."""
        recorded = Manifest.load(data).settings
        settings = mapping(prepared_request(recorded).get("settings"))
        if settings.get("task", self._task.name) != self._task.name:
            raise UsageError(
                f"the data is of task {settings['task']!r}, not {self._task.name!r}",
                str(data),
                f"give --task {settings['task']}, or other --data",
            )
        check_vocabulary(run, data)
        ours = {official: own for own, official in GLGE_SPLITS.items()}.get(self._split, self._split)
        source, target = (data / "raw" / f"{ours}.{side}" for side in ("src", "tgt"))
        if not source.is_file():
            raise DataError(
                f"the data has no text of split {self._split!r}",
                str(source),
                "name another split (dev or test), or prepare the data with this split's files; translations "
                "are scored by `janus-ds eval nmt`",
            )
        limit = side_limit(recorded, "source") or task_limits(self._task.name).source
        return (source, target if target.is_file() else None), limit

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: PairText) -> Scores:
        if text.references is None:
            warning = f"nothing is scored: {text.names[0]} has no references beside it"
            return Scores(self._task.name, self._split, len(outputs.lines), warnings=[warning])
        sources = TextLines(text.names[0], text.sources) if self._task.uses_sources else None
        references = TextLines(text.names[1], text.references)
        return score_task(self._task, TaskTexts(outputs, references, sources), self._split, self._meteor)
