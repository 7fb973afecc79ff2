"""What a search gives back, and what it needs to know: beam, symbols, limits, rules about tokens.

The rules make some next tokens worse or impossible, given what an output has already. They are those of the
logits processors of transformers that published models ask for, in their order and arithmetic. The output
so far begins with the start symbol, which counts as a token there.

Shape letters: B sentences, K beams, T tokens so far (start included), W windows of n tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError
from janus_ds.model.decoding.cache import ANY, ArSymbols


@dataclass(frozen=True)
class Hypothesis:
    """One output of a search, or of a generator, which adds text and mode.

    Attributes:
        tokens: the inner tokens y_1 .. y_N, without bos and eos.
        score: what outputs of the same input are ranked by; higher is better, at most 0. AR: sum of
            log-probabilities / number of generated tokens ** length penalty (eos is a generated token). NAR:
            average log-probability of a token (`decode.nar_score`). Mode aux: the same, by AUX.
        passes: decoder passes that its sentence took part in; in AR, steps until its search ended.
        token_scores: log-probability of each token, by AR's search or sampling.
        filled: places of the tokens that a search put into a given target.
        mode: "ar", "nar", "draft" or "aux"; "ar" instead of "draft" where drafts did not pay.
        seconds: from the start of its batch (in AR, of its sentence) to the end, in wall time.
    """

    tokens: tuple[int, ...]
    score: float
    passes: int = field(default=0, compare=False)
    token_scores: tuple[float, ...] = field(default=(), compare=False)
    filled: tuple[int, ...] = field(default=(), compare=False)
    mode: str = field(default="", compare=False)
    seconds: float = field(default=0.0, compare=False)
    text: str = ""


def distinct(found: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Hypotheses of a sentence; of those that have the same tokens, the first."""
    return list({item.tokens: item for item in reversed(found)}.values())[::-1]


_DEAD = float("-inf")


@dataclass(frozen=True)
class TokenRules:
    """What is asked of an output.

    Attributes:
        eos: the token that ends it.
        no_repeat: n; a sequence of n tokens may occur once. 0: any number of times.
        penalty: scores of tokens that occurred are multiplied by it if negative, else divided (Keskar et
            al., 2019).
        min_steps: tokens before eos, at least.
    """

    eos: int
    no_repeat: int = 0
    penalty: float = 1.0
    min_steps: int = 0

    def __bool__(self) -> bool:
        return bool(self.no_repeat or self.min_steps) or self.penalty != 1

    def __call__(self, score_BKV: Tensor, past_BKT: Tensor, length_B: Tensor) -> Tensor:
        """The scores after all rules, as a new tensor.

        Args:
            past_BKT: tokens so far, the start symbol first; anything behind them.
            length_B: how many they are, the start symbol included.
        """
        length_B1 = length_B[:, None]
        score_BKV = score_BKV.clone()
        if self.penalty != 1:
            column_T = torch.arange(past_BKT.shape[2], device=past_BKT.device)
            seen_BKT = past_BKT.where(column_T < length_B1[:, None], past_BKT[..., :1])
            old_BKT = score_BKV.gather(2, seen_BKT)
            score_BKV.scatter_(
                2, seen_BKT, torch.where(old_BKT < 0, old_BKT * self.penalty, old_BKT / self.penalty)
            )
        if 0 < self.no_repeat <= past_BKT.shape[2]:
            self._forbid_repeats(score_BKV, past_BKT, length_B1)
        if self.min_steps:
            early_B1 = length_B1 <= self.min_steps
            score_BKV[..., self.eos].masked_fill_(early_B1, _DEAD)
        return score_BKV

    def _forbid_repeats(self, score_BKV: Tensor, past_BKT: Tensor, length_B1: Tensor) -> None:
        """Forbid the last token of each window whose other tokens are the latest ones."""
        size = self.no_repeat
        window_BKWn = past_BKT.unfold(2, size, 1)
        offset_n = torch.arange(size - 1, device=past_BKT.device)
        place_Bn = (length_B1 - size + 1 + offset_n).clamp_min(0)
        latest_BKn = past_BKT.gather(2, place_Bn[:, None].expand(-1, past_BKT.shape[1], -1))
        whole_BW = torch.arange(window_BKWn.shape[2], device=past_BKT.device) + size <= length_B1
        same_BKW = (window_BKWn[..., :-1] == latest_BKn[:, :, None]).all(3) & whole_BW[:, None]
        floor_BKW = score_BKV.new_full(same_BKW.shape, -_DEAD).masked_fill_(same_BKW, _DEAD)
        score_BKV.scatter_reduce_(2, window_BKWn[..., -1], floor_BKW, "amin")


