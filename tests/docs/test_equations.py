"""Files, functions, tests and pages that the documents name exist. A failure says which line to fix."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = "docs/equations.md"
DOCUMENTS = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
FOLDERS = ("benchmarks", "docs", "ds_configs", "eval", "janus_ds", "launch", "tests")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?:::?([\w.]+))?`")
SHORT = re.compile(r"`((?:\w+/)*\w+\.py)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


def lines(document: str) -> Iterator[tuple[str, str]]:
    """Place and text of each line of a document, without its blocks of commands and output."""
    shown = True
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            shown = not shown
        elif shown:
            yield f"{document}:{number}", line


@cache
def names_of(path: Path) -> frozenset[str]:
    """Functions, classes, methods (CLASS.METHOD) and assigned names at the top of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            )
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        found.update(target.id for target in targets if isinstance(target, ast.Name))
    return frozenset(found)


@cache
def python_files() -> tuple[str, ...]:
    """Of the folders of the project, relative to its root."""
    return tuple(p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def rows() -> list[tuple[str, list[str]]]:
    """Place and cells of each row of the tables of equations, without their heads."""
    found = []
    for place, line in lines(TABLE):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and cells[0] not in ("paper", "---"):
            found.append((place, cells))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_functions_and_links_exist(document: str) -> None:
    wrong = names_that_are_not_there(document)
    for place, line in lines(document):
        for link in LINK.findall(line):
            if not (ROOT / document).parent.joinpath(link).exists():
                wrong.append(f"{place}: the link {link} leads nowhere")
    assert not wrong, "fix these lines:\n" + "\n".join(wrong)


def test_files_that_the_package_names_exist() -> None:
    wrong = [
        text for file in python_files() if "janus_ds/" in file for text in names_that_are_not_there(file)
    ]
    assert not wrong, "fix these lines:\n" + "\n".join(wrong)


def names_that_are_not_there(document: str) -> list[str]:
    """Files and their members, in backticks, that the project does not have."""
    wrong = []
    for place, line in lines(document):
        for name, member in PATH.findall(line):
            path = ROOT / name
            if not path.exists():
                wrong.append(f"{place}: there is no {name}")
            elif member and member not in names_of(path):
                wrong.append(f"{place}: {name} has no {member}")
        for name in SHORT.findall(line):
            if not any(f"/{path}".endswith(f"/{name}") for path in python_files()):
                wrong.append(f"{place}: there is no {name}")
    return wrong


def test_each_row_names_code_a_test_and_its_results() -> None:
    wrong = []
    for place, cells in rows():
        if len(cells) != 4:
            wrong.append(f"{place}: {len(cells)} columns, not 4")
            continue
        _, code, tests, results = cells
        if not PATH.search(code):
            wrong.append(f"{place}: no code is named")
        if not all(member.startswith("test_") for _, member in PATH.findall(tests) or [("", "")]):
            wrong.append(f"{place}: no test is named, as `tests/FILE.py::test_NAME`")
        if not LINK.search(results) and "none yet" not in results:
            wrong.append(f"{place}: give a link to the results, or say none yet")
    assert not wrong, "fix these lines:\n" + "\n".join(wrong)


def test_every_equation_table_and_figure_is_there() -> None:
    text = " ".join(cells[0] for _, cells in rows() if len(cells) == 4)
    wanted = [
        "eq. 1-4",
        "eq. 5",
        *(f"Figure {n}" for n in range(2, 7)),
        *(f"Table {n}" for n in range(1, 7)),
        "7, 8",
    ]
    assert not [name for name in wanted if name not in text], f"add rows to {TABLE}"


def test_a_name_that_is_gone_is_noticed() -> None:
    assert "visible" in names_of(ROOT / "janus_ds/stream_mask.py")
    assert "seen_by_nobody" not in names_of(ROOT / "janus_ds/stream_mask.py")
