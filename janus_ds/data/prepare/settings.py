"""What decides the bytes of a prepared data directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from janus_ds.config.locations import checked_name
from janus_ds.data.text.documents import DOCUMENT_RULES, INPUT_FORMATS, DocumentRule
from janus_ds.errors import ConfigError, DataError


@dataclass(frozen=True)
class Languages:
    """The names of both sides, such as de and en."""

    source: str
    target: str


@dataclass(frozen=True)
class Limits:
    """Most tokens of each side, without bos and eos; longer ones lose their end."""

    source: int
    target: int


NORMALIZATIONS = ("identity", "nfkc")
TOKENIZER_KINDS = ("sentencepiece-unigram", "sentencepiece-bpe")
BPE_WORDS = "bpe-words"
PAIR_TOKENIZERS = (*TOKENIZER_KINDS, BPE_WORDS)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What all preparations have.

    Args:
        samples_per_member: samples packed under one tar key.
        members_per_shard: packed members in one tar file.
    """

    samples_per_member: int = 256
    members_per_shard: int = 128

    def _refuse(self, faults: list[str], **least: int) -> None:
        """Refuse settings that cannot be meant, all at once: these faults, and numbers that are too small.

        Raises:
            ConfigError: there is any.
        """
        small = [
            f"--{name.replace('_', '-')} must be at least {number}, not {getattr(self, name)}"
            for name, number in {**least, "samples_per_member": 1, "members_per_shard": 1}.items()
            if getattr(self, name) < number
        ]
        if small or faults:
            what = "; ".join([*small, *faults])
            raise ConfigError(what, "settings of the preparation", "give other values")


@dataclass(frozen=True, kw_only=True)
class TextSettings(_Settings):
    """What preparations of plain text have.

    Args:
        tokenizer: "sentencepiece-unigram" or "sentencepiece-bpe" (trained on the input; of pairs, on both
            sides together), for pairs "bpe-words" (the text is cut into subwords already), or a folder with
            a saved tokenizer or with vocab.json and merges.txt.
        vocab_size: symbols of a trained SentencePiece model, the five special ones included.
        tokenizer_sample_mb: text that the tokenizer is trained on at most, drawn by hash.
        normalization: of a trained SentencePiece model, identity or nfkc; auto: as
            `tokenizer.fitting_normalization` says.
    """

    tokenizer: str = "sentencepiece-unigram"
    vocab_size: int = 32000
    tokenizer_sample_mb: int = 32
    normalization: str = "auto"
    _kinds: ClassVar[tuple[str, ...]] = TOKENIZER_KINDS

    @property
    def trained_kind(self) -> str | None:
        """The kind of SentencePiece model to train; None for words and given tokenizers."""
        return self.tokenizer.split("-")[1] if self.tokenizer in TOKENIZER_KINDS else None

    @property
    def given(self) -> bool:
        """A folder is given as tokenizer."""
        return self.tokenizer not in self._kinds

    def to_json(self) -> dict[str, Any]:
        """The settings for manifest and journal, without paths of this machine."""
        fields = asdict(self)
        if self.normalization == "auto":
            del fields["normalization"]  # as older preparations wrote it
        if self.trained_kind is None:
            fields.update(vocab_size=None, tokenizer_sample_mb=None)
        if self.given:
            # The fingerprint says which one it is.
            fields.update(tokenizer="given")
        return fields

    def _refuse(self, faults: list[str], **least: int) -> None:
        if self.normalization not in ("auto", *NORMALIZATIONS):
            names = ", ".join(NORMALIZATIONS)
            faults = [*faults, f"--normalization must be auto, {names}, not {self.normalization!r}"]
        super()._refuse(faults, vocab_size=8, tokenizer_sample_mb=1, **least)
        if self.given and not Path(self.tokenizer).is_dir():
            raise DataError(
                "there is no tokenizer of this name, and no such folder",
                f"--tokenizer {self.tokenizer}",
                f"give {', '.join(self._kinds)}, or a folder with a tokenizer's files",
            )


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(TextSettings):
    """Settings of a preparation of blocks; equal settings and inputs give equal bytes.

    Args:
        block_tokens: most tokens of a block, without bos and eos.
        valid_share: share of the documents for validation, drawn by the hash of their text.
        test_share: the same for test.
        rule: how files are cut into documents.
    """

    block_tokens: int = 510
    valid_share: float = 0.01
    test_share: float = 0.0
    rule: DocumentRule = field(default_factory=DocumentRule)

    def check(self) -> None:
        """Refuse settings that cannot be meant."""
        faults = []
        if not (self.valid_share >= 0 and self.test_share >= 0 and self.valid_share + self.test_share < 1):
            faults.append("--valid-share and --test-share must be 0 or more and less than 1 together")
        if self.rule.format not in INPUT_FORMATS:
            faults.append(f"--format must be one of {', '.join(INPUT_FORMATS)}, not {self.rule.format!r}")
        if self.rule.document not in DOCUMENT_RULES:
            faults.append(
                f"--document must be one of {', '.join(DOCUMENT_RULES)}, not {self.rule.document!r}"
            )
        self._refuse(faults, block_tokens=1)


@dataclass(frozen=True)
class PairSettings(TextSettings):
    """Settings of a preparation of pairs; equal settings and inputs give equal bytes.

    Args:
        languages: source and target.
        lowercase: all text is lower-cased first.
        max_tokens: longest side in tokens; longer training pairs are left out.
        max_ratio: training pairs whose sides differ by more than this factor in words are left out,
            where the longer one has at least 10 words.
        duplicates: "drop" or "keep" training pairs that came before.
    """

    languages: Languages
    vocab_size: int = field(default=8000, kw_only=True)
    lowercase: bool = False
    max_tokens: int = 254
    max_ratio: float = 4.0
    duplicates: str = "drop"
    _kinds: ClassVar[tuple[str, ...]] = PAIR_TOKENIZERS

    def check(self) -> None:
        """Refuse settings that cannot be meant."""
        faults = []
        if not self.max_ratio >= 1:
            faults.append(f"--max-ratio must be at least 1, not {self.max_ratio}")
        if self.languages.source == self.languages.target:
            faults.append(f"source and target language are both {self.languages.source!r}")
        if self.duplicates not in ("drop", "keep"):
            faults.append(f"duplicates must be drop or keep, not {self.duplicates!r}")
        for name in asdict(self.languages).values():
            try:
                checked_name(name)
            except ValueError:
                faults.append(f"the language {name!r} cannot be the end of a file's name")
        self._refuse(faults, max_tokens=1)


@dataclass(frozen=True)
class GlgeSettings(_Settings):
    """What decides the bytes of the result, beside the input.

    Args:
        task: name of the task, for the record.
        tokenizer: folder with a tokenizer: that of the run to start from (RUN/tokenizer).
        limits: most tokens of each side.
    """

    task: str
    tokenizer: Path
    limits: Limits

    def check(self) -> None:
        """Refuse settings that cannot be meant."""
        numbers = {"--source-tokens": self.limits.source, "--target-tokens": self.limits.target}
        self._refuse([f"{name} must be at least 1, not {n}" for name, n in numbers.items() if n < 1])
