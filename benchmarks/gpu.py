"""`python -m benchmarks gpu`: what to run first on a GPU: whether all is right there, then how fast it is.

Correctness of attention, decoding, and a run that stops and goes on, then the tables of the other benches.
Every part is judged by itself, so that one that fails hides no other; what does not begin within `--minutes`
is left out. Needs no network, only a checkout: the references are those of the tests. With `--device cpu`
the same parts run in a smaller form.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import attention_of
from benchmarks.common import place
from janus_ds.cli.arguments import at_least
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import InferenceOptions
from janus_ds.io import write_atomic
from janus_ds.model.attention import BACKENDS
from janus_ds.progress import table
from tests.support.launch import free_port
from tests.support.two_stream import long_batch, valid_rows

Outcome = tuple[bool | None, dict[str, Any], str]
"""Whether all was right (None: it was left out), the figures, and what the page shows."""

ROOT = Path(__file__).parents[1]
_BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative error of values and of each gradient against dense attention in float64 on the same inputs."""
_TIE = 1e-4
"""Two outputs whose scores differ less are equally good; rounding decides between them."""
_WAYS: dict[str, dict[str, Any]] = {
    "ar, beam 5": {"mode": "ar"},
    "ar, greedy": {"mode": "ar", "beam": 1},
    "nar, 4 iterations": {"mode": "nar", "iterations": 4},
    "nar, threshold": {"mode": "nar", "iterations": None, "threshold": 0.9},
    "aux": {"mode": "aux"},
    "draft": {"mode": "draft"},
}
_TEXTS = [
    "Der Hund schläft unter dem Tisch, weil es draußen regnet.",
    "Meine Mutter ist krank.",
    "Zwei Kinder spielen im Garten mit einem roten Ball.",
    "Wo ist der Bahnhof?",
    "Ein Mann mit einem Hut steht vor einem alten Haus und liest die Zeitung.",
    "Ich habe heute keine Zeit.",
    "Die Frau trägt ein blaues Kleid und wartet auf den Bus.",
    "Wir fahren morgen mit dem Zug nach Berlin, um unsere Freunde zu besuchen.",
]
_STEPS, _STOP = 50, 20
_BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
_GPU_TESTS = ("train/test_compiling", "numerics/test_fused_head")


