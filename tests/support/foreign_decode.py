"""A program that decodes exported folders in a process where janus_ds cannot be imported.

    python -I tests/support/foreign_decode.py REQUEST.json ANSWER.json

The request holds, for each name, a folder, texts, and options of `generate` for each way of decoding; the
answer the ids and texts of each.
"""

import json
import sys
from pathlib import Path

sys.modules["janus_ds"] = None  # type: ignore[assignment]

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: E402

_BATCH = 20


def main(request: str, answer: str) -> None:
    found = {}
    for name, (folder, texts, ways) in json.loads(Path(request).read_text()).items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
        found[name] = {"class": type(model).__name__}
        for way, options in ways.items():
            rows = []
            for start in range(0, len(texts), _BATCH):
                inputs = tokenizer(texts[start : start + _BATCH], return_tensors="pt", padding=True)
                rows += model.generate(**inputs, **options).tolist()
            found[name][way] = [rows, tokenizer.batch_decode(rows, skip_special_tokens=True)]
    Path(answer).write_text(json.dumps(found))


main(*sys.argv[1:])