@dataclass(frozen=True)
class SearchSettings:
    """What a beam search needs to know.

    Attributes:
        beam: K; 1 is greedy search.
        max_steps: most tokens that a hypothesis generates, eos (and a forced first token) included.
        start: the token that the decoder is fed first.
        forbidden: tokens that are never generated.
        forced_first: a token that every hypothesis generates first (bos in the `eos_bos` layout).
        shows_first: that token is part of the output.
        forced_last: the token that step `max_steps` generates; -1: any one; None: eos.
        rules: what else changes the scores of tokens; None: nothing.
        stop: "fairseq", "transformers" or "never".
        early_stopping: see `transformers`; without effect on the others.
        length_penalty: exponent of the length.
        fed_first: the step function feeds `start` together with `forced_first`, which is one step less.
            Only where a forced token costs nothing (`transformers`), and for the sentences that begin at
            once.
        prefix: tokens that every output begins with, behind a forced first one; unlike that, they count.
    """

    beam: int
    max_steps: int
    start: int
    eos: int
    forbidden: tuple[int, ...] = ()
    forced_first: int | None = None
    shows_first: bool = False
    forced_last: int | None = None
    rules: TokenRules | None = None
    stop: str = "fairseq"
    early_stopping: bool = False
    length_penalty: float = 1.0
    fed_first: bool = False
    prefix: tuple[int, ...] = ()

    @property
    def free_forced(self) -> bool:
        """A forced token costs nothing."""
        return self.stop != "fairseq"

    def forced(self, step: int) -> int | None:
        """The token that a step must generate, if any."""
        if step >= self.max_steps - 1:
            last = self.eos if self.forced_last is None else self.forced_last
            return last if last >= 0 else None
        return self.forced_first if step == 0 and self.forced_first is not None else self.given(step)

    def given(self, step: int) -> int | None:
        """The token of the prefix that a step generates, if any."""
        place = step - int(self.forced_first is not None)
        return self.prefix[place] if 0 <= place < len(self.prefix) else None

    def shown(self, tokens: Sequence[int]) -> slice:
        """The part of what was generated that is the output: without eos and a forced first token."""
        skip = int(self.forced_first is not None and not self.shows_first)
        return slice(skip, -1 if tokens[-1] == self.eos else None)


def search_settings(config: RunConfig, special: SpecialTokens, prefix: Sequence[int] = ()) -> SearchSettings:
    """For AR: beam search, and the checks of a draft; in mode ar, outputs begin with a prefix.

    Raises:
        ConfigError: the prefix leaves no room for an output, or has unknown symbols.
    """
    decode, symbols = config.decode, ArSymbols.of(config, special)
    most = symbols.most_steps(config)
    if len(prefix) + symbols.lead >= most:
        raise ConfigError(
            f"the prefix has {len(prefix)} tokens, an output up to {most - symbols.lead - 1}",
            "decode.prefix",
            "give a shorter one, or a larger decode.max_length",
        )
    if special.unk in prefix:
        what = "the prefix has characters that the tokenizer does not know, and no output can have them"
        raise ConfigError(what, "decode.prefix", "leave them out")
    min_steps = decode.min_length + symbols.lead if decode.min_length else 0
    rules = TokenRules(special.eos, decode.no_repeat_ngram_size, decode.repetition_penalty, min_steps)
    return SearchSettings(
        beam=decode.beam,
        max_steps=most,
        start=symbols.start,
        eos=special.eos,
        forbidden=symbols.forbidden,
        forced_first=symbols.first,
        shows_first=symbols.first != special.bos,
        forced_last=ANY if symbols.last is None else symbols.last,
        rules=rules or None,
        stop=decode.beam_stop,
        early_stopping=decode.early_stopping,
        length_penalty=decode.length_penalty,
        prefix=tuple(prefix) if decode.mode == "ar" else (),
    )
