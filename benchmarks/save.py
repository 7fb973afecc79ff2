"""`python -m benchmarks save`: how long training waits for a checkpoint, and how long one takes.

Tensors of a model's shapes stand for its weights and Adam's moments; they go through the manager that
training uses. What training waits for is the copy to the host; writing happens beside it. On several
ranks the gathering of ZeRO's parts comes on top: 12 bytes a parameter over the network once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import add_device_argument, check_device, circumstances, summary, write_json
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import UsageError
from janus_ds.tables import bytes_text

if TYPE_CHECKING:
    from janus_ds.checkpoint.tensors import Snapshot

__all__ = ["bench_save", "main"]

_SHARE = 0.02
"""Of the time between two saves that training may wait."""
_VOCABULARIES = {"quickstart": 2000, "iwslt": 10152, "bart_base": 50265}


def main(arguments: Sequence[str]) -> int:
    """Measure saves of one model, print what they mean for training, write JSON if asked."""
    parser = new_parser("bench save", "How long training waits for a checkpoint, and how long one takes.")
    parser.add_argument("--shape", choices=sorted(_VOCABULARIES), default="bart_base", help="model preset")
    parser.add_argument("--rounds", type=int, default=3, help="measured saves (default: 3)")
    parser.add_argument(
        "--every", type=int, default=500, help="train.save_every to reckon with (default: 500)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--folder", type=Path, help="file system to write to (default: that of temporary files)"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    if min(parsed.rounds, parsed.every) < 1:
        raise UsageError("there must be at least one", "--rounds, --every", "give numbers above 0")
    result = bench_save(parsed.shape, parsed.rounds, parsed.device, parsed.folder)
    print(_describe(result, parsed.every))
    if parsed.json is not None:
        write_json(parsed.json, {**result, "save_every": parsed.every})
    return 0


def bench_save(shape: str, rounds: int, device: str = "cpu", folder: Path | None = None) -> dict[str, Any]:
    """Save `rounds` checkpoints after one that is not measured.

    Returns:
        `waiting_seconds` (training stands still) and `writing_seconds` (in the background, to disk and
        read again for the checksums) on the wall, `waiting_cpu_seconds` of the waiting thread, which a
        loaded machine disturbs less, each with median, min and max; `bytes`, `parameters`, hardware.

    Raises:
        UsageError: there is no such device; ResourceError: the disk has no room.
    """
    import torch

    from janus_ds.checkpoint.manager import CheckpointManager, SavePolicy
    from janus_ds.parallel.topology import Topology

    check_device(device)
    state = _State(shape, device)
    waiting, waiting_cpu, writing = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        topology = Topology(torch.device("cpu"))
        manager = CheckpointManager(Path(place), SavePolicy(1, max_failed=1), topology)
        for step in range(rounds + 1):
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            manager.save(step, state, {})
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            manager.finish()
            waiting.append(begun - begin)
            waiting_cpu.append(begun_cpu - begin_cpu)
            writing.append(time.perf_counter() - begun)
    return {
        "bench": "save",
        "shape": shape,
        "parameters": state.parameters,
        "bytes": 12 * state.parameters,
        "waiting_seconds": summary(waiting[1:]),
        "waiting_cpu_seconds": summary(waiting_cpu[1:]),
        "writing_seconds": summary(writing[1:]),
        "rounds": rounds,
        "device": device,
        **circumstances(),
    }


class _State:
    """Weights and moments of a model on a device; what the manager sees of an engine."""

    def __init__(self, shape: str, device: str) -> None:
        import torch

        from janus_ds.batch import SpecialTokens
        from janus_ds.model.janus import JanusModel
        from janus_ds.parallel.tensor_parallel import make_layers

        special = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=_VOCABULARIES[shape])
        config = ModelConfig(preset=shape, **MODEL_PRESETS[shape])
        model = JanusModel(config, special, make_layers(1))
        self._weights = {name: p.detach().to(device) for name, p in model.named_parameters()}
        self._moments = {
            f"{moment}.{name}": torch.rand_like(weight)
            for moment in ("exp_avg", "exp_avg_sq")
            for name, weight in self._weights.items()
        }

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self._weights.values())

    def snapshot(self) -> Snapshot:
        from janus_ds.checkpoint.tensors import Snapshot

        weights, moments = (
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self._weights, self._moments)
        )
        return Snapshot(weights, moments, {})


def _describe(result: dict[str, Any], every: int) -> str:
    waiting, cpu, writing = (
        result[f"{name}_seconds"]["median"] for name in ("waiting", "waiting_cpu", "writing")
    )
    size = bytes_text(result["bytes"])
    return "\n".join(
        [
            f"{result['shape']}: {result['parameters']:,} parameters, {size} a checkpoint",
            f"  training waits {waiting:.2f} s for the copy to the host ({cpu:.2f} s of CPU time), "
            f"{writing:.2f} s of writing go on beside it",
            f"  {_SHARE:.0%} of the time at train.save_every={every} is held by steps of "
            f"{waiting / _SHARE / every * 1000:.0f} ms and longer; "
            f"the disk keeps up with steps of {(waiting + writing) / every * 1000:.0f} ms and longer",
        ]
    )
