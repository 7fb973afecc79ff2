"""The page of the question-generation experiment: Markdown of its JSON (`results.collect`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from results import circumstances, significance_table, table

_STARTS = {
    "pre-ar": "BART going on (`ar`)",
    "pre-cmlm": "CMLM (`cmlm`)",
    "pre-janus": "JANUS (`paper`)",
    None: "none (random weights)",
}


def render_page(content: dict[str, Any]) -> Iterator[str]:
    """The lines of the page, of what stands in the JSON."""
    yield "# SQuAD question generation from a small model pretrained here"
    yield ""
    yield (
        "Made by `make results-glge` (launch/experiments/glge_squadqg.py) of the runs that are finished. A "
        "small BART-like model is pretrained on Wikipedia text (`base`), goes on with equal updates as BART, "
        "CMLM and JANUS, and is fine-tuned for AR and for NAR: the paper's Tables 7 and 8 in small. The JSON "
        "beside this file has all figures, commands and versions."
    )
    runs = {name: content["runs"][name] for name in content["order"] if content["runs"][name]["finished"]}
    tuned = {name: run for name, run in runs.items() if run["systems"]}
    missing = [*content["not_begun"], *content["not_finished"]]
    yield ""
    if missing:
        yield f"**Only a part is finished.** Not finished: {', '.join(missing)}."
    else:
        yield "All runs are finished."
    if tuned:
        yield from _scores_table(tuned, content["data"])
        yield from _starts_table(tuned)
        yield from significance_table(content["significance"])
    yield from _pretraining_table({name: run for name, run in runs.items() if not run["systems"]})
    yield from _text_facts(content["data"])
    yield from _samples_table(content["samples"])
    yield from ("", "One seed, one run each: differences of a few tenths say nothing. Minutes are not cost:")
    yield "they are wall time beside other work, but where CPU time was logged."
    yield from circumstances(runs)


def _scores_table(runs: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    systems = [scores for run in runs.values() for scores in run["systems"].values()]
    titles = {"rougeL": "ROUGE-L", "bleu4": "BLEU-4", "meteor": "METEOR", "overall": "OVERALL"}
    if not any("meteor" in scores["metrics"] for scores in systems):
        del titles["meteor"]
    rows = [
        [
            *(name, _STARTS.get(run["start"], str(run["start"])), system),
            *(_number(scores, metric) for metric in titles),
            f"{run['seconds'] / 60:.0f}",
        ]
        for name, run in runs.items()
        for system, scores in run["systems"].items()
    ]
    yield from ("", "## Scores on the official test set", "")
    yield from table(["run", "pretrained as", "decoding", *titles.values(), "training min"], rows)
    lines = ", ".join(sorted({f"{scores['n']:,}" for scores in systems}))
    warnings = dict.fromkeys(text for scores in systems for text in scores.get("warnings", ()))
    yield ""
    whole = data.get("text", {}).get("test")
    first = f", the first of {whole:,}" if whole and any(scores["n"] < whole for scores in systems) else ""
    yield f"Test lines: {lines}{first}. AR with beam 5; NAR-N with N refinements and the likeliest 5 lengths."
    yield from (f"Warning: {text}" for text in warnings)


def _starts_table(runs: dict[str, Any]) -> Iterator[str]:
    """Tables 7 and 8: NAR without refinement from different starts, and AR beside it."""
    yield from ("", "## From which weights", "")
    yield "OVERALL; in brackets the mean of ROUGE-L and BLEU-4, where METEOR could not be run:"
    columns, rows = ("ar", "nar-0", "nar-1", "nar-4", "nar-10"), []
    starts = [(title, start, False) for start, title in _STARTS.items()]
    starts.append((f"{_STARTS['pre-janus']}, fine-tuned as released", "pre-janus", True))
    for title, start, as_released in starts:
        found = [
            run["systems"]
            for run in runs.values()
            if run["start"] == start
            and (run["recipe"]["objective"]["preset"] == "released_finetune") == as_released
        ]
        merged = {system: scores for systems in found for system, scores in systems.items()}
        if merged:
            rows.append(
                [title, *(_overall(merged[column]) if column in merged else "" for column in columns)]
            )
    yield ""
    yield from table(["pretrained as", *(column.upper() for column in columns)], rows)


def _pretraining_table(runs: dict[str, Any]) -> Iterator[str]:
    if not runs:
        return
    yield from ("", "## Pretraining", "")
    rows = []
    for name, run in runs.items():
        losses = [_loss(run["held_out"][-1] if run["held_out"] else {}, key) for key in ("ar_nll", "nar_nll")]
        preset = run["recipe"]["objective"]["preset"]
        cells = [name, run["start"] or "random weights", preset, str(run["updates"])]
        rows.append([*cells, f"{run['tokens'] / 1e6:.1f}", *losses, f"{run['seconds'] / 60:.0f}"])
    head = ["run", "starts from", "objective", "updates", "million tokens"]
    yield from table([*head, "held out: AR nll", "NAR nll", "min"], rows)


def _text_facts(data: dict[str, Any]) -> Iterator[str]:
    text, squad = data.get("text"), data.get("squadqg", {})
    if text is None:
        return
    yield from ("", "## Text", "")
    yield (
        f"Wikipedia: the first {text['articles']:,} articles ({text['megabytes']} MB), lower-cased, with "
        "Penn Treebank tokens as SQuAD's question files have them. Questions: the input is the sentence that "
        "holds the answer, without the answer and the passage around it, which the test files of Du et al. "
        "(2017), GLGE's test set, do not have; so figures are not those of GLGE's `answer [SEP] passage`. "
        f"{text['train']:,} training pairs (part of SQuAD's dev set, and pairs of its training set whose "
        f"questions are not in the test set), {text['dev']:,} for validation, {text['test']:,} for the test."
    )
    cut = (squad.get("counts") or {}).get("test", {})
    if cut:
        share = 100 * cut["source_cut"] / cut["lines"]
        yield f"The end of {share:.0f} % of the test sentences was cut to fit the position table."


def _samples_table(samples: list[dict[str, Any]]) -> Iterator[str]:
    if not samples:
        return
    yield from ("", "## Samples", "")
    for sample in samples:
        yield f"Line {sample['line']:,}:"
        yield ""
        yield from (f"- {what}: {_quoted(text)}" for what, text in sample.items() if what != "line")
        yield ""


def _number(scores: dict[str, Any], metric: str) -> str:
    value = scores["metrics"].get(metric)
    return "" if value is None else f"{value:.2f}"


def _overall(scores: dict[str, Any]) -> str:
    metrics = scores["metrics"]
    if "meteor" in metrics and "overall" in metrics:
        return f"{metrics['overall']:.2f}"
    return f"({(metrics['rougeL'] + metrics['bleu4']) / 2:.2f})"


def _loss(losses: Mapping[str, float], key: str) -> str:
    return f"{losses[key]:.3f}" if key in losses else ""


def _quoted(text: str) -> str:
    return f"`{text}`" if "`" not in text else f"`` {text} ``" if "``" not in text else f"<q>{text}</q>"