SHARED, ROUNDS = ("device",), 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    parser.set_defaults(device="cuda")
    parser.add_argument("--minutes", type=at_least(1), default=8, help="begin no part later (default: 8)")
    parser.add_argument("--no-tables", action="store_true", help="correctness alone")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts, and print each; a page of them lies beside the JSON file.

    Returns:
        `wrong`, the names of the parts that were, and the figures of each in `parts`.
    """
    begun, on = time.perf_counter(), place(options)
    parts: dict[str, Any] = {}
    page = [f"# Check of {options.device}\n", f"{on['hardware']}\n\n{on['versions']}\n"]
    for name, part in _parts(options):
        if (start := time.perf_counter()) - begun > 60 * options.minutes:
            right, figures, shown = None, dict[str, Any](), f"{options.minutes} minutes are over"
        else:
            right, figures, shown = _judged(part)
        seconds = round(time.perf_counter() - start, 1)
        parts[name] = {"right": right, "seconds": seconds, **figures}
        word = {True: "right", False: "WRONG", None: "left out"}[right]
        page.append(f"## {name}: {word} ({seconds:.0f} s)\n\n```\n{shown}\n```\n")
        print(page[-1], flush=True)
    wrong = [name for name, part in parts.items() if part["right"] is False]
    result = {"bench": "gpu", "wrong": wrong, "seconds": time.perf_counter() - begun, "parts": parts, **on}
    if options.json is not None:
        write_atomic(options.json.with_suffix(".md"), "\n".join([*page, describe(result), ""]).encode())
    return result


def describe(result: dict[str, Any]) -> str:
    """What was wrong, and what was left out, in one line."""
    left = [name for name, part in result["parts"].items() if part["right"] is None]
    out = f"; left out: {', '.join(left)}" if left else ""
    return f"wrong: {', '.join(result['wrong']) or 'nothing'}{out}; {result['seconds']:.0f} s"


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    device, small = options.device, options.device == "cpu"
    yield "attention against dense in float64", partial(check_attention, device)
    yield "tokens against float64 on the CPU", partial(check_tokens, device)
    yield "ZeRO-2, bf16: stopped and resumed, bit for bit", partial(check_resume, device)
    if not small:
        yield "tests that need a GPU", check_tests
    if options.no_tables:
        return
    shared = ("--device", device, "--rounds", str(options.rounds))
    hf = not small and find_spec("transformers") is not None
    for shape in ("small",) if small else ("iwslt", "bart_base"):
        here = ("--shape", shape, "--precision", "bfloat16", *shared)
        yield f"training, {shape}", partial(_table, "train", "--also", f"authors,torch{',hf' * hf}", *here)
        yield f"attention, {shape}", partial(_table, "attention", *here)
    for shape in ("tiny",) if small else ("iwslt", "bart_base"):
        only = "ar fp32,ar bf16,janus bf16,nar 4,transformers"
        jobs = ("--only", only, "--batch", "1,32", "--peers", "hf" if hf else "none")
        yield f"decoding, {shape}", partial(_table, "decode", "--shape", shape, *jobs, *shared)


def _judged(part: Callable[[], Outcome]) -> Outcome:
    try:
        return part()
    except Exception as error:  # Whatever is wrong with one part: the others are wanted all the same.
        return False, {"error": repr(error)}, f"{type(error).__name__}: {error}"


def check_attention(device: str) -> Outcome:
    """Values and gradients of each back end, on ragged sentences of several blocks."""
    batch = long_batch()
    sizes = (batch.layout.rows, batch.layout.content_rows, batch.layout.content_rows)
    torch.manual_seed(0)
    drawn = [torch.randn(len(batch.sample_id_B), 2, n, 64, dtype=torch.float64) for n in sizes]
    errors: dict[str, list[float]] = {}
    for precision in _BOUNDS:
        inputs = [x.to(getattr(torch, precision)) for x in drawn]
        exact = _attended("dense", "cpu", [x.double() for x in inputs])
        for name in BACKENDS:
            found = _attended(name, device, inputs)
            errors[f"{name} {precision}"] = [
                float((ours - theirs).norm() / theirs.norm())
                for ours, theirs in zip(found, exact, strict=True)
            ]
    right = all(max(found) < _BOUNDS[name.split()[1]] for name, found in errors.items())
    rows = [["back end", "values", "of queries", "of keys", "of values"]]
    rows += [[name, *(f"{error:.1e}" for error in found)] for name, found in errors.items()]
    return right, {"relative_errors": errors}, table(rows)


def _attended(name: str, device: str, given: Sequence[Tensor]) -> list[Tensor]:
    """Attended rows that are no padding, and the gradients of the inputs."""
    batch, valid = long_batch().to(device), valid_rows(long_batch()).to(device)
    inputs = [x.to(device).requires_grad_() for x in given]
    out = attention_of(name, batch, inputs, 0.0)()[valid]
    found = [out, *torch.autograd.grad(out.pow(2).sum(), inputs)]
    return [x.detach().double().cpu() for x in found]


def check_tokens(device: str) -> Outcome:
    """The packaged model in each mode, fp32, in a batch."""
    rows, differ, right = [["mode", "same", "other tokens, as likely"]], {}, True
    for name, way in _WAYS.items():
        exact, found = (
            Generator.from_checkpoint("demo", device=place, inference=InferenceOptions(dtype), **way)
            for place, dtype in (("cpu", "float64"), (device, "fp32"))
        )
        pairs = list(zip(exact.generate(_TEXTS), found.generate(_TEXTS), strict=True))
        other = [(a, b) for a, b in pairs if a.tokens != b.tokens]
        wrong = [(a.text, b.text) for a, b in other if abs(a.score - b.score) > _TIE]
        rows.append([name, f"{len(pairs) - len(other)} of {len(pairs)}", str(len(other) - len(wrong))])
        differ[name], right = wrong, right and not wrong
    return right, {"wrong": differ}, table(rows)


def check_resume(device: str) -> Outcome:
    """50 steps in one go, and the same with a stop on request in between; in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": device}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {**meeting, "JANUS_CHECK_FOLDER": folder}
        code = "from benchmarks.gpu import train_and_resume; train_and_resume()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            return False, {"error": done.stderr[-4000:]}, done.stderr[-4000:]
        figures = json.loads((Path(folder) / "figures.json").read_text())
    right = figures["same_weights"] and figures["same_losses"] and figures["last"] < figures["first"]
    return right, figures, "\n".join(f"{name}: {value}" for name, value in figures.items())


def train_and_resume() -> None:
    """The process that :func:`check_resume` starts: the only one that needs DeepSpeed."""
    from janus_ds.parallel.topology import init_topology
    from tests.support.bad_steps import bad_passes
    from tests.support.tiny_training import Run, make_inputs, train

    folder = make_inputs(Path(os.environ["JANUS_CHECK_FOLDER"]))
    topology = init_topology(1, process_group=True)
    steps = (f"train.max_steps={_STEPS}", "train.valid_every=0", f"train.save_every={_STEPS}")
    whole = train(folder, topology, Run("whole", 2, overrides=steps, engine=_BF16))
    parted = Run("parted", 2, overrides=steps, engine=_BF16)
    with bad_passes({_STOP: "stop"}, topology, 0):
        stopped = train(folder, topology, parted)
    resumed = train(folder, topology, parted)
    losses = whole.series("loss")
    figures = {
        "steps_before_the_stop": len(stopped.series("loss")),
        "steps": len(losses),
        "same_losses": losses == resumed.series("loss"),
        "same_weights": all(torch.equal(x, resumed.weights[name]) for name, x in whole.weights.items()),
        "first": losses[0],
        "last": losses[-1],
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def check_tests() -> Outcome:
    """The head in 16 bits, and compiled steps."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return None, {}, f"{', '.join(missing)} not installed"
    files = [f"tests/{name}.py" for name in _GPU_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu or cuda", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode == 0, {"exit_code": done.returncode}, (done.stdout + done.stderr)[-4000:]


def _table(kind: str, *arguments: str) -> Outcome:
    from benchmarks.__main__ import main

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as shown:
        file = Path(folder) / "result.json"
        main([kind, *arguments, "--json", str(file)])
        return True, json.loads(file.read_text()), shown.getvalue().strip()
