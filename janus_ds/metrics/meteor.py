"""METEOR 1.5 by its own Java program, the one that the question generation scripts call.

Nothing else gives its numbers: its alignment uses WordNet synonyms and a paraphrase table that come
with the program. `pip install --no-deps pycocoevalcap` brings both; Java must be there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from janus_ds.errors import MissingDependencyError
from janus_ds.metrics.glge_scores import QuestionItem

JAR_VARIABLE = "JANUS_METEOR_JAR"
"""Environment variable with the path of a meteor-1.5.jar, if it is not pycocoevalcap's."""

_INSTALL = "pip install --no-deps pycocoevalcap (104 MB), or set " + JAR_VARIABLE + " to meteor-1.5.jar"
_PARAPHRASES = Path("data") / "paraphrase-en.gz"


@dataclass(frozen=True)
class MeteorProgram:
    """A METEOR that can be run.

    Attributes:
        jar: meteor-1.5.jar, with data/paraphrase-en.gz beside it.
    """

    java: str
    jar: Path

    def score(self, items: Sequence[QuestionItem]) -> float:
        """Corpus METEOR, 0 to 1, from the added-up statistics of the items.

        Raises:
            MissingDependencyError: the program failed; carries its last words.
        """
        # C.UTF-8: Java decodes its input by the locale.
        environment = {**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        command = [self.java, "-jar", "-Xmx2G", str(self.jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=self.jar.parent,
                encoding="utf-8",
            ) as process,
        ):
            try:
                return _converse(process, items)
            except (BrokenPipeError, ValueError) as error:
                process.kill()
                process.wait()
                # What is still buffered for it cannot be written, and must not hide its last words.
                if process.stdin is not None:
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                raise _failed(self, errors) from error


def find_meteor() -> MeteorProgram:
    """Look for Java and the METEOR program.

    Raises:
        MissingDependencyError: one of Java, the program and its paraphrase table is not there.
    """
    java = shutil.which("java")
    if java is None:
        raise MissingDependencyError(
            "METEOR needs Java, and there is none", "PATH", "install a Java runtime (openjdk-17-jre-headless)"
        )
    jar = _find_jar()
    if not (jar.parent / _PARAPHRASES).is_file():
        # Without it the program waits for ever instead of failing.
        raise MissingDependencyError(
            "METEOR's paraphrase table is missing", str(jar.parent / _PARAPHRASES), _INSTALL
        )
    return MeteorProgram(java, jar)


def _find_jar() -> Path:
    given = os.environ.get(JAR_VARIABLE)
    if given is not None:
        if not Path(given).is_file():
            raise MissingDependencyError("METEOR's program is missing", f"{JAR_VARIABLE}={given}", _INSTALL)
        return Path(given).absolute()
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in (package.submodule_search_locations or []) if package else []:
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar.absolute()
    raise MissingDependencyError("METEOR's program is missing", "the package pycocoevalcap", _INSTALL)


def _converse(process: subprocess.Popen[str], items: Sequence[QuestionItem]) -> float:
    if process.stdin is None or process.stdout is None:
        raise ValueError("the program has no pipes")
    statistics = [_ask(process.stdin, process.stdout, _question(item)) for item in items]
    # The program answers with one score an item, then with the score of all.
    _ask(process.stdin, process.stdout, " ||| ".join(["EVAL", *statistics]))
    for _ in range(len(items) - 1):
        process.stdout.readline()
    return float(process.stdout.readline())


def _question(item: QuestionItem) -> str:
    hypothesis = item.hypothesis.replace("|||", "").replace("  ", " ")
    # A carriage return would be a question of its own, with an answer that nobody takes.
    return " ||| ".join(["SCORE", *item.references, hypothesis]).replace("\r", " ")


def _ask(to_program: IO[str], from_program: IO[str], line: str) -> str:
    to_program.write(line + "\n")
    to_program.flush()
    answer = from_program.readline()
    if not answer:
        raise ValueError("the program gave no answer")
    return answer.strip()


def _failed(program: MeteorProgram, errors: IO[str]) -> MissingDependencyError:
    errors.seek(0)
    said = errors.read().strip().splitlines()[-3:]
    return MissingDependencyError(
        "METEOR's program failed: " + (" | ".join(said) or "it said nothing"),
        f"{program.java} -jar {program.jar}",
        "check the Java runtime (`java -version`) and that 2 GB of memory are free",
    )
