"""The shape of the code: import directions, one door a dependency, sizes, no prints, no bare asserts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.programs import python

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "janus_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))

LOW = {"errors", "io", "batch", "progress", "stream_mask"}
MIDDLE = {"data", "model", "objective", "decode", "metrics", "observe", "parallel"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "io": {"errors"},
    "progress": set(),
    "stream_mask": set(),
    "batch": {"stream_mask"},
    "config": {"errors", "io"},
    **{name: LOW | {"config"} for name in MIDDLE},
    "checkpoint": LOW | {"config"} | MIDDLE,
    "train": LOW | {"config", "checkpoint"} | MIDDLE,
    "report": LOW | {"config"} | MIDDLE,
    "evaluate": LOW | {"config", "checkpoint"} | MIDDLE,
    "cli": LOW | {"config", "checkpoint", "train", "evaluate", "report"} | MIDDLE,
    "__main__": {"errors", "config", "cli"},
    "__init__": LOW | {"config", "checkpoint", "train"} | MIDDLE,
}
ALLOWED["model"] |= {"parallel"}
ALLOWED["objective"] |= {"parallel"}
ALLOWED["decode"] |= {"model", "parallel", "data.text.tokenizer"}
ALLOWED["decode"] |= {"checkpoint.manifest"}
ALLOWED["metrics"] |= {"data.text.byte_streams"}

# One door for each third-party package: where it may be imported at all.
DOORS = {
    "webdataset": {"data/stream/shards.py", "data/stream/pipeline.py", "data/stream/loader.py"},
    "wids": {"data/stream/shards.py"},
    "fsspec": {"data/stream/remote.py"},
    "pyarrow": {"data/text/documents.py"},
    "s3fs": set(),
    "gcsfs": set(),
    "megatron": {"parallel/tensor_parallel.py"},
    "tensorboard": {"observe.py"},
    "wandb": {"observe.py"},
    "torch.utils.tensorboard": {"observe.py"},
    "sentencepiece": {
        "data/text/tokenizer.py",
        "data/text/hf_tokenizer.py",
        "data/prepare/train_tokenizer.py",
    },
    "tokenizers": {"data/text/tokenizer.py", "data/text/hf_tokenizer.py"},
    "matplotlib": {"report/figures.py"},
}
# These take long to import and must not be paid by who does not use them.
LAZY = {"fsspec", "pyarrow", "megatron", "tensorboard", "wandb", "torch.utils.tensorboard", "matplotlib"}
# The code that goes along with an exported model must be one file.
LONG = {"model/formats/hf_modeling.py": 500}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module, `from a import b` as both a and a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} has a relative import"
            yield node.module or "", node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_go_one_way() -> None:
    wrong = []
    for path in MODULES:
        own = owner(path)
        for module, node in imports(path):
            if not module.startswith("janus_ds."):
                continue
            inner = module.removeprefix("janus_ds.")
            target = inner.split(".")[0]
            if target.startswith("__"):
                continue
            # `from janus_ds.data import tokenizer` is judged by its longer form.
            allowed = any(is_within(inner, a) or is_within(a, inner) for a in ALLOWED[own])
            if target != own and not allowed:
                wrong.append(f"{name_of(path)}:{node.lineno} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["launch", "eval"])
def test_programs_are_not_imported_by_the_package(folder: str) -> None:
    wrong = [name_of(p) for p in MODULES for module, _ in imports(p) if is_within(module, folder)]
    assert not wrong, wrong


@pytest.mark.parametrize("package", sorted(DOORS))
def test_third_party_packages_come_in_by_one_door(package: str) -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        for module, node in imports(path)
        if is_within(module, package) and name_of(path) not in DOORS[package]
    ]
    assert not wrong, f"{package} is imported outside {DOORS[package]}: {wrong}"


@pytest.mark.parametrize("package", sorted(LAZY))
def test_slow_packages_are_imported_inside_functions(package: str) -> None:
    for path in MODULES:
        at_top = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for module, node in imports(path):
            assert not (is_within(module, package) and node in at_top), f"{name_of(path)}:{node.lineno}"


def test_only_the_engine_initializes_deepspeed() -> None:
    for path in MODULES:
        calls = [ast.unparse(n.func) for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
        if "deepspeed.initialize" in calls:
            assert name_of(path) == "train/engine.py"


def test_files_and_functions_stay_short() -> None:
    wrong = []
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONG.get(name_of(path), 400):
            wrong.append(f"{name_of(path)}: {lines} lines")
        for function in functions(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > 60:
                wrong.append(f"{name_of(path)}:{function.lineno} {function.name}: {length} lines")
    assert not wrong, "\n".join(wrong)


def test_test_files_stay_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {path.relative_to(ROOT): lines for path, lines in lengths.items() if lines > 300}


def test_functions_have_few_parameters() -> None:
    wrong = []
    for path in MODULES:
        for function in functions(path):
            arguments = function.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if names[:1] == ["ctx"]:
                # An autograd.Function takes every tensor as a parameter of its own.
                continue
            if len([name for name in names if name not in ("self", "cls")]) > 6:
                wrong.append(f"{name_of(path)}:{function.lineno} {function.name}: {len(names)} parameters")
    assert not wrong, "\n".join(wrong)


def test_the_library_neither_prints_nor_asserts() -> None:
    wrong = []
    for path in MODULES:
        may_print = owner(path) in ("cli", "__main__", "errors")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{name_of(path)}:{node.lineno} asserts")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not may_print:
                wrong.append(f"{name_of(path)}:{node.lineno} prints")
    assert not wrong, "\n".join(wrong)


def test_every_public_thing_has_a_docstring_and_every_file_a_purpose() -> None:
    wrong = []
    for path in MODULES:
        if not ast.get_docstring(tree(path)):
            wrong.append(name_of(path))
        for node in tree(path).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):  # type: ignore[arg-type]
                wrong.append(f"{name_of(path)}:{node.lineno} {node.name}")  # type: ignore[union-attr]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_and_reading_recipes_stays_light() -> None:
    script = (
        "import sys, janus_ds.__main__, janus_ds.cli.settings, janus_ds.cli.train\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'numpy', 'transformers'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = python("-c", script)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_model_on_one_rank_needs_neither_megatron_nor_the_compiler() -> None:
    """Both take seconds to import."""
    script = (
        "import sys\n"
        "from janus_ds.parallel.tensor_parallel import make_layers\n"
        "from janus_ds.decode.generator import Generator\n"
        "make_layers(1)\n"
        "Generator.from_checkpoint('demo').generate(['Hallo.'])\n"
        "print({'megatron', 'torch._dynamo', 'webdataset'} & set(sys.modules))"
    )
    done = python("-c", script)
    assert done.stdout.strip() == "set()", done.stderr
