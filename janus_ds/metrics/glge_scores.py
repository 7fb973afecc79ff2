"""Scores of GLGE's questions, responses and answers.

Questions get BLEU-1 to -4 and ROUGE-L as coco-caption computes them for the QG scripts: lines with the same
source are one item, whose references are collected and whose last hypothesis counts. All lower-casing,
stripping and splitting is that of Python 2 byte strings: ASCII only. METEOR 1.5 is the Java program that
the scripts call: nothing else gives its numbers, since its alignment uses WordNet synonyms and a paraphrase
table that come with it. `pip install --no-deps pycocoevalcap` brings both; Java must be there.

Responses (PersonaChat) get BLEU-1, BLEU-2 and Distinct as GLGE's script (PLATO's) computes them: the mean of
nltk's sentence BLEU with "method7" smoothing over the lines. nltk changed that smoothing in 3.5 and in 3.6;
the published numbers fit 3.5 only, which is followed here. Smoothing lifts every order, so a perfect line
scores more than 100. Answers (CoQA) get the F1 of words that the CoQA and SQuAD scripts compute.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import string
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Literal

import numpy as np

from janus_ds.errors import MissingDependencyError
from janus_ds.metrics.glge_text import LOWER_BRACKETS, ascii_lower, ascii_strip, rejoin
from janus_ds.metrics.rouge import lcs_positions

Order = Literal[1, 2]
Weights = tuple[float, float, float, float]

_ORDERS = 4
_TINY = 1e-15
_SMALL = 1e-9
_BETA = 1.2
_SPACES = re.compile("[ \t\n\r\x0b\x0c]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_K = 5
_WEIGHTS: dict[int, Weights] = {1: (1.0, 0.0, 0.0, 0.0), 2: (0.5, 0.5, 0.0, 0.0)}


@dataclass
class QuestionItem:
    """One thing to ask about: the hypothesis of its last line and the references of all its lines."""

    hypothesis: str = ""
    references: list[str] = field(default_factory=list)


def squad_items(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None
) -> list[QuestionItem]:
    """Items of SQuAD question generation: hypotheses rejoined and lower-cased, the rest lower-cased. Without
    sources every line is an item."""

    def plain(text: str) -> str:
        return ascii_lower(ascii_strip(text))

    def mend(text: str) -> str:
        return ascii_lower(rejoin(ascii_strip(text), LOWER_BRACKETS))

    keys = None if sources is None else [plain(source) for source in sources]
    return group([mend(text) for text in hypotheses], [plain(text) for text in references], keys)


def msqg_items(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None
) -> list[QuestionItem]:
    """Items of MSQG, whose script changes nothing in the lines."""
    return group(hypotheses, references, sources)


def group(
    hypotheses: Sequence[str], references: Sequence[str], keys: Sequence[str] | None
) -> list[QuestionItem]:
    """One item for each distinct key, in order of appearance; without keys one for each line."""
    items: dict[str | int, QuestionItem] = {}
    own_keys: Sequence[str | int] = range(len(references)) if keys is None else keys
    for key, hypothesis, reference in zip(own_keys, hypotheses, references, strict=True):
        item = items.setdefault(key, QuestionItem())
        item.hypothesis = hypothesis
        item.references.append(reference)
    return list(items.values())


def coco_bleu(items: Sequence[QuestionItem]) -> tuple[float, float, float, float]:
    """Corpus BLEU-1 to BLEU-4, 0 to 1: counts clipped by the best reference, closest reference length,
    no smoothing but for two tiny constants that keep zeros from dividing."""
    correct, guessed = np.zeros(_ORDERS), np.zeros(_ORDERS)
    length = wanted = 0
    for item in items:
        words = _split(item.hypothesis)
        references = [_split(reference) for reference in item.references]
        length += len(words)
        wanted += min((abs(len(r) - len(words)), len(r)) for r in references)[1]
        for order in range(1, _ORDERS + 1):
            guessed[order - 1] += max(0, len(words) - order + 1)
            correct[order - 1] += _clipped_hits(words, references, order)
    precisions = (correct + _TINY) / (guessed + _SMALL)
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores = brevity * np.cumprod(precisions) ** (1 / np.arange(1, _ORDERS + 1))
    one, two, three, four = scores.tolist()
    return one, two, three, four


def _split(text: str) -> list[str]:
    return [word for word in _SPACES.split(text) if word]


def _clipped_hits(words: list[str], references: list[list[str]], order: int) -> int:
    best: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        best |= _ngrams(reference, order)
    return (_ngrams(words, order) & best).total()


def coco_rouge_l(items: Sequence[QuestionItem]) -> float:
    """Mean ROUGE-L over items, 0 to 1: F with beta 1.2 of the best precision and the best recall, which
    may come from two references. Words are split at single spaces, so two spaces make an empty word."""
    return float(np.mean([_rouge_l(item) for item in items])) if items else 0.0


def _rouge_l(item: QuestionItem) -> float:
    words = item.hypothesis.split(" ")
    references = [reference.split(" ") for reference in item.references]
    common = [len(lcs_positions(words, reference)) for reference in references]
    precision = max(common) / len(words)
    recall = max(hits / len(reference) for hits, reference in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def mean_sentence_bleu(hypotheses: Sequence[str], references: Sequence[str], order: Order) -> float:
    """Mean over the lines of sentence BLEU-1 or BLEU-2, times 100.

    Args:
        hypotheses: tokens between single spaces, case kept.
    """
    scores = [
        _sentence_bleu(_tokens(hypothesis), _tokens(reference), _WEIGHTS[order])
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return 100 * math.fsum(scores) / len(scores) if scores else 0.0


def distinct(hypotheses: Sequence[str], order: int) -> float:
    """Distinct-n over all lines, times 100: different n-grams in percent of all n-grams. An empty line
    counts as one empty token."""
    counts: Counter[tuple[str, ...]] = Counter()
    for hypothesis in hypotheses:
        counts.update(_ngrams(_tokens(hypothesis), order))
    return 100 * (len(counts) + 1e-12) / (counts.total() + 1e-5)


def _tokens(line: str) -> list[str]:
    return line.strip().split(" ")


def _ngrams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _sentence_bleu(hypothesis: list[str], reference: list[str], weights: Weights) -> float:
    counted = [_hits_and_total(hypothesis, reference, order) for order in range(1, _ORDERS + 2)]
    if counted[0][0] == 0:
        return 0.0
    try:
        precisions = _smooth_neighbours(_smooth_zeros(counted, len(hypothesis)))
        logs = [weight * math.log(p) for weight, p in zip(weights, precisions, strict=True)]
    except (ZeroDivisionError, ValueError):
        # The script counts a line as 0 when nltk fails, as it does for one token: 5 / ln(1).
        return 0.0
    length, wanted = len(hypothesis), len(reference)
    brevity = 1.0 if length > wanted else math.exp(1 - wanted / length)
    return brevity * math.exp(math.fsum(logs))


def _hits_and_total(hypothesis: list[str], reference: list[str], order: int) -> tuple[int, int]:
    grams = _ngrams(hypothesis, order)
    hits = grams & _ngrams(reference, order)
    return hits.total(), max(1, grams.total())


def _smooth_zeros(counted: list[tuple[int, int]], length: int) -> list[float]:
    """nltk's method4 on the first four orders; the fifth stays as counted."""
    return [
        (hits if hits or order == _ORDERS else order + _K / math.log(length)) / total
        for order, (hits, total) in enumerate(counted)
    ]


def _smooth_neighbours(precisions: list[float]) -> list[float]:
    """nltk's method5: each order is the mean of itself, the smoothed one below and the raw one above."""
    below = precisions[0] + 1
    smoothed = []
    for here, above in pairwise(precisions):
        below = (below + here + above) / 3
        smoothed.append(below)
    return smoothed


def mean_answer_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 in percent.

    Args:
        references: for each question the accepted answers; the best of them counts.
    """
    scores = [
        max(answer_f1(answer, reference) for reference in accepted)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores) if scores else 0.0


def answer_f1(answer: str, reference: str) -> float:
    """F1 of the words of two texts, 0 to 1; lower-cased, without punctuation, a, an and the. If one of
    them has no words, 1 when the other has none either."""
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


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
