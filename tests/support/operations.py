"""What would make a program wait for a GPU, seen without one.

A tensor is held by one that says it lives on the `meta` device (:func:`on_device`). All is
computed on the CPU, values included, but what goes from the one to the other is noted, with its place, by two
modes of torch: one below autograd, and one above it for tensors made from Python values.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META, CPU = torch.device("meta"), torch.device("cpu")
Seen = Counter[tuple[str, str]]
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")
_MAY_MIX = ("_to_copy", "copy_", "index", "index_put", "index_put_")
"""Operations of torch that take tensors of two devices: copies, and indices from the host."""
_MADE_ON_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)


def _place() -> str:
    """File and line of the package that is running."""
    frames = [x for x in traceback.extract_stack() if "/janus_ds/" in x.filename]
    return f"{frames[-1].filename.rsplit('/janus_ds/', 1)[1]}:{frames[-1].lineno}" if frames else "outside"


class _Held(Tensor):
    """A tensor of the device; its values are on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Held:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=META, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


def _carry_out(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; what it gives is held again if it lies on the device."""
    given = tree_leaves((args, kwargs))
    there = any(isinstance(x, _Held) for x in given)
    there = kwargs["device"] == META if kwargs.get("device") is not None else there
    holders = {id(x.held): x for x in given if isinstance(x, _Held)}
    args, kwargs = tree_map_only(_Held, lambda x: x.held, (args, kwargs))
    out = func(*args, **(kwargs | {"device": CPU} if kwargs.get("device") is not None else kwargs))
    if not there:
        return out
    return tree_map_only(Tensor, lambda x: holders.get(id(x)) if id(x) in holders else _Held(x), out)


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, _Held) for x in given)
        out = _carry_out(func, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if there and (name in _READS or any(not isinstance(x, _Held) for x in made)):
            self._seen["read", _place()] += 1
        boolean = any(x.dtype == torch.bool for x in given[1:])
        if there and boolean and name in ("index", "index_put", "index_put_"):
            self._seen["boolean index", _place()] += 1
        on_host = [x for x in given if not isinstance(x, _Held) and (x.dim() or name == "_to_copy")]
        if on_host and any(isinstance(x, _Held) for x in made):
            self._seen["upload" if name in _MAY_MIX else "mixed", _place()] += 1
        return out


class _Constants(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.tolist, Tensor.numpy, Tensor.data_ptr) and isinstance(args[0], _Held):
            if func != Tensor.data_ptr:
                self._seen["read", _place()] += 1
            return func(args[0].held)
        if func in _MADE_ON_HOST and not isinstance(args[0], Tensor) and kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == META
            self._seen["upload", _place()] += there
            out = func(*args, **{**kwargs, "device": CPU})
            return _Held(out) if there else out
        return func(*args, **kwargs)


def on_device(module: nn.Module) -> nn.Module:
    """The same module with its parameters on the device, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_Held(parameter.data), parameter.requires_grad)
    return module


@contextmanager
def host_traffic(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Counts of (kind, file:line) while the block runs: read, upload, boolean index, mixed (an error)."""
    # Torch knows no autocast for this device.
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # A tensor that holds another cannot be made without version counters.
    patch.setattr(torch, "inference_mode", torch.no_grad)
    seen: Seen = Counter()
    with _Operations(seen), _Constants(seen):
        yield seen
