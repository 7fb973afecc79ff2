"""`python -m benchmarks save`: how long training waits for a checkpoint, and how long one takes.

Tensors of a model's shapes stand for its weights and Adam's moments and go through the manager that
training uses. Training waits for the copy to the host; writing happens in the background. On several
ranks, ZeRO's parts are gathered first: 12 bytes a parameter over the network.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import place, summary
from janus_ds.batch import SpecialTokens
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.checkpoint.tensors import Snapshot
from janus_ds.cli.arguments import at_least
from janus_ds.config.locations import user_path
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import ModelConfig, TrainConfig
from janus_ds.io import check_writable
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.parallel.topology import Topology
from janus_ds.progress import bytes_text
from janus_ds.train.master_state import PINNED_BYTES

_SHARE = 0.02
"""Of the time between two saves that training may wait."""
_VOCABULARIES = {"quickstart": 2000, "iwslt": 10152, "bart_base": 50265}


SHARED, ROUNDS = ("device",), 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--shape", choices=sorted(_VOCABULARIES), default="bart_base", help="model preset")
    add("--every", type=at_least(1), default=500, help="train.save_every (default: 500)")
    add("--folder", type=user_path, help="file system to write to (default: the temporary one)")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Save `--rounds` checkpoints after one that is not measured.

    Returns:
        `waiting_seconds` (training stands still) and `writing_seconds` (in the background, to disk and
        read again for the checksums) in wall time, `waiting_cpu_seconds` of the waiting thread, each with
        median, min and max; `bytes`, `parameters`, hardware and versions.

    Raises:
        ResourceError: the disk has no room, or cannot be written to.
    """
    if options.folder is not None:
        check_writable(options.folder)
    state = _State(options.shape, options.device)
    waiting, waiting_cpu, writing = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        topology = Topology(torch.device("cpu"))
        manager = CheckpointManager(Path(folder), TrainConfig(keep_last=1, max_failed_saves=1), topology)
        for step in range(options.rounds + 1):
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            manager.save(step, state, {})
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            manager.finish()
            waiting.append(begun - begin)
            waiting_cpu.append(begun_cpu - begin_cpu)
            writing.append(time.perf_counter() - begun)
    on = place(options)
    return {
        "bench": "save",
        "shape": options.shape,
        "parameters": state.parameters,
        "bytes": 12 * state.parameters,
        "waiting_seconds": summary(waiting[1:]),
        "waiting_cpu_seconds": summary(waiting_cpu[1:]),
        "writing_seconds": summary(writing[1:]),
        "rounds": options.rounds,
        "save_every": options.every,
        **{name: on[name] for name in ("device", "hardware", "versions")},
    }


class _State:
    """Weights and moments of a model on a device: the part of an engine that the manager uses."""

    def __init__(self, shape: str, device: str) -> None:
        special = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=_VOCABULARIES[shape])
        model = JanusModel(ModelConfig(preset=shape, **MODEL_PRESETS[shape]), special, ParallelLayers())
        self._weights = {name: p.detach().to(device) for name, p in model.named_parameters()}
        self._moments = {
            f"{moment}.{name}": torch.rand_like(weight)
            for moment in ("exp_avg", "exp_avg_sq")
            for name, weight in self._weights.items()
        }
        self.parameters = sum(weight.numel() for weight in self._weights.values())
        self._pinned = device == "cuda" and 12 * self.parameters <= PINNED_BYTES

    def snapshot(self) -> Snapshot:
        """Copies on the host, made as training makes them."""
        weights, moments = (
            {name: self._copied(tensor) for name, tensor in tensors.items()}
            for tensors in (self._weights, self._moments)
        )
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return Snapshot(weights, moments, {})

    def _copied(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, pin_memory=self._pinned)
        return copy.copy_(tensor, non_blocking=self._pinned)


def describe(result: dict[str, Any]) -> str:
    """What the result means for training."""
    every = result["save_every"]
    names = ("waiting_seconds", "waiting_cpu_seconds", "writing_seconds")
    waiting, cpu, writing = (result[name]["median"] for name in names)
    return (
        f"{result['shape']}: {result['parameters']:,} parameters, "
        f"{bytes_text(result['bytes'])} a checkpoint\n"
        f"  training waits {waiting:.2f} s for the copy to the host ({cpu:.2f} s of CPU time), "
        f"{writing:.2f} s of writing go on beside it\n"
        f"  {_SHARE:.0%} of the time at train.save_every={every} is held by steps of "
        f"{waiting / _SHARE / every * 1000:.0f} ms and longer; "
        f"the disk keeps up with steps of {(waiting + writing) / every * 1000:.0f} ms and longer"
    )
