"""What decides the bytes of a data directory of translations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from janus_ds.data.pair_files import Languages
from janus_ds.data.prepare_settings import TOKENIZER_KINDS
from janus_ds.errors import ConfigError, DataError

__all__ = ["BPE_WORDS", "PAIR_TOKENIZERS", "PairSettings"]

BPE_WORDS = "bpe-words"
PAIR_TOKENIZERS = (*TOKENIZER_KINDS, BPE_WORDS)


@dataclass(frozen=True)
class PairSettings:
    """Settings of a preparation of pairs; equal settings and inputs give equal bytes.

    Args:
        languages: source and target.
        tokenizer: "sentencepiece-unigram" or "sentencepiece-bpe" (trained on both sides together),
            "bpe-words" (the text is cut into subwords already), or a folder with a saved tokenizer.
        vocab_size: symbols of a trained SentencePiece model, the five special ones included.
        tokenizer_sample_mb: text that the tokenizer is trained on at most, drawn by hash.
        lowercase: all text is lower-cased first.
        max_tokens: longest side in tokens; longer training pairs are left out.
        max_ratio: training pairs whose sides differ by more than this factor in words are left out,
            where the longer one has at least 10 words.
        duplicates: "drop" or "keep" training pairs that came before.
        samples_per_member, members_per_shard: packing.
    """

    languages: Languages
    tokenizer: str = "sentencepiece-unigram"
    vocab_size: int = 8000
    tokenizer_sample_mb: int = 64
    lowercase: bool = False
    max_tokens: int = 254
    max_ratio: float = 4.0
    duplicates: str = "drop"
    samples_per_member: int = 256
    members_per_shard: int = 128

    @property
    def trained_kind(self) -> str | None:
        """The kind of SentencePiece model to train; None for words and given tokenizers."""
        return self.tokenizer.split("-")[1] if self.tokenizer in TOKENIZER_KINDS else None

    @property
    def given(self) -> bool:
        """A folder is given as tokenizer."""
        return self.tokenizer not in PAIR_TOKENIZERS

    def check(self) -> None:
        """Refuse settings that cannot be meant, all at once.

        Raises:
            ConfigError: a number is out of range or a name is unknown.
            DataError: the tokenizer's folder does not exist.
        """
        wholes = {"vocab_size": 8, "tokenizer_sample_mb": 1, "max_tokens": 1}
        wholes |= {"samples_per_member": 1, "members_per_shard": 1}
        faults = [
            f"{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in wholes.items()
            if getattr(self, name) < least
        ]
        if not self.max_ratio >= 1:
            faults.append(f"max_ratio must be at least 1, not {self.max_ratio}")
        if self.languages.source == self.languages.target:
            faults.append(f"source and target language are both {self.languages.source!r}")
        if self.duplicates not in ("drop", "keep"):
            faults.append(f"duplicates must be drop or keep, not {self.duplicates!r}")
        if faults:
            raise ConfigError("; ".join(faults), "settings of the preparation", "change these settings")
        if self.given and not Path(self.tokenizer).is_dir():
            raise DataError(
                "there is no tokenizer of this name, and no such folder",
                f"--tokenizer {self.tokenizer}",
                f"give {', '.join(PAIR_TOKENIZERS)}, or a folder with a tokenizer's files",
            )

    def to_json(self) -> dict[str, Any]:
        """The settings for the manifest, without paths of this machine."""
        fields = asdict(self)
        if self.trained_kind is None:
            fields.update(vocab_size=None, tokenizer_sample_mb=None)
        if self.given:
            # The fingerprint says which one it is.
            fields.update(tokenizer="given")
        return fields
