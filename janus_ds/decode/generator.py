"""Text from a trained model, in any of its ways of decoding.

    generator = Generator.from_checkpoint("runs/quickstart", mode="nar", iterations=4)
    for hypothesis in generator.generate(["The old man <mask> home ."]):
        print(hypothesis.text)

Inputs are sorted by length into batches and given back in their order.

Shape letters: B sentences, C length candidates, K length classes, S source tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from janus_ds.config.modes import check_mode, check_used, way_of
from janus_ds.config.presets import resolve
from janus_ds.config.schema import RunConfig
from janus_ds.decode.aux_search import AuxDecoder, aux_search
from janus_ds.decode.beam_search import CachedSteps, beam_search
from janus_ds.decode.draft import DraftSearch, Payoff
from janus_ds.decode.infill import Target, given_rows, parse_target, word_beginnings
from janus_ds.decode.load import InferenceOptions, load_run, prepare_for_inference
from janus_ds.decode.mask_predict import (
    NarDecoder,
    length_candidates,
    mask_predict,
    mask_predict_settings,
    most_rows,
    plain_settings,
)
from janus_ds.decode.rescore import ArScorer, rescore
from janus_ds.decode.sample import Draws, Sampling, sample_search
from janus_ds.decode.search_settings import Hypothesis, SearchSettings, distinct, search_settings
from janus_ds.decode.text import TextCodec, batches_of, checked_texts, searches_of, too_long
from janus_ds.errors import CheckpointError, ConfigError, DataError
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.janus import JanusModel

Progress = Callable[[int, int], None]
"""Called after each batch with the number of finished inputs and of all."""


class Generator:
    """Decodes texts with one model in one mode.

    Args:
        model: any device and precision; put into evaluation mode during a call only.
        text: the tokenizer; None allows :meth:`generate_ids` alone.
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
        config: RunConfig,
        batch_sentences: int = 32,
        batch_tokens: int = 4096,
    ) -> None:
        config = resolve(config)
        check_mode(config)
        self.model = model
        self.text = text
        self.special = model.special
        self.config = config
        self.batch_sentences = batch_sentences
        self.batch_tokens = batch_tokens
        self._payoff = Payoff()

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
            ConfigError: an option that does not exist, or that the mode does not use; an untrained mode.
        """
        options = decode | ({} if mode is None else {"mode": mode})
        run = load_run(path, options, device)
        check_used(run.config.decode, decode)
        inference = (inference or InferenceOptions()).of_modes((run.config.decode.mode,))
        return cls(prepare_for_inference(run.model, inference), run.codec(ids), run.config)

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
        codec = self._codec()
        return self.with_text(
            self.generate_ids([codec.encode(text) for text in checked_texts(texts)], progress)
        )

    def infill(
        self, texts: str | Sequence[str], targets: str | Sequence[str], lengths: int | Sequence[int] = 1
    ) -> list[Hypothesis]:
        """Given targets with their blanks filled, in mode nar or aux; all other text is kept to the letter.

        Args:
            targets: one for each; blanks are `___` or `<mask>`, as "Das ist ___ sehr ___ Haus".
            lengths: tokens that each blank may have: a number, or several, of whose combinations the best
                is given.

        Raises:
            ConfigError: another mode.
            DataError: see :meth:`targets`; no Unicode text.
        """
        codec, sources = self._codec(), checked_texts(texts)
        given = self.targets(targets, lengths)
        found = self.generate_ids([codec.encode(text) for text in sources], targets=given)
        return [candidates[0] for candidates in self.with_text(found, given)]

    def with_text(
        self, found: Sequence[Sequence[Hypothesis]], targets: Sequence[Target | None] | None = None
    ) -> list[list[Hypothesis]]:
        """What :meth:`generate_ids` found, with its text; of targets, what stands around blanks is kept."""
        codec, given = self._codec(), [None] * len(found) if targets is None else targets
        return [
            [
                replace(item, text=target.text(item, codec) if target else codec.decode(item.tokens))
                for item in group
            ]
            for group, target in zip(found, given, strict=True)
        ]

    def targets(self, texts: str | Sequence[str], lengths: int | Sequence[int]) -> list[Target]:
        """Targets with blanks, as :meth:`generate_ids` takes them; one that has none stays as it is.

        Raises:
            ConfigError: another mode than nar or aux.
            DataError: none has a blank, or one has too many tokens, lengths or blanks.
        """
        if "target" not in way_of(self.config.decode).options:
            raise ConfigError(
                f"mode {self.config.decode.mode} writes from left to right and cannot keep to a given target",
                "decode.mode",
                "use mode nar or aux",
            )
        most, lengths = most_rows(self.config) - 2, [lengths] if isinstance(lengths, int) else lengths
        codec, mask, given = self._codec(), self.special.mask, checked_texts(texts, "target")
        found = [parse_target(text, codec, mask, lengths, most, i) for i, text in enumerate(given, 1)]
        if found and not any(target.has_blank for target in found):
            fix = "write ___ or <mask> where text is wanted"
            raise DataError("the target has no blank", "line 1 of the target", fix)
        return found

    def generate_ids(
        self,
        sources: Sequence[Sequence[int]],
        progress: Progress | None = None,
        first: int = 0,
        targets: Sequence[Target | None] | None = None,
    ) -> list[list[Hypothesis]]:
        """As :meth:`generate_nbest`, for sources that are token ids without bos and eos.

        An empty source gives an empty hypothesis. Samples are drawn by the number of a source, counted from
        `first`. With targets, one for each source, their blanks are filled (without any a target is its own
        hypothesis); None: an empty hypothesis.
        """
        self._check_lengths(sources)
        if targets is not None and len(targets) != len(sources):
            raise DataError(
                f"there are {len(sources)} inputs and {len(targets)} targets",
                "the target",
                "give one for each",
            )
        mode = self.config.decode.mode
        found = [[Hypothesis((), 0.0, mode=mode)] for _ in sources]
        filled = [i for i, source in enumerate(sources) if source]
        if targets is not None:
            found = [[Hypothesis(target.ids if target else (), 0.0, mode=mode)] for target in targets]
            filled = [i for i, target in enumerate(targets) if target and target.has_blank]
        done = len(sources) - len(filled)
        lengths = {i: len(sources[i]) + 2 for i in filled}
        batches = batches_of(lengths, self.batch_sentences, self.batch_tokens)
        # AR: a batch begins, the next ones take the places that become free.
        searches = searches_of(batches, joined=mode == "ar" and not self.config.decode.temperature)

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None and count:
                progress(done, len(sources))

        for places, batch in searches:
            before, began = done, perf_counter()
            numbers, blanks = [first + i for i in batch], [targets[i] for i in batch] if targets else []
            results = self._decode([sources[i] for i in batch], numbers, places, report, blanks)
            for index, candidates in zip(batch, results, strict=True):
                seconds = perf_counter() - began
                found[index] = [
                    replace(item, seconds=item.seconds or seconds, mode=item.mode or mode)
                    for item in candidates
                ]
            report(len(batch) - (done - before))
        return found

    def _codec(self) -> TextCodec:
        if self.text is None:
            raise ConfigError(
                "this generator has no tokenizer", "Generator", "use generate_ids, or give it a tokenizer"
            )
        return self.text

    def _check_lengths(self, sources: Sequence[Sequence[int]]) -> None:
        table, size = self.config.model.max_source_positions, self.special.vocab_size
        for number, source in enumerate(sources, 1):
            if len(source) + 2 > table:
                raise too_long(len(source), number, table, "cut the line into shorter ones")
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
        targets: Sequence[Target | None],
    ) -> list[list[Hypothesis]]:
        mode = self.config.decode.mode
        clock = perf_counter if self.model.output_weight.is_cuda else process_time
        greedy, began = not self.config.decode.temperature, clock()
        drafted = mode == "draft" and (not greedy or self._payoff.pays(len(sources)))
        with _evaluating(self.model):
            if greedy and mode in ("ar", "draft") and not drafted:
                found = self._autoregressive(sources, places, report)
            else:
                memory = self.model.encode(*self._pad(sources))
                if drafted:
                    found = self._drafted(memory, numbers)
                elif mode == "ar":
                    found = self._sampled(memory, numbers)
                else:
                    found = self._parallel(memory, numbers, targets)
        if mode == "draft" and greedy:
            self._payoff.note([group[0] for group in found], drafted, clock() - began)
            found = [[replace(item, mode="" if drafted else "ar") for item in group] for group in found]
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
    ) -> list[list[Hypothesis]]:
        """Search sources, the longest first, at so many places at a time; `report` counts finished ones."""
        settings, began = self._search_settings(), perf_counter()
        memory = self.model.encode(*self._pad(sources[:places]))
        begun, encoding = memory.sentences, perf_counter() - began

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
        found = beam_search(steps, begun, settings, device, waiting)
        for number, group in enumerate(found[:places]):
            found[number] = [replace(item, seconds=item.seconds + encoding) for item in group]
        return found

    def _sampled(self, memory: EncoderOutput, numbers: Sequence[int]) -> list[list[Hypothesis]]:
        settings = self._search_settings()
        cache = self.model.start_cache(memory, self._stream, settings.beam, settings.max_steps)
        steps, device = CachedSteps(self.model, cache), memory.states_BSD.device
        return sample_search(steps, self._draws(numbers), settings, device)

    def _draws(self, numbers: Sequence[int]) -> Draws:
        decode = self.config.decode
        return Draws(Sampling(decode.temperature, decode.top_k, decode.top_p, decode.seed), numbers)

    def _search_settings(self) -> SearchSettings:
        prefix = self.config.decode.prefix
        return search_settings(self.config, self.special, self._codec().encode(prefix) if prefix else ())

    @cached_property
    def _begins_word_V(self) -> Tensor | None:
        if self.text is None:
            return None
        begins_V = word_beginnings(self.text, self.special.vocab_size)
        return None if begins_V is None else begins_V.to(self.model.output_weight.device)

    @property
    def _stream(self) -> ArStream:
        return ArStream.of(self.config.objective, self.special)

    def _lengths(self, memory: EncoderOutput) -> Tensor:
        """Candidate lengths with bos and eos, (B, C)."""
        decode, convention = self.config.decode, self.config.objective.length_convention or "inner"
        rule, longest = decode.nar_score or "paper", most_rows(self.config)
        logits_BK = self.model.length_logits(memory)
        return length_candidates(logits_BK, rule, decode.length_beam, convention, longest)

    def _parallel(
        self, memory: EncoderOutput, numbers: Sequence[int], targets: Sequence[Target | None] = ()
    ) -> list[list[Hypothesis]]:
        """Modes nar and aux: all lengths of a sentence, or all candidates of its given target."""
        decode, given_RL = self.config.decode, None
        judged, given = decode.mode == "aux", [target for target in targets if target]
        draws = self._draws(numbers) if judged and decode.temperature else None
        settings = (plain_settings if judged or given else mask_predict_settings)(self.config, self.special)
        if given:
            settings = replace(settings, begins_word_V=self._begins_word_V)
            rows = given_rows(given, settings)
            length_BC, given_RL = (x.to(memory.states_BSD.device) for x in rows)
        else:
            length_BC = self._lengths(memory).clamp_min(3 if judged else 2)
        if judged:
            decoder, certain = AuxDecoder(self.model, memory, settings.mask), decode.aux_order == "certain"
            found = aux_search(decoder, length_BC, settings, given_RL, certain, draws)
        else:
            found = mask_predict(NarDecoder(self.model, memory), length_BC, settings, given_RL)
        if draws is None:
            # Several of the likeliest lengths may be cut to one.
            found = [distinct(group) for group in found]
        if judged or decode.rescore is None:
            return found
        return rescore(ArScorer(self.model, self.config), memory, found)

    def _drafted(self, memory: EncoderOutput, numbers: Sequence[int]) -> list[list[Hypothesis]]:
        draws = self._draws(numbers) if self.config.decode.temperature else None
        return [[item] for item in DraftSearch(self.model, memory, self.config, draws).run()]


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
