"""Decoded samples for TensorBoard: what the model makes of a few held-out inputs, as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens, TwoStreamBatch
from janus_ds.config.schema import RunConfig
from janus_ds.data.mixture import MixedSource
from janus_ds.data.source import SampleSource
from janus_ds.data.tokenizer import Tokenizer
from janus_ds.decode.generator import Generator, trained_modes
from janus_ds.model.janus import JanusModel
from janus_ds.packing import unpacked
from janus_ds.parallel.layers import DenseLayers

__all__ = ["SampleDecoder", "TextPair", "text_pairs"]


@dataclass(frozen=True)
class TextPair:
    """A source as the encoder reads it, masks included, and its reference."""

    source: str
    reference: str


class SampleDecoder:
    """Decodes fixed inputs with given weights in every mode that the model is trained for.

    A whole model of its own, since the engine's weights may be partitioned over ranks.

    Args:
        config: the resolved run.
        tokenizer: the run's tokenizer.
        pairs: the inputs.
        device: where to decode.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, pairs: Sequence[TextPair], device: torch.device
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._pairs = pairs
        self._device = device
        self._model: JanusModel | None = None

    def __call__(self, weights: Mapping[str, Tensor]) -> str:
        """Markdown with source, reference and one output a mode."""
        special = self._tokenizer.special
        if self._model is None:
            self._model = JanusModel(self._config.model, special, DenseLayers()).to(self._device)
        self._model.load_state_dict(dict(weights))
        outputs = {
            mode: self._decode(self._model, special, mode) for mode in trained_modes(self._config.objective)
        }
        blocks = []
        for i, pair in enumerate(self._pairs):
            lines = {"source": pair.source, "reference": pair.reference}
            lines |= {mode: texts[i] for mode, texts in outputs.items()}
            blocks.append("\n".join(f"- **{name}**: {_escaped(text)}" for name, text in lines.items()))
        return "\n\n---\n\n".join(blocks)

    def _decode(self, model: JanusModel, special: SpecialTokens, mode: str) -> list[str]:
        config = replace(self._config, decode=replace(self._config.decode, mode=mode))
        generator = Generator(model, self._tokenizer, special, config)
        return [hypothesis.text for hypothesis in generator.generate([pair.source for pair in self._pairs])]


def text_pairs(
    batch: TwoStreamBatch, source: SampleSource | MixedSource, tokenizer: Tokenizer, count: int
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


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("\n", " ")
