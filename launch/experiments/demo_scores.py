"""Scores of the demonstration model: the held-out Tatoeba test, Multi30k, and IWSLT14 as fairseq scores it.

The first two go through `eval/nmt.py --checkpoint`. IWSLT14's official test is lower-cased and tokenised; the
model reads plain text: sources lose their tokens' spaces, lines too long for the model are cut and their
translations joined, outputs are separated into Moses tokens and lower-cased, and `eval/nmt.py` compares
them with the official references.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from driver import prepare_pairs_command, product, run_logged, shared_file, shared_text
from results import render

from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import MissingDependencyError
from janus_ds.io import write_atomic
from janus_ds.metrics.scores import read_lines

SYSTEMS = {"ar": ("--mode", "ar")} | {
    f"nar-{n}": ("--mode", "nar", "--iterations", str(n)) for n in (0, 1, 4, 10)
}
_LONGEST = 92
_KEPT = ("sacrebleu", "tokenized_bleu", "chrf", "repetition", "length_ratio")


def score_all(asset: Path, root: Path, limit: int) -> None:
    """Score the shipped model on `limit` sentences of each test (0: all) and write `scores.json` beside it;
    text and outputs go below `root`."""
    folder = root / "scores"
    folder.mkdir(exist_ok=True)
    multi30k = shared_text("multi30k", "Multi30k", "test_2016_flickr.de and .en")
    official = shared_text("iwslt14_de-en", "IWSLT14's test", "tok.test.de and tok.test.en")
    moses = _moses()
    sets = {
        "tatoeba": [root / "text" / f"test.{language}" for language in ("de", "en")],
        "multi30k_test_2016_flickr": [
            shared_file(multi30k, f"test_2016_flickr.{language}") for language in ("de", "en")
        ],
    }
    found: dict[str, Any] = {}
    for name, files in sets.items():
        data, output = folder / f"{name}-data", folder / name
        given = ("--tokenizer", asset / "tokenizer", "--test", *files)
        run_logged(folder, f"prepare-{name}", prepare_pairs_command(("de", "en"), data, *given))
        options = ("--data", data, "--output", output, "--limit", limit)
        run_logged(folder, f"score-{name}", product("eval/nmt.py", "--checkpoint", asset, *options))
        found[name] = _compact(json.loads((output / "scores.json").read_text(encoding="utf-8"))["systems"])
    systems = _score_iwslt(asset, folder / "iwslt14_test", official, moses, limit)
    found["iwslt14_test"] = _compact(systems, leave_out=("sacrebleu", "chrf"))
    write_atomic(asset / "scores.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def _compact(systems: dict[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    kept = [name for name in _KEPT if name not in leave_out]
    first = next(iter(systems.values()))
    return {
        "n": first["n"],
        "systems": {
            system: {name: round(scores["metrics"][name], 2) for name in kept}
            for system, scores in systems.items()
        },
        "signatures": {name: first["signatures"][name] for name in kept},
    }


def _moses() -> Any:
    """The package that separates text into Moses tokens and joins them.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import sacremoses
    except ImportError:
        what, fix = "the scores of IWSLT14 need sacremoses, which is not installed", "make install-dev"
        raise MissingDependencyError(what, "--ship", fix) from None
    return sacremoses


def _score_iwslt(asset: Path, folder: Path, official: Path, sacremoses: Any, limit: int) -> dict[str, Any]:
    """What `eval/nmt.py` says of each system on IWSLT14's test."""
    folder.mkdir(exist_ok=True)
    source, reference = (read_lines(official / f"tok.test.{side}").lines for side in ("de", "en"))
    count = limit or len(source)
    tokenizer, moses, plain = (
        load_tokenizer(asset / "tokenizer"),
        sacremoses.MosesTokenizer("en"),
        sacremoses.MosesDetokenizer("de"),
    )

    def fits(text: str) -> bool:
        return len(tokenizer.encode(plain.detokenize(text.split()))) <= _LONGEST

    pieces = [cut(line, fits) for line in source[:count]]
    _write(folder / "pieces.de", [plain.detokenize(piece.split()) for line in pieces for piece in line])
    _write(folder / "reference.en", reference[:count])
    found = {}
    for name, mode in SYSTEMS.items():
        raw, output, scores = (folder / f"{name}.{end}" for end in ("pieces.en", "en", "json"))
        # As the other tests are scored; by itself it decodes in bf16 on some machines.
        files = ("--input", folder / "pieces.de", "--output", raw, "--dtype", "fp32")
        run_logged(folder, "decode", product("eval/decode.py", "--checkpoint", asset, *mode, *files))
        translated = iter(read_lines(raw).lines)
        joined = [" ".join(next(translated) for _ in line) for line in pieces]
        _write(output, [moses.tokenize(line, return_str=True).lower() for line in joined])
        compared = ("--predictions", output, "--references", folder / "reference.en", "--output", scores)
        run_logged(folder, "score", product("eval/nmt.py", *compared))
        found[name] = json.loads(scores.read_text(encoding="utf-8"))
    return found


def cut(line: str, fits: Callable[[str], bool]) -> list[str]:
    """Parts of a tokenised line that fit, cut in halves at the punctuation nearest to the middle."""
    words = line.split()
    if len(words) < 2 or fits(line):
        return [line]
    ends = [i + 1 for i, word in enumerate(words[:-1]) if word in {".", ",", ";", ":", "!", "?", "-"}]
    middle = len(words) / 2
    at = min(ends or [len(words) // 2], key=lambda end: abs(end - middle))
    return [part for half in (words[:at], words[at:]) for part in cut(" ".join(half), fits)]


TITLES = {
    "tatoeba": "Tatoeba, held out (sacreBLEU 13a)",
    "multi30k_test_2016_flickr": "Multi30k test_2016_flickr, true-cased (sacreBLEU 13a)",
    "iwslt14_test": "IWSLT14 test, official tokens (tokenised BLEU as fairseq's)",
}


def page(asset: Path) -> str:
    """The results page, made of what lies in the asset."""
    scores = json.loads((asset / "scores.json").read_text(encoding="utf-8"))
    training = json.loads((asset / "run.json").read_text(encoding="utf-8"))["training"]
    return render("demo_de_en", {"training": training, "scores": scores}, titles=TITLES, systems=SYSTEMS)


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
