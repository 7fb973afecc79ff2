"""What torch carries out: operations counted, and what would make a program wait for a GPU, seen without one.

For the latter tensors live on the `meta` device. A meta tensor has no values, so whatever reads one fails at
once; what is uploaded is noted by two modes of torch, one below autograd (copies, boolean indexing) and one
above it (tensors made from Python values).
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
_MADE_ON_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class CountedOperations(TorchDispatchMode):
    """Every operation by name while it is entered, those of a backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """File and line of the package that is running."""
    frames = [x for x in traceback.extract_stack() if "/janus_ds/" in x.filename]
    return f"{frames[-1].filename.rsplit('/janus_ds/', 1)[1]}:{frames[-1].lineno}" if frames else "outside"


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in _READS:
            self._seen["read", _place()] += 1
        if name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in given[1:]):
            self._seen["boolean index", _place()] += 1
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        on_host = [x for x in given if x.device != META and (x.dim() or name == "_to_copy")]
        if on_host and any(x.device == META for x in made):
            self._seen["upload", _place()] += 1
        return out


class _Constants(TorchFunctionMode):
    def __init__(self, seen: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in _MADE_ON_HOST and isinstance(out, Tensor) and out.device == META
        index = args[1] if func in _INDEXING and args[0].device == META else ()
        lists = [x for x in (index if isinstance(index, tuple) else (index,)) if isinstance(x, list)]
        if (made and not isinstance(args[0], Tensor)) or lists:
            self._seen["upload", _place()] += 1
        return out


@contextmanager
def host_traffic(patch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Counts of (kind, file:line) while the block runs: read, upload, boolean index.

    A read raises besides, for there is nothing to read.
    """
    # Torch knows no autocast for this device.
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    seen: Counter[tuple[str, str]] = Counter()
    with _Operations(seen), _Constants(seen):
        yield seen
