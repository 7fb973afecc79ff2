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

from driver import prepare_pairs_command, product, run_logged, shared_text
from results import table
from sacremoses import MosesDetokenizer, MosesTokenizer

from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.io import write_atomic
from janus_ds.metrics.scores import read_lines

SYSTEMS = {"ar": ("--mode", "ar")} | {
    f"nar-{n}": ("--mode", "nar", "--iterations", str(n)) for n in (0, 1, 4, 10)
}
_LONGEST = 92
_KEPT = ("sacrebleu", "tokenized_bleu", "chrf", "repetition", "length_ratio")


def score_all(asset: Path, root: Path, limit: int) -> int:
    """Score the shipped model on `limit` sentences of each test (0: all) and write `scores.json` beside it;
    text and outputs go below `root`. The exit code of what failed."""
    folder = root / "scores"
    folder.mkdir(exist_ok=True)
    multi30k = shared_text("multi30k", "Multi30k", "test_2016_flickr.de and .en")
    sets = {
        "tatoeba": [root / "text" / f"test.{language}" for language in ("de", "en")],
        "multi30k_test_2016_flickr": [
            sorted(multi30k.glob(f"test_2016_flickr.{language}*"))[0] for language in ("de", "en")
        ],
    }
    found: dict[str, Any] = {}
    for name, files in sets.items():
        data, output = folder / f"{name}-data", folder / name
        given = ("--tokenizer", str(asset / "tokenizer"), "--test", *map(str, files))
        code = run_logged(folder, f"prepare-{name}", prepare_pairs_command(("de", "en"), data, *given))
        options = ("--data", data, "--output", output, "--limit", limit)
        code = code or run_logged(
            folder, f"score-{name}", product("eval/nmt.py", "--checkpoint", asset, *options)
        )
        if code:
            return code
        found[name] = _compact(json.loads((output / "scores.json").read_text(encoding="utf-8"))["systems"])
    code = _score_iwslt(asset, folder / "iwslt14_test", limit)
    if code:
        return code
    systems = {
        name: json.loads((folder / "iwslt14_test" / f"{name}.json").read_text(encoding="utf-8"))
        for name in SYSTEMS
    }
    found["iwslt14_test"] = _compact(systems, leave_out=("sacrebleu", "chrf"))
    write_atomic(asset / "scores.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    return 0


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


def _score_iwslt(asset: Path, folder: Path, limit: int) -> int:
    folder.mkdir(exist_ok=True)
    official = shared_text("iwslt14_de-en", "IWSLT14's test", "tok.test.de and tok.test.en")
    source, reference = (read_lines(official / f"tok.test.{side}").lines for side in ("de", "en"))
    count = limit or len(source)
    tokenizer, moses = load_tokenizer(asset / "tokenizer"), MosesTokenizer("en")

    def plain(text: str) -> str:
        found: str = MosesDetokenizer("de").detokenize(text.split())
        return found

    def fits(text: str) -> bool:
        return len(tokenizer.encode(plain(text))) <= _LONGEST

    pieces = [cut(line, fits) for line in source[:count]]
    _write(folder / "pieces.de", [plain(piece) for line in pieces for piece in line])
    _write(folder / "reference.en", reference[:count])
    for name, mode in SYSTEMS.items():
        raw, output = folder / f"{name}.pieces.en", folder / f"{name}.en"
        files = ("--input", folder / "pieces.de", "--output", raw)
        decode = product("eval/decode.py", "--checkpoint", asset, *mode, *files)
        code = run_logged(folder, "decode-iwslt14", decode)
        if code:
            return code
        translated = iter(read_lines(raw).lines)
        joined = [" ".join(next(translated) for _ in line) for line in pieces]
        _write(output, [moses.tokenize(line, return_str=True).lower() for line in joined])
        compared = ("--predictions", output, "--references", folder / "reference.en")
        score = product("eval/nmt.py", *compared, "--output", folder / f"{name}.json")
        code = run_logged(folder, "score-iwslt14", score)
        if code:
            return code
    return 0


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


def _stages(training: dict[str, Any]) -> str:
    """All training that led to the model: AR and JANUS, and what went on from it with `--start`."""
    steps, minutes = training["averaged_steps"][-1], training["minutes"]
    if "started_from" not in training:
        return (
            f"{training['ar_steps']:,} updates AR ({minutes['ar']:.0f} min), then {steps:,} updates JANUS "
            f"({minutes['janus']:.0f} min of wall time)"
        )
    return (
        f"{_stages(training['started_from'])}; from the mean of its last checkpoints on (`--start`, `--set "
        f"{' '.join(training['overrides'])}`) {steps:,} updates JANUS ({minutes['janus']:.0f} min), with "
        f"{training['pairs']['short']:,} copies of pairs of up to three words"
    )


def write_page(asset: Path, page: Path) -> None:
    """The results page, made of what lies in the asset."""
    scores = json.loads((asset / "scores.json").read_text(encoding="utf-8"))
    training = json.loads((asset / "run.json").read_text(encoding="utf-8"))["training"]
    pairs, steps = training["pairs"], training["averaged_steps"]
    lines = [
        "# The demonstration model: German to English",
        "",
        "Made by `python launch/experiments/demo_de_en.py`, then `--ship`, with JANUS_SHARED_DATA set "
        "(launch/recipes/nmt_demo.yaml, seed 1, one CPU core that was shared with other work). "
        f"Trained on {pairs['train']:,} Tatoeba pairs and {pairs['joined']:,} joined of them; "
        f"{_stages(training)}; mean of checkpoints {', '.join(map(str, steps))}; bf16. No sentence of the "
        "test, on either side, was in training.",
        "",
    ]
    rows = []
    for name, title in TITLES.items():
        part = scores[name]
        metric = "sacrebleu" if "sacrebleu" in part["signatures"] else "tokenized_bleu"
        bleu = [f"{part['systems'][system][metric]:.2f}" for system in SYSTEMS]
        repeated = " / ".join(f"{part['systems'][s]['repetition']:.2f}" for s in ("nar-0", "nar-10"))
        rows.append([title, f"{part['n']:,}", *bleu, repeated])
    head = ["test", "sentences", "AR", "NAR 0", "1", "4", "10", "repeated %, NAR 0 / 10"]
    lines += [
        *table(head, rows),
        "",
        "Multi30k and IWSLT14 are far from the training text. IWSLT14's official test is lower-cased and "
        "separated into tokens, and the model was trained on true-cased plain text, so nouns reach it in a "
        "form that it never saw. Its sources lose the tokens' spaces, lines of more than 92 subwords are cut "
        "at punctuation and their translations joined; outputs are separated into Moses tokens, lower-cased, "
        "and compared with the official references by `eval/nmt.py --predictions ... --references ...`.",
        "",
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, "\n".join(lines).encode())


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
