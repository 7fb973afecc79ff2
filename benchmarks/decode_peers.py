"""The peers of `bench decode` on our own weights: transformers' `generate` and CTranslate2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from janus_ds.config.schema import RunConfig
from janus_ds.errors import MissingDependencyError
from janus_ds.model.formats.hf_export import export_config, export_generation, export_weights
from janus_ds.model.janus import JanusModel

PEERS = {"hf": "transformers", "ct2": "ctranslate2"}
Outputs = list[tuple[int, ...]]
"""Tokens of the best hypothesis of each source, without bos and eos."""


def needed(name: str) -> Any:
    """The package of a peer.

    Raises:
        MissingDependencyError: its package is not installed.
    """
    try:
        return import_module(PEERS[name])
    except ImportError as error:
        raise MissingDependencyError(
            f"{PEERS[name]} is not installed ({error})",
            "--peers",
            "install janus_ds[hf], or give --peers none",
        ) from error


class Peers:
    """One model, exported for its peers.

    Args:
        model: plain BART's decoding (objective `ar`, `decoder_start: eos_bos`).
        run: its configuration; `decode.max_length` is the length that every output is forced to.
        folder: for the exported files.
        threads: CPU threads of CTranslate2.
    """

    def __init__(self, model: JanusModel, run: RunConfig, folder: Path, threads: int, device: str) -> None:
        self._device = device
        self._special, self._beam, self._tokens = model.special, run.decode.beam, run.decode.max_length
        self._folder, self._threads = folder, threads
        self._symbols = ["<s>", "<pad>", "</s>", "<unk>"]
        self._symbols += [f"w{i}" for i in range(4, self._special.vocab_size - 1)] + ["<mask>"]
        self._export(model, run)

    def transformers(
        self, sources: Sequence[Sequence[int]], batch: int, precision: str
    ) -> Callable[[], Outputs]:
        """Beam search by `generate`, in batches of like length, the longest first."""
        model = needed("hf").BartForConditionalGeneration.from_pretrained(self._folder / "hf").eval()
        model = model.to(self._device, getattr(torch, precision))
        special, length = self._special, self._tokens + 3
        batches = [sources[i : i + batch] for i in range(0, len(sources), batch)]

        def decode(part: Sequence[Sequence[int]]) -> Outputs:
            width = max(len(source) for source in part) + 2
            rows = [[special.bos, *source, special.eos] for source in part]
            ids = torch.tensor([row + [special.pad] * (width - len(row)) for row in rows]).to(self._device)
            found = model.generate(
                input_ids=ids,
                attention_mask=(ids != special.pad).long(),
                num_beams=self._beam,
                min_length=length,
                max_length=length,
            )
            specials = (special.bos, special.pad, special.eos)
            return [tuple(token for token in row if token not in specials) for row in found.tolist()]

        return lambda: [output for part in batches for output in decode(part)]

    def ctranslate2(
        self, sources: Sequence[Sequence[int]], batch: int, compute_type: str
    ) -> Callable[[], Outputs]:
        """Beam search by CTranslate2, which sorts and batches by itself."""
        package, folder = needed("ct2"), self._folder / "ct2"
        if not folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                package.converters.TransformersConverter(str(self._folder / "hf")).convert(str(folder))
        translator = package.Translator(
            str(folder), self._device, compute_type=compute_type, inter_threads=1, intra_threads=self._threads
        )
        numbers = {symbol: number for number, symbol in enumerate(self._symbols)}
        rows = [["<s>", *(self._symbols[i] for i in source), "</s>"] for source in sources]

        def decode() -> Outputs:
            found = translator.translate_batch(
                rows,
                beam_size=self._beam,
                max_batch_size=batch,
                target_prefix=[["<s>"]] * len(rows),
                suppress_sequences=[["<s>"], ["<pad>"], ["<unk>"], ["<mask>"]],
                min_decoding_length=self._tokens + 1,
                max_decoding_length=self._tokens + 1,
            )
            return [
                tuple(numbers[t] for t in item.hypotheses[0] if t not in ("<s>", "</s>")) for item in found
            ]

        return decode

    def _export(self, model: JanusModel, run: RunConfig) -> None:
        """A folder as transformers saves one, with a vocabulary of made-up words."""
        folder = self._folder / "hf"
        folder.mkdir(parents=True)
        special = self._special
        state = export_weights(model.state_dict(), model.config, special.vocab_size)
        save_file({name: value.clone() for name, value in state.items()}, str(folder / "model.safetensors"))
        files = {
            "config.json": export_config(run, special),
            "generation_config.json": export_generation(run, special),
            "vocab.json": {symbol: number for number, symbol in enumerate(self._symbols)},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
