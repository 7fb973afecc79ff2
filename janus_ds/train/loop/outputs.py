"""What a run shows: scored and sampled outputs of a validation, the banner at its start, its summary."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from janus_ds import __version__
from janus_ds.batch import TwoStreamBatch
from janus_ds.config.locations import public_location
from janus_ds.config.modes import trained_modes
from janus_ds.config.schema import RunConfig
from janus_ds.data.prepare.pair_files import PairText, held_out_text
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.text.tokenizer import Tokenizer, plain_ids
from janus_ds.decode.generator import Generator
from janus_ds.decode.text import fit_sources, long_warning, markdown_text, one_line
from janus_ds.errors import ConfigError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import parameter_shapes
from janus_ds.observe.progress import duration
from janus_ds.packing import unpacked
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.parallel.topology import Topology
from janus_ds.train.loop.state import Meters

if TYPE_CHECKING:
    from janus_ds.train.loop.build_run import Run


def scored_modes(config: RunConfig) -> tuple[str, ...]:
    """Modes whose outputs the run scores.

    Raises:
        ConfigError: one of them is not trained.
    """
    asked = tuple(mode for mode in config.train.valid_bleu.split(",") if mode != "none")
    trained = trained_modes(config.objective)
    for mode in asked:
        if mode not in trained:
            raise ConfigError(
                f"the objective {config.objective.preset!r} does not train mode {mode!r}",
                f"train.valid_bleu: {config.train.valid_bleu}",
                f"set train.valid_bleu to {','.join(trained)}",
            )
    return asked


class WeightsHolder:
    """One whole model on this rank that takes given weights: the engine's may be partitioned over ranks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._device = device
        self._model: JanusModel | None = None

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights; the model is made at the first call."""
        if self._model is None:
            model = JanusModel(self.config.model, self.tokenizer.special, ParallelLayers())
            self._model = model.to(self._device)
        self._model.load_state_dict(dict(weights))

    def generator(self, **decode: Any) -> Generator:
        """A generator with the weights loaded last, the run's decoding settings, and these changes."""
        if self._model is None:
            raise RuntimeError("no weights have been loaded")
        config = replace(self.config, decode=replace(self.config.decode, **decode))
        return Generator(self._model, self.tokenizer, self.tokenizer.special, config)


class _StoppedError(Exception):
    """Leaves a search between two batches."""


