"""Text from a trained model, in any of its ways of decoding.

    generator = Generator.from_checkpoint("runs/quickstart", mode="nar", iterations=4)
    for hypothesis in generator.generate(["The old man <mask> home ."]):
        print(hypothesis.text)

Inputs are sorted by length into batches and given back in their order.

Shape letters: B sentences, C length candidates, K length classes, S source tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import ObjectiveConfig, RunConfig
from janus_ds.decode.aux_search import aux_search
from janus_ds.decode.beam_search import beam_search
from janus_ds.decode.draft import draft_search
from janus_ds.decode.hypothesis import Hypothesis, ScoredTokens
from janus_ds.decode.load import load_run
from janus_ds.decode.mask_predict import length_candidates, mask_predict
from janus_ds.decode.model_drafts import ModelDrafts, SamplingJudge, draft_plan
from janus_ds.decode.model_steps import (
    AuxDecoder,
    CachedSteps,
    NarDecoder,
    draft_settings,
    mask_predict_settings,
    most_rows,
    search_settings,
)
from janus_ds.decode.rescore import ArScorer, rescore, sampled_variants
from janus_ds.decode.sample import Sampling, random_of, sample_search
from janus_ds.decode.search_settings import SearchSettings
from janus_ds.decode.text import IdText, TextCodec
from janus_ds.errors import CheckpointError, ConfigError, DataError
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.decoding.inference import InferenceOptions, prepare_for_inference
from janus_ds.model.janus import JanusModel

Progress = Callable[[int, int], None]
"""Called after each batch with the number of finished inputs and of all."""


def trained_modes(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The modes that a model trained with these weights can decode in.

    AUX rows train both: they are predictions from MASK rows, and each but the first from gold tokens.
    NAR needs a trained length head as well.
    """
    aux = bool(objective.weight_aux)
    ar = bool(objective.weight_ar) or aux
    nar = (bool(objective.weight_nar) or aux) and bool(objective.weight_length)
    return ("ar",) * ar + ("nar",) * nar


def _checked_texts(texts: str | Sequence[str]) -> list[str]:
    """The texts as a list.

    Raises:
        DataError: one is no string, or holds half a character.
    """
    checked = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(checked, 1):
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError):
            what = "has a lone surrogate" if isinstance(text, str) else f"is of type {type(text).__name__}"
            raise DataError(
                f"the text {what}", f"line {number} of the input", "give Unicode text as a string"
            ) from None
    return checked


