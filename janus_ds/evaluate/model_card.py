"""The README.md of an exported model: what it is, how to decode with it, what it scored, its licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from janus_ds.decode.load import LoadedRun

_AR = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER"{trust})
inputs = tokenizer(["Some text."], return_tensors="pt", padding=True)
rows = model.generate(**inputs)                              # token by token, beam search
"""
_NAR = 'rows = model.generate(**inputs, mode="nar", iterations=4)    # all at once, refined four times\n'
_AUX = 'rows = model.generate(**inputs, mode="aux")                  # NAR drafts, AUX judges\n'
_END = "print(tokenizer.batch_decode(rows, skip_special_tokens=True))\n"


def model_card(run: LoadedRun, modes: Sequence[str], own_code: bool, licence: str | None) -> str:
    """The card, with a header as the hub reads it.

    Args:
        run: what is exported; scores are those of its folder (`scores.json`, `eval/*/scores.json`).
        modes: that the exported folder decodes in.
        own_code: the folder brings its modelling code along.
        licence: of the weights, as the hub names it; None: not said.
    """
    trust = ", trust_remote_code=True" if own_code else ""
    code = _AR.format(trust=trust) + _NAR * ("nar" in modes) + _AUX * ("aux" in modes) + _END
    header = ["library_name: transformers", "tags: [janus]", *([f"license: {licence}"] if licence else [])]
    said = f"`{licence}`." if licence else "Not named when the model was exported (`convert --license NAME`)."
    parameters = sum(weight.numel() for weight in run.model.parameters())
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {run.config.name}",
        f"Encoder-decoder, {parameters:,} parameters, written by janus_ds; decodes {', '.join(modes)}.\n"
        'The method: "JANUS: Joint Autoregressive and Non-autoregressive Training with Auxiliary Loss\n'
        'for Sequence Generation" (EMNLP 2022).',
        f"## Use\n\n```python\n{code}```",
        "## Scores\n\n" + ("\n\n".join(_tables(run.folder)) or "None were found in the folder of the run."),
        f"## Licence\n\n{said}",
    ]
    return "\n\n".join(parts) + "\n"


def _tables(folder: Path) -> Iterator[str]:
    """A table for each split that was scored: systems down, metrics across."""
    for path in [folder / "scores.json", *sorted(folder.glob("eval/*/scores.json"))]:
        if not path.is_file():
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        parts = {path.parent.name: values} if "systems" in values else values
        for split, part in parts.items():
            systems = {name: _numbers(scores) for name, scores in part.get("systems", {}).items()}
            metrics = sorted({name for scores in systems.values() for name in scores})
            if not metrics:
                continue
            rows = [["system", *metrics], ["---"] * (1 + len(metrics))]
            rows += [[name, *(_shown(scores.get(m)) for m in metrics)] for name, scores in systems.items()]
            lines = [f"| {' | '.join(row)} |" for row in rows]
            yield "\n".join([f"{split}:", "", *lines])


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    values = scores.get("metrics", scores)
    return {name: x for name, x in values.items() if isinstance(x, int | float)}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