class OutputScores:
    """Decodes fixed sources with given weights and scores the outputs by the task's metric."""

    def __init__(self, holder: WeightsHolder, text: PairText) -> None:
        config, tokenizer = holder.config, holder.tokenizer
        self._holder = holder
        text = text.first(config.train.valid_bleu_samples)
        self._sources = [tokenizer.encode(source) for source in text.sources]
        table = config.model.max_source_positions
        if text.longest is not None:
            # As the training sources were cut.
            table = min(text.longest + 2, table)
            self._sources = [plain_ids(row, tokenizer.special) for row in self._sources]
        self._sources, cut = fit_sources(self._sources, table)
        self.warning = long_warning(cut, len(self._sources), table) if cut else None
        """What is to be said about sources that were too long for the model and were cut."""
        self._references = text.references or []
        self._modes = scored_modes(config)
        self._metric = VALIDATION_METRICS[config.train.valid_task]

    @classmethod
    def of(cls, holder: WeightsHolder) -> OutputScores | None:
        """For the run's own validation text; None where no scores are asked for."""
        if not scored_modes(holder.config):
            return None
        return cls(holder, held_out_text(Path(holder.config.data.path or ""), "valid"))

    def __call__(
        self, weights: Mapping[str, Tensor], stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The metric of `train.valid_task` by mode, in percent; None where `stop` was true after a batch."""
        self._holder.load(weights)
        try:
            return {mode: self._score(mode, stop) for mode in self._modes}
        except _StoppedError:
            return None

    def _score(self, mode: str, stop: Callable[[], bool]) -> float:
        def after_batch(done: int, count: int) -> None:
            if stop():
                raise _StoppedError

        config, tokenizer = self._holder.config, self._holder.tokenizer
        # An untrained model never ends a sentence.
        longest = config.decode.max_length or min(config.data.block_tokens, 200)
        generator = self._holder.generator(
            mode=mode,
            beam=1,
            iterations=config.train.valid_bleu_iterations,
            max_length=min(longest, config.model.max_target_positions - 2),
        )
        found = generator.generate_ids(self._sources, after_batch)
        outputs = [one_line(tokenizer.decode(candidates[0].tokens)) for candidates in found]
        return self._metric.score(outputs, self._references)


@dataclass(frozen=True)
class TextPair:
    """A source as the encoder reads it, masks included, and its reference."""

    source: str
    reference: str


class SampleDecoder:
    """Decodes fixed inputs with given weights in every mode that the model is trained for."""

    def __init__(self, holder: WeightsHolder, pairs: Sequence[TextPair]) -> None:
        self._holder = holder
        self._pairs = pairs

    def __call__(self, weights: Mapping[str, Tensor]) -> str:
        """Markdown with source, reference and one output a mode."""
        self._holder.load(weights)
        config, tokenizer = self._holder.config, self._holder.tokenizer
        rows = [tokenizer.encode(pair.source) for pair in self._pairs]
        sources, _ = fit_sources(rows, config.model.max_source_positions)
        outputs = {
            mode: [tokenizer.decode(found[0].tokens) for found in generator.generate_ids(sources)]
            for mode in trained_modes(config.objective)
            for generator in [self._holder.generator(mode=mode)]
        }
        blocks = []
        for i, pair in enumerate(self._pairs):
            lines = {"source": pair.source, "reference": pair.reference}
            lines |= {mode: texts[i] for mode, texts in outputs.items()}
            blocks.append("\n".join(f"- **{name}**: {markdown_text(text)}" for name, text in lines.items()))
        return "\n\n---\n\n".join(blocks)


def text_pairs(
    batch: TwoStreamBatch, source: SampleSource, tokenizer: Tokenizer, count: int
) -> list[TextPair]:
    """The first samples of a batch as text: what the encoder reads, and the target as it lies on disk."""
    count, batch = min(count, len(batch.sample_id_B)), unpacked(batch)
    targets = source.read(batch.sample_id_B[:count].numpy())["target"]
    return [
        TextPair(
            tokenizer.decode(batch.source_BS[i, : int(batch.source_length_B[i])].tolist()),
            tokenizer.decode(targets.row(i).tolist()),
        )
        for i in range(count)
    ]


def announce_start(run: Run, topology: Topology, step: int) -> None:
    """Say what is trained, from what, with what and how; the first rank only."""
    if not topology.is_main:
        return
    model, data, train, execution = run.config.model, run.config.data, run.config.train, run.execution
    vocabulary = run.tokenizer.special.vocab_size
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model, vocabulary).values())
    size, held_out = run.train.source.samples, run.valid.source.samples
    by_tokens = data.batch == "tokens"
    spread = (
        f"{execution.accumulation} accumulation x {execution.data_size} data-parallel"
        if by_tokens
        else f"{execution.micro_batch} micro x {execution.accumulation} accumulation "
        f"x {execution.data_size} data-parallel"
    )
    batch = f"{train.batch_tokens:,} tokens" if by_tokens else f"{train.global_batch:,} samples"
    epochs = "" if by_tokens else f" ({train.max_steps * train.global_batch / size:.1f} epochs)"
    threads = f", threads {torch.get_num_threads()}" if topology.device.type == "cpu" else ""
    place = public_location(data.path or "")
    both = f" = {topology.data_size} data-parallel x {topology.tensor_size} tensor-parallel"
    weights = f"from {run.config.init}" if run.config.init else f"new, from seed {train.seed}"
    if step:
        weights = f"from the run's own checkpoint of step {step:,}"
    rows = [
        (
            "model",
            f"{parameters / 1e6:.1f} M parameters: {model.encoder_layers}+{model.decoder_layers} layers, "
            f"width {model.d_model}, vocabulary {vocabulary:,}",
        ),
        ("weights", weights),
        *(("lengths", note) for note in execution.notes),
        ("data", f"{place}: {size:,} samples to train on, {held_out:,} held out"),
        ("steps", f"{train.max_steps:,}{epochs}" + (f", going on from {step:,}" if step else "")),
        ("batch", f"{batch} = {spread}"),
        (
            "ranks",
            f"{topology.world_size}{both * (topology.tensor_size > 1)} on {topology.device.type}{threads}",
        ),
        ("engine", f"{execution.precision}, ZeRO {execution.zero_stage}" + ", offload" * execution.offload),
        ("folder", f"{run.folder}"),
    ]
    _say(f"janus_ds {__version__}: {run.config.name}", rows)


def announce_end(run: Run, topology: Topology, step: int, meters: Meters) -> None:
    """Say what a complete run did, where it lies, and what can be done next; the first rank only."""
    if not topology.is_main:
        return
    folder = shlex.quote(str(run.folder))
    epochs = meters.samples / max(1, run.train.source.samples)
    trained = f"{meters.samples:,} samples ({epochs:.1f} epochs), {meters.tokens:,} tokens"
    rows = [("trained", f"{trained} in {duration(meters.seconds)} of steps")]
    if meters.skipped_steps:
        rows.append(("skipped", f"{meters.skipped_steps:,} steps; their reasons: metrics.jsonl"))
    if meters.best_step:
        rows.append(("best", f"step {meters.best_step:,}, in {run.folder / 'checkpoints' / 'best'}"))
    modes = [mode for mode in ("ar", "nar") if mode in trained_modes(run.config.objective)]
    rows += [
        ("folder", str(run.folder)),
        ("next", f"janus-ds decode --checkpoint {folder} --mode {','.join(modes)} --heldout 3"),
        ("", f"janus-ds report {folder}"),
    ]
    _say(f"complete after step {step:,}", rows)


def _say(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if sys.stderr is not None:
        sys.stderr.write("\n".join([title, *(f"  {name:<9}{text}" for name, text in rows)]) + "\n")
        sys.stderr.flush()