class Generator:
    """Decodes texts with one model in one mode.

    Args:
        model: any device and precision; put into evaluation mode during a call only.
        text: the tokenizer; None allows :meth:`generate_ids` alone.
        special: special symbols.
        config: the run; its `decode` and `objective` say how.
        batch_sentences: sentences that are decoded at a time, at most.
        batch_tokens: source tokens that are decoded at a time, padding included; one sentence may have more.

    Raises:
        ConfigError: the model was not trained for `config.decode.mode`.
    """

    def __init__(
        self,
        model: JanusModel,
        text: TextCodec | None,
        special: SpecialTokens,
        config: RunConfig,
        batch_sentences: int = 32,
        batch_tokens: int = 4096,
    ) -> None:
        config = resolve(config)
        _check_mode(config)
        self.model = model
        self.text = text
        self.special = special
        self.config = config
        self.batch_sentences = batch_sentences
        self.batch_tokens = batch_tokens

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        mode: str | None = None,
        *,
        device: torch.device | str | None = None,
        ids: bool = False,
        inference: InferenceOptions | None = None,
        **decode: Any,
    ) -> Generator:
        """A generator for a run folder (its newest checkpoint) or for one of its checkpoints.

        Args:
            path: RUN, RUN/checkpoints/step-NNNNNNNN, or "demo": the model that the package ships, German
                to English.
            mode: "ar", "nar", "draft" or "aux"; None: as the run's recipe says.
            device: None: the first GPU, or else the CPU.
            ids: texts are token ids written as numbers; for runs without a tokenizer.
            inference: precision and preparation of the weights; None: fp32, packed on a CPU.
            decode: further fields of `DecodeConfig`, such as `beam=1` or `iterations=10`.

        Raises:
            CheckpointError: missing, damaged, or without a tokenizer.
            ConfigError: an option that does not exist, or a mode that was not trained.
        """
        options = decode | ({} if mode is None else {"mode": mode})
        run = load_run(path, options, device)
        text = IdText(run.special) if ids else run.text
        if text is None:
            raise CheckpointError(
                "the run has no tokenizer",
                str(run.folder),
                "convert it again with its tokenizer (--dict or --tokenizer), or decode token ids (--ids)",
            )
        return cls(prepare_for_inference(run.model, inference), text, run.special, run.config)

    def generate(self, texts: str | Sequence[str], progress: Progress | None = None) -> list[Hypothesis]:
        """The best hypothesis of each text, in the order of the texts; a string is one text.

        Raises:
            DataError: a text is longer than the position table, or no Unicode text; the line is named.
        """
        return [candidates[0] for candidates in self.generate_nbest(texts, progress)]

    def generate_nbest(
        self, texts: str | Sequence[str], progress: Progress | None = None
    ) -> list[list[Hypothesis]]:
        """All hypotheses that the search found for each text (beams or length candidates), best first."""
        if self.text is None:
            raise ConfigError(
                "this generator has no tokenizer", "Generator", "use generate_ids, or give it a tokenizer"
            )
        mode, decode = self.config.decode.mode, self.text.decode
        texts = _checked_texts(texts)
        found = self.generate_ids([self.text.encode(text) for text in texts], progress)
        return [
            [
                Hypothesis(decode(item.tokens), item.tokens, item.score, mode, item.passes, item.seconds)
                for item in candidates
            ]
            for candidates in found
        ]

    def generate_ids(
        self, sources: Sequence[Sequence[int]], progress: Progress | None = None, first: int = 0
    ) -> list[list[ScoredTokens]]:
        """As :meth:`generate_nbest`, for sources that are token ids without bos and eos.

        An empty source gives an empty hypothesis. Samples are drawn by the number of a source, counted from
        `first`.
        """
        self._check_lengths(sources)
        found = [[ScoredTokens((), 0.0)] for _ in sources]
        filled = [i for i, source in enumerate(sources) if len(source)]
        done = len(sources) - len(filled)
        lengths = {i: len(sources[i]) + 2 for i in filled}
        batches = list(_batches(lengths, self.batch_sentences, self.batch_tokens))
        places = len(batches[0]) if batches else 0
        if self.config.decode.mode == "ar" and batches and not self.config.decode.temperature:
            # One search over all: the first batch begins, the others take the places that become free.
            batches = [[i for batch in batches for i in batch]]

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None and count:
                progress(done, len(sources))

        for batch in batches:
            before, began = done, perf_counter()
            numbers = [first + i for i in batch]
            results = self._decode([sources[i] for i in batch], numbers, places, report)
            for index, candidates in zip(batch, results, strict=True):
                seconds = perf_counter() - began
                found[index] = [replace(item, seconds=item.seconds or seconds) for item in candidates]
            report(len(batch) - (done - before))
        return found

    def _check_lengths(self, sources: Sequence[Sequence[int]]) -> None:
        table, size = self.config.model.max_source_positions, self.special.vocab_size
        for number, source in enumerate(sources, 1):
            if len(source) + 2 > table:
                raise DataError(
                    f"the text has {len(source) + 2} tokens with bos and eos; the model reads up to {table}",
                    f"line {number} of the input",
                    "cut the line into shorter ones",
                )
            wrong = [id_ for id_ in source if not isinstance(id_, Integral) or not 0 <= id_ < size]
            if wrong:
                raise DataError(
                    f"{str(wrong[0])[:40]} is not a token id",
                    f"line {number} of the input",
                    f"give whole numbers from 0 to {size - 1}",
                )

    def _decode(
        self,
        sources: Sequence[Sequence[int]],
        numbers: Sequence[int],
        places: int,
        report: Callable[[int], None],
    ) -> list[list[ScoredTokens]]:
        mode = self.config.decode.mode
        ways = {"ar": self._sampled, "nar": self._parallel, "aux": self._by_aux, "draft": self._drafted}
        with _evaluating(self.model):
            if mode == "ar" and not self.config.decode.temperature:
                found = self._autoregressive(sources, places, report)
            else:
                found = ways[mode](self.model.encode(*self._pad(sources)), numbers)
        if not all(candidates and math.isfinite(candidates[0].score) for candidates in found):
            raise CheckpointError(
                "the model gives values that are not finite",
                f"decode.mode {self.config.decode.mode}",
                "take an earlier checkpoint, or decode in fp32",
            )
        return found

    def _pad(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        special, device = self.special, next(self.model.parameters()).device
        length_B = torch.tensor([len(source) + 2 for source in sources])
        source_BS = torch.full((len(sources), int(length_B.max())), special.pad)
        for row, source in zip(source_BS, sources, strict=True):
            row[: len(source) + 2] = torch.tensor([special.bos, *source, special.eos])
        return source_BS.to(device), length_B.to(device)

    def _autoregressive(
        self, sources: Sequence[Sequence[int]], places: int, report: Callable[[int], None]
    ) -> list[list[ScoredTokens]]:
        """Search sources, the longest first, at so many places at a time; `report` counts finished ones."""
        settings = self._search_settings()
        memory = self.model.encode(*self._pad(sources[:places]))
        begun = memory.sentences

        def encode_next(count: int) -> EncoderOutput:
            nonlocal begun
            begun += count
            report(count)
            return self.model.encode(*self._pad(sources[begun - count : begun]))

        cache = self.model.start_cache(memory, self._stream, settings.beam, settings.max_steps)
        free = settings.forced_first is not None and settings.free_forced
        settings = replace(settings, fed_first=free and settings.max_steps > 1)
        before = settings.start if settings.fed_first else None
        steps = CachedSteps(self.model, cache, encode_next, before)
        device, waiting = memory.states_BSD.device, len(sources) - begun
        return beam_search(steps, begun, settings, device, waiting)

    def _sampled(self, memory: EncoderOutput, numbers: Sequence[int]) -> list[list[ScoredTokens]]:
        decode, settings = self.config.decode, self._search_settings()
        cache = self.model.start_cache(memory, self._stream, settings.beam, settings.max_steps)
        sampling = Sampling(decode.temperature, decode.top_k, decode.top_p, decode.seed)
        steps, device = CachedSteps(self.model, cache), memory.states_BSD.device
        return sample_search(steps, numbers, settings, sampling, device)

    def _search_settings(self) -> SearchSettings:
        return search_settings(self.config, self.special)

    @property
    def _stream(self) -> ArStream:
        return ArStream.of(self.config.objective, self.special)

    def _lengths(self, memory: EncoderOutput) -> Tensor:
        """Candidate lengths with bos and eos, (B, C)."""
        decode, convention = self.config.decode, self.config.objective.length_convention or "inner"
        rule, longest = decode.nar_score or "paper", most_rows(self.config)
        logits_BK = self.model.length_logits(memory)
        return length_candidates(logits_BK, rule, decode.length_beam, convention, longest)

    def _by_aux(self, memory: EncoderOutput, _: Sequence[int]) -> list[list[ScoredTokens]]:
        settings = draft_settings(self.config, self.special)
        decoder = AuxDecoder(self.model, memory, settings.mask)
        return aux_search(decoder, self._lengths(memory).clamp_min(3), settings)

    def _parallel(self, memory: EncoderOutput, numbers: Sequence[int]) -> list[list[ScoredTokens]]:
        decode, length_BC = self.config.decode, self._lengths(memory)
        settings = mask_predict_settings(self.config, self.special)
        found = mask_predict(NarDecoder(self.model, memory), length_BC, settings)
        if decode.rescore is None:
            return found
        if decode.rescore_samples:
            rows, random = NarDecoder(self.model, memory), [random_of(decode.seed, i) for i in numbers]
            found = sampled_variants(rows, found, settings, decode.rescore_samples, random)
        scorer = ArScorer(self.model, self._stream, self._search_settings())
        return rescore(scorer, memory, found, decode.rescore_weight)

    def _drafted(self, memory: EncoderOutput, numbers: Sequence[int]) -> list[list[ScoredTokens]]:
        plan, decode = draft_plan(self.config, self.special), self.config.decode
        sampling = Sampling(decode.temperature, seed=decode.seed)
        sampler = SamplingJudge(plan.search, sampling) if decode.temperature else None
        drafts = ModelDrafts(self.model, memory, self._stream, plan, sampler)
        return [[item] for item in draft_search(drafts, numbers, plan.search, sampler)]


def _check_mode(config: RunConfig) -> None:
    mode, objective, trained = config.decode.mode, config.objective, trained_modes(config.objective)
    both = mode == "draft" or (mode == "nar" and bool(config.decode.rescore))
    aux = ("aux",) * bool(objective.weight_aux and objective.weight_length)
    missing = [name for name in (("ar", "nar") if both else (mode,)) if name not in trained + aux]
    if not missing:
        return
    terms = [term for name in missing for term in ((name,) if name == "ar" else (name, "length"))]
    untrained = ", ".join(
        f"objective.weight_{term} is {getattr(objective, f'weight_{term}')}" for term in terms
    )
    option = "mode 'draft'" if mode == "draft" else "--rescore ar"
    what = f"both ways, as {option} needs" if both else f"in mode {mode!r}"
    raise ConfigError(
        f"the model was not trained to decode {what} ({untrained})",
        "decode.mode" if mode in missing or mode == "draft" else "decode.rescore",
        f"use mode {' or '.join(trained)}" if trained else "use a checkpoint of another run",
    )


def _batches(lengths: Mapping[int, int], most: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first (memory runs out at once or never)."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        width = lengths[batch[0]] if batch else 0
        if batch and (len(batch) == most or (len(batch) + 1) * width > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextmanager
def _evaluating(model: JanusModel) -> Iterator[None]:
    """Evaluation mode without gradients; training goes on as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
