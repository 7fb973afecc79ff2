"""What decides the bytes of a prepared data directory, and what only decides how fast they come."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from janus_ds.data.documents import DOCUMENT_RULES, INPUT_FORMATS, DocumentRule
from janus_ds.data.tokenizer import SENTENCEPIECE_KINDS
from janus_ds.errors import ConfigError, DataError

__all__ = ["TOKENIZER_KINDS", "Execution", "PrepareSettings"]

TOKENIZER_KINDS = tuple(f"sentencepiece-{kind}" for kind in SENTENCEPIECE_KINDS)


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of a preparation; equal settings and inputs give equal bytes.

    Args:
        tokenizer: "sentencepiece-unigram" or "sentencepiece-bpe" (trained on the input), or a folder
            with a saved tokenizer or with vocab.json and merges.txt.
        vocab_size: symbols of a trained tokenizer, the five special ones included.
        tokenizer_sample_mb: text that the tokenizer is trained on at most, drawn by hash.
        block_tokens: most tokens of a block, without bos and eos.
        valid_share: share of the documents for validation, drawn by the hash of their text.
        test_share: the same for test.
        rule: how files are cut into documents.
        samples_per_member: blocks packed under one tar key.
        members_per_shard: packed members in one tar file.
    """

    tokenizer: str = "sentencepiece-unigram"
    vocab_size: int = 32000
    tokenizer_sample_mb: int = 32
    block_tokens: int = 510
    valid_share: float = 0.01
    test_share: float = 0.0
    rule: DocumentRule = field(default_factory=DocumentRule)
    samples_per_member: int = 256
    members_per_shard: int = 128

    @property
    def trained_kind(self) -> str | None:
        """The kind of SentencePiece model to train; None where a folder is given."""
        return self.tokenizer.split("-")[1] if self.tokenizer in TOKENIZER_KINDS else None

    def check(self) -> None:
        """Refuse settings that cannot be meant, all at once.

        Raises:
            ConfigError: a number is out of range or a name is unknown.
            DataError: the tokenizer's folder does not exist.
        """
        wholes = {
            "vocab_size": 8,
            "tokenizer_sample_mb": 1,
            "block_tokens": 1,
            "samples_per_member": 1,
            "members_per_shard": 1,
        }
        faults = [
            f"{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in wholes.items()
            if getattr(self, name) < least
        ]
        if not (self.valid_share >= 0 and self.test_share >= 0 and self.valid_share + self.test_share < 1):
            faults.append("valid_share and test_share must be 0 or more and less than 1 together")
        if self.rule.format not in INPUT_FORMATS:
            faults.append(f"format must be one of {', '.join(INPUT_FORMATS)}, not {self.rule.format!r}")
        if self.rule.document not in DOCUMENT_RULES:
            faults.append(f"document must be one of {', '.join(DOCUMENT_RULES)}, not {self.rule.document!r}")
        if faults:
            raise ConfigError("; ".join(faults), "settings of the preparation", "change these settings")
        if self.trained_kind is None and not Path(self.tokenizer).is_dir():
            raise DataError(
                "there is no tokenizer of this name, and no such folder",
                f"--tokenizer {self.tokenizer}",
                f"give {' or '.join(TOKENIZER_KINDS)}, or a folder with a tokenizer's files",
            )

    def to_json(self) -> dict[str, Any]:
        """The settings for manifest and journal, without paths of this machine."""
        fields = asdict(self)
        if self.trained_kind is None:
            # The fingerprint says which one it is.
            fields.update(tokenizer="given", vocab_size=None, tokenizer_sample_mb=None)
        return fields


@dataclass(frozen=True)
class Execution:
    """How the work is done; nothing here changes a byte of the result.

    Args:
        processes: processes that tokenise; 1 works in the calling process.
        unit_characters: text handed to a process at once.
        commit_seconds: progress is made lasting at least this often (and after every shard).
    """

    processes: int = 1
    unit_characters: int = 1 << 20
    commit_seconds: float = 20.0
