"""The page of the question-generation experiment: Markdown of what `glge_results` collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["HELD_OUT", "render_page"]

HELD_OUT = ("valid/ar_nll", "valid/nar_nll", "valid/aux_nll", "valid/length")
"""Losses of pretraining that are kept; the page shows the first two."""

_STARTS = {
    "pre-ar": "BART going on (`ar`)",
    "pre-cmlm": "CMLM (`cmlm`)",
    "pre-janus": "JANUS (`paper`)",
    None: "none (random weights)",
}
_METEORS = {"meteor": "METEOR", "meteor_exact_stem": "meteor_exact_stem (not METEOR)"}


def render_page(content: dict[str, Any]) -> Iterator[str]:
    """The lines of the page.

    Args:
        content: what `glge_results` collected, as it stands in the JSON.
    """
    yield "# SQuAD question generation from a small model pretrained here"
    yield ""
    yield (
        "Made by `make results-glge` (launch/experiments/glge_squadqg.py) of the runs that are finished. A "
        "small BART-like model is pretrained on Wikipedia text (`base`), goes on with equal updates as BART, "
        "CMLM and JANUS, and is fine-tuned for AR and for NAR: the paper's Tables 7 and 8 in small. The JSON "
        "beside this file has all figures, commands and versions."
    )
    runs = {name: content["runs"][name] for name in content["order"]}
    tuned = {name: run for name, run in runs.items() if run["fine_tuned"]}
    yield ""
    if content["not_finished"]:
        yield f"**Only a part is finished.** Not finished: {', '.join(content['not_finished'])}."
    else:
        yield "All runs are finished."
    if tuned:
        yield from _scores_table(tuned, content["data"])
        yield from _starts_table(tuned)
    yield from _pretraining_table({name: run for name, run in runs.items() if not run["fine_tuned"]})
    yield from _text_facts(content["data"])
    yield from _samples_table(content["samples"])
    if runs:
        yield from _circumstances(runs)


def _scores_table(runs: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    systems = [scores for run in runs.values() for scores in run["systems"].values()]
    meteors = [name for name in _METEORS if any(name in scores["metrics"] for scores in systems)]
    titles = ["ROUGE-L", "BLEU-4", *(_METEORS[name] for name in meteors), "OVERALL"]
    yield from ("", "## Scores on the official test set", "")
    yield f"| run | pretrained as | decoding | {' | '.join(titles)} | training min |"
    yield f"| --- | --- | --- |{' --- |' * (len(titles) + 1)}"
    for name, run in runs.items():
        for system, scores in run["systems"].items():
            cells = [_number(scores, metric) for metric in ("rougeL", "bleu4", *meteors, "overall")]
            minutes = f"{run['training_seconds'] / 60:.0f}"
            yield f"| {' | '.join([name, _start(run), system, *cells, minutes])} |"
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
    yield from ("", "| pretrained as | AR | NAR-0 | NAR-1 | NAR-4 | NAR-10 |")
    yield "| --- | --- | --- | --- | --- | --- |"
    columns = ("ar", "nar-0", "nar-1", "nar-4", "nar-10")
    for start, title in _STARTS.items():
        found = [run["systems"] for run in runs.values() if run["start"] == start]
        merged = {system: scores for systems in found for system, scores in systems.items()}
        if merged:
            cells = [_overall(merged[column]) if column in merged else "" for column in columns]
            yield f"| {title} | {' | '.join(cells)} |"


def _pretraining_table(runs: dict[str, Any]) -> Iterator[str]:
    if not runs:
        return
    yield from ("", "## Pretraining", "")
    yield "| run | starts from | objective | updates | million tokens | held out: AR nll | NAR nll | min |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, run in runs.items():
        losses = [_loss(run["held_out"], key) for key in HELD_OUT[:2]]
        cells = [name, run["start"] or "random weights", run["objective"]["preset"], str(run["updates"])]
        tokens, minutes = f"{run['tokens'] / 1e6:.1f}", f"{run['training_seconds'] / 60:.0f}"
        yield f"| {' | '.join([*cells, tokens, *losses, minutes])} |"


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


def _circumstances(runs: dict[str, Any]) -> Iterator[str]:
    last = list(runs.values())[-1]
    hardware, versions, model = last["hardware"], last["versions"], last["model"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    minutes = sum(run["wall_seconds"] for run in runs.values()) / 60
    seeds = ", ".join(sorted({str(run["seed"]) for run in runs.values()}))
    yield from ("", "## Circumstances", "")
    yield (
        f"{model['encoder_layers']}+{model['decoder_layers']} layers, d {model['d_model']}, one CPU thread a "
        f"run; seed {seeds}, one run each, so differences of a few tenths say nothing. "
        f"Hardware: {hardware['machine']}, {hardware['cpus']} CPUs, {gpus}, shared with other work: minutes "
        f"are wall time, not cost. All together {minutes:.0f} min. torch {versions['torch']}, deepspeed "
        f"{versions['deepspeed']}, commit {last['git_commit']}."
    )
    yield from ("", "Commands:", "", "```")
    yield from (" ".join(run["command"]) for run in runs.values())
    yield "```"


def _start(run: dict[str, Any]) -> str:
    return _STARTS.get(run["start"], str(run["start"]))


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
