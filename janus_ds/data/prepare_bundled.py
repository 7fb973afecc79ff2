"""The corpus that comes with the package, made into shards on first use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

from janus_ds.data.index import MANIFEST_NAME
from janus_ds.data.prepare_job import PrepareProgress, prepare
from janus_ds.data.prepare_settings import PrepareSettings
from janus_ds.io import disk_faults

__all__ = ["prepare_bundled_corpus"]

_CORPUS = "assets/corpus/novels.txt.xz"
_VALID_SHARE = 0.03
_TOKENIZER_SAMPLE_MB = 3


def prepare_bundled_corpus(
    output: Path | None = None,
    block_tokens: int = 30,
    vocab_size: int = 2000,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> Path:
    """Shards of the bundled novels; returns at once where they are there already.

    Several processes may call it at the same time: one builds, beside the place and renamed into it
    when whole, the others wait.

    Args:
        output: the data directory; None: `runs/data/novels-BLOCK-VOCABULARY` in the working folder.
        block_tokens: most tokens of a block, without bos and eos.
        vocab_size: symbols of the unigram tokenizer trained on it.
        progress: called now and then.

    Returns:
        The data directory.

    Raises:
        DataError: `output` holds something else.
        ResourceError: full disk or missing permission.
    """
    target = output or Path("runs", "data", f"novels-{block_tokens}-{vocab_size}")
    settings = PrepareSettings(
        vocab_size=vocab_size,
        tokenizer_sample_mb=_TOKENIZER_SAMPLE_MB,
        block_tokens=block_tokens,
        valid_share=_VALID_SHARE,
    )
    corpus = resources.files("janus_ds").joinpath(_CORPUS)
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with resources.as_file(corpus) as path, _turn(target):
        if (target / MANIFEST_NAME).is_file():
            prepare([path], target, settings)  # checks that it holds just this
            return target
        building = target.with_name(f".{target.name}.building")
        prepare([path], building, settings, progress=progress)
        with disk_faults(target):
            building.rename(target)
    return target


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    """One process at a time, by a lock file beside the target."""
    with disk_faults(target):
        lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
