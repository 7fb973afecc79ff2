"""Making data directories: the public face of the `prepare_*` modules.

`prepare` turns text files into shards, `prepare_bundled_corpus` does so for the corpus that comes
with the package. Settings are in `prepare_settings`, the work in `prepare_job`.
"""

from __future__ import annotations

from janus_ds.data.documents import DOCUMENT_RULES, INPUT_FORMATS, DocumentRule
from janus_ds.data.prepare_bundled import prepare_bundled_corpus
from janus_ds.data.prepare_job import PrepareProgress, PrepareReport, prepare
from janus_ds.data.prepare_settings import TOKENIZER_KINDS, Execution, PrepareSettings

__all__ = [
    "DOCUMENT_RULES",
    "INPUT_FORMATS",
    "TOKENIZER_KINDS",
    "DocumentRule",
    "Execution",
    "PrepareProgress",
    "PrepareReport",
    "PrepareSettings",
    "prepare",
    "prepare_bundled_corpus",
]
