"""Reports: what is read of run folders, tables, pictures, marked words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import Environment, PackageLoader

from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.data.stream.index import Manifest, SplitTotals
from janus_ds.report.figures import (
    draw_curve_pictures,
    draw_task_pictures,
    frontier,
    looks_of,
    thinned,
)
from janus_ds.report.page import (
    _circumstances,
    marked,
    mode_table,
    objective_text,
    rows_of,
    run_table,
    sample_cards,
)
from janus_ds.report.runs import RunFolder, primary_metric, read_runs, sorted_modes
from tests.support.report_runs import SOURCES, MadeUp, scores_of, write_lines

PNG = b"\x89PNG\r\n\x1a\n"
JANUS = {"ar": (30.0, 50.0, 40.0), "nar-0": (20.0, 300.0, 5.0), "nar-10": (28.0, 40.0, 44.0)}


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Two seeds of a kind with a mode of its own each, plain AR, a run that has only begun."""
    first = MadeUp(modes={**JANUS, "draft": (30.0, 90.0, 20.0)}).write(tmp_path / "janus-s1")
    second = MadeUp(modes={**JANUS, "ar": (32.0, 50.0, 40.0)}, seed=2).write(tmp_path / "janus-s2")
    plain = MadeUp("ar", modes={"ar": (31.0, 60.0, 38.0)}, curves=["ar"]).write(tmp_path / "ar-s1")
    begun = MadeUp("cmlm", steps=40, curves=["nar"]).write(tmp_path / "cmlm-s1")
    return read_runs([first, second, plain, begun], "test")


def test_runs_are_read_and_their_gaps_are_noted(runs, tmp_path):
    janus, _, plain, begun = runs
    assert (janus.objective, janus.updates, list(janus.tasks["nmt"])) == ("paper", 1000, [*JANUS, "draft"])
    assert (janus.notes, plain.notes) == ([], [])
    assert begun.notes[0] == "not finished, or stopped early: 40 of 1,000 updates"
    assert begun.notes[1].startswith("no scores of split test: run `janus-ds eval nmt --checkpoint ")
    # A run named twice is one; runs of one name are told apart by their folders.
    other = MadeUp(steps=20).write(tmp_path / "more" / "ar-s1")
    found = read_runs([plain.folder, other, plain.folder / ".." / "ar-s1"], "test")
    assert [run.label for run in found] == [f"{tmp_path.name}/ar-s1", "more/ar-s1"]
    (validation,) = read_runs([plain.folder], "valid")
    assert "(there are scores of: test)" in validation.notes[0]
    assert validation.notes[0].endswith(f"--checkpoint {plain.folder} --split valid`")
    pretraining = json.loads((begun.folder / "run.json").read_text())
    pretraining["recipe"]["data"] = {"task": "denoise"}
    (begun.folder / "run.json").write_text(json.dumps(pretraining))
    assert read_runs([begun.folder], "test")[0].notes == begun.notes[:1], "there is no text to score"
    torn = plain.folder / "run.json"
    torn.write_text(torn.read_text()[:-9])
    assert read_runs([plain.folder], "test")[0].notes[0].startswith(f"{torn} cannot be read as JSON")


def test_scores_are_found_in_all_their_forms(tmp_path):
    run = MadeUp(modes={"nar-4": (20.0, 9.0, 9.0)}).write(tmp_path / "run")
    folder = run / "eval" / "test"
    # A second evaluation rewrote scores.json; the first one's own file is still there, of older weights.
    older = {**scores_of("ar", (25.0, 9.0, 9.0), "paper"), "checkpoint": "step-00000500"}
    (folder / "ar.scores.json").write_text(json.dumps(older))
    (folder / "torn.scores.json").write_text("{")
    xsum = {"task": "xsum", "split": "test", "n": 2, "metrics": {"rouge1": 1.0, "overall": 2.0}}
    (folder / "xsum").mkdir()
    (folder / "xsum" / "scores.json").write_text(json.dumps({"task": "all", "tasks": {"xsum": xsum}}))
    (run / "scores.json").write_text(json.dumps({**xsum, "task": "coqa", "split": "dev"}))
    (found,) = read_runs([run], "test")
    assert {task: list(systems) for task, systems in found.tasks.items()} == {
        "nmt": ["nar-4", "ar"],
        "xsum": ["predictions"],
    }
    assert found.notes == [
        "torn.scores.json cannot be read as JSON",
        "scores.json is of split dev, not test",
        "ar was not scored like the others: checkpoint step-00000500, others step-00001000",
    ]
    assert primary_metric(list(found.tasks["xsum"].values())) == "overall"
    assert primary_metric(list(found.tasks["nmt"].values())) == "sacrebleu"
    modes = ["draft", "nar-10", "nar + rescore", "ar", "nar-4"]
    assert sorted_modes([dict.fromkeys(modes)]) == ["ar", "nar-4", "nar-10", "nar + rescore", "draft"]


def test_scores_in_another_precision_or_on_another_device_are_noted(tmp_path):
    run = MadeUp(modes={"nar-4": (20.0, 9.0, 9.0)}).write(tmp_path / "run")
    for mode, precision, device in (("ar", "fp32", "cpu, threads 1"), ("nar-4", "int8", "cpu, threads 1")):
        told = scores_of(mode, (25.0, 9.0, 9.0), "paper") | {"precision": precision, "device": device}
        (run / "eval" / "test" / f"{mode}.scores.json").write_text(json.dumps(told))
    (run / "eval" / "test" / "scores.json").unlink()
    (found,) = read_runs([run], "test")
    assert found.notes == ["nar-4 was not scored like the others: precision int8, others fp32"]
    assert "mean of 5 checkpoint(s), int8, cpu, threads 1" in _circumstances(found)


def test_the_first_sentences_of_a_split_and_runs_of_glge(tmp_path):
    run = MadeUp(modes={"ar": (25.0, 9.0, 9.0)}).write(tmp_path / "run")
    (run / "eval" / "test").rename(run / "eval" / "test-first-3")
    (run / "scores.json").write_text(json.dumps(scores_of("nar-4", (20.0, 9.0, 9.0), "paper")))
    (found,) = read_runs([run], "test-first-3")
    assert list(found.tasks["nmt"]) == ["ar"]
    assert found.notes == ["scores.json is of split test, not test-first-3"]
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["train"]["valid_task"] = "xsum"
    (run / "run.json").write_text(json.dumps(record))
    (run / "scores.json").unlink()
    # The command makes the scores that are missing, whatever the folder is called.
    run = run.rename(tmp_path / "a run")
    command = f"janus-ds eval glge --task xsum --checkpoint '{run}'"
    for split, more in (("dev", " --split dev"), ("test", ""), ("dev-first-9", " --split dev --limit 9")):
        assert f"run `{command}{more}`" in read_runs([run], split)[0].notes[0]


def test_curves_of_the_metric_that_training_measured(runs):
    bleu = draw_curve_pictures(runs)[0]
    assert "Validation BLEU against" in bleu.title
    for run in runs:
        run.lines = [{key.replace("bleu", "rouge"): line[key] for key in line} for line in run.lines]
    rouge = draw_curve_pictures(runs)[0]
    assert "Validation mean ROUGE against" in rouge.title
    assert rouge.png is not None
    runs[0].lines.append({"step": 1020, "valid/bleu2_ar": 3.0})
    both = draw_curve_pictures(runs)[0]
    assert "Validation BLEU-2, mean ROUGE against" in both.title
    assert both.png not in (None, rouge.png)


def test_a_damaged_metrics_file_is_read_as_far_as_it_goes(tmp_path):
    folder = MadeUp(steps=40).write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('5\n{"loss": 1}\n{"step": 60, "ar": null, "nar": 3.5}\n{"step": 80, "a')
    (run,) = read_runs([folder], "test")
    assert run.updates == 60
    assert [step for step, _ in run.points("ar")] == [20, 40]
    assert run.points("nar")[-1] == (60, 3.5)


def test_thinned_curves_are_means_of_neighbours():
    assert thinned([(i, i * 2) for i in range(6)], 3) == [(0.5, 1), (2.5, 5), (4.5, 9)]


def test_rows_hold_means_over_seeds(runs, tmp_path):
    rows = rows_of(runs, "nmt")
    assert [row.label for row in rows] == ["janus-s1", "janus-s2", "janus: mean", "ar-s1", "cmlm-s1"]
    mean = rows[2]
    assert (mean.is_mean, mean.seed, mean.modes["ar"]["sacrebleu"]) == (True, "2 seeds", 31.0)
    assert "draft" not in mean.modes, "one seed has it"
    assert mean.modes["nar-0"]["ms_per_sentence_batch_1"] == 5.0
    assert (rows[4].updates, rows[4].modes) == ("40 of 1,000", {})
    # A mean of checkpoints, as `convert --from run` makes it, and a second run of a seed are no seeds.
    again = MadeUp(modes=JANUS).write(tmp_path / "again")
    means = [MadeUp(modes=JANUS, seed=seed).write(tmp_path / f"mean-s{seed}") for seed in (1, 2)]
    for folder in means:
        record = json.loads((folder / "run.json").read_text())
        record["execution"] = {"converted_from": "janus", "checkpoints": ["step-00000500", "step-00001000"]}
        (folder / "run.json").write_text(json.dumps(record))
    found = read_runs([runs[0].folder, again, *means], "test")
    assert "mean of 5 checkpoint(s)" in _circumstances(found[0])
    assert "mean of 2 checkpoint(s)" in _circumstances(found[-1])
    labels = [row.label for row in rows_of(found, "nmt")]
    assert labels == ["janus-s1", "again", "mean-s1", "mean-s2", "mean: mean"]


def part(name: str, content: object) -> str:
    """A part of the page as HTML."""
    environment = Environment(loader=PackageLoader("janus_ds.report"), autoescape=True)
    template = environment.from_string(f"{{% from 'parts.html.j2' import {name} %}}{{{{ {name}(content) }}}}")
    return template.render(content=content)


def words(reference: str, text: str) -> str:
    return part("words", marked(reference, text)).strip()


def test_tables_mark_the_best_run_of_a_column(runs):
    text = part("run_table", run_table(runs, "nmt"))
    assert text.count('<td class="best">32.00</td>') == 1
    assert '<td class="best">30.00</td>' not in text
    # Both seeds have 28 after 10 iterations, a lone draft has no rival: nothing is the best.
    assert '<td class="best">28.00</td>' not in text
    assert text.index("NAR 0") < text.index("NAR 10") < text.index("draft")
    modes = part("mode_table", mode_table(runs, "nmt"))
    assert '<td class="best">18.00</td>' in modes, "the fewest repetitions"
    assert '<td class="best">38</td>' in modes, "the fewest milliseconds"
    # The mean has it too, but is never marked.
    assert modes.count("31.00") == 2
    assert modes.count("</tr>") == 1 + 4 + (4 + 3 + 3 + 1)


def test_words_that_differ_are_marked():
    assert words("a red hat", "a red hat") == "a red hat"
    assert words("a red hat", "a blue hat") == "a <mark>blue</mark> hat"
    assert words("the red hat .", "the hat.") == 'the<del title="missing: red">‸</del> hat.'
    assert words("a hat", "a hat hat") == "a hat <mark>hat</mark>"
    assert words("< y", "<b> & y") == "&lt;<mark>b&gt; &amp;</mark> y"
    assert words("a", "b") == "<mark>b</mark>"


def test_samples_stand_side_by_side(runs, tmp_path):
    text = part("samples", sample_cards(runs, "nmt", 2))
    assert [f"Sentence {n}" in text for n in (1, 2, 3)] == [True, False, True]
    assert SOURCES[0] in text
    assert "AR, NAR 0, NAR 10, draft" in text, "equal outputs share a line"
    assert "cmlm" not in text
    every = part("samples", sample_cards(runs, "nmt", 9))
    assert "two dogs &lt;run&gt; &amp; play" in every
    assert "<run>" not in every
    assert "No outputs" in part("samples", sample_cards(runs[3:], "nmt", 2))
    # Another test set does not stand beside this one; an empty output is said to be one.
    other = MadeUp(modes={"ar": (1.0, 1.0, 1.0)}, outputs={"ar": ["", "x", "y"]}).write(tmp_path / "other")
    assert "<i>empty</i>" in part("samples", sample_cards(read_runs([other], "test"), "nmt", 3))
    write_lines(other / "eval" / "test" / "references.txt", ["something", "else", "here"])
    assert "other" not in part("samples", sample_cards([*runs, *read_runs([other], "test")], "nmt", 2))
    (runs[0].folder / "eval" / "test" / "sources.txt").unlink()
    assert "sources are not at hand" in part("samples", sample_cards(runs[:1], "nmt", 1))


def test_epochs_come_from_the_data_beside_the_run(runs):
    run = runs[0]
    run.lines = [{"step": 10, "samples_total": 40}, {"step": 20, "samples_total": 80}]
    assert run.epochs() is None
    data = run.folder.parent / "data"
    data.mkdir()
    totals = SplitTotals(samples=20, tokens=1, shards=1, index_sha256="0" * 64)
    Manifest("pair", "f0" * 32, 8, {}, {"train": totals}).save(data)
    assert run.epochs() == {10: 2.0, 20: 4.0}
    run.record["tokenizer_fingerprint"] = "of other data"
    assert run.epochs() is None


def test_pictures_are_drawn_or_say_why_not(runs):
    pictures = [*draw_task_pictures(runs, "nmt"), *draw_curve_pictures(runs)]
    assert [picture.name for picture in pictures] == [
        "nmt_iterations", "nmt_time", "validation_bleu", "losses",
    ]  # fmt: skip
    assert all((picture.png or b"").startswith(PNG) for picture in pictures)
    again = draw_task_pictures(runs, "nmt")
    assert again[0].png == pictures[0].png, "the same figures give the same bytes"
    # Plain AR alone has no iterations; a run without speeds has no time.
    for system in runs[2].tasks["nmt"].values():
        dict.pop(system.scores, "speed")  # type: ignore[arg-type]
    alone = draw_task_pictures(runs[2:3], "nmt")
    assert [picture.png for picture in alone] == [None, None]
    assert alone[0].caption == "No run has scores of NAR decoding."
    runs[2].lines = []
    assert [picture.png for picture in draw_curve_pictures(runs[2:3])] == [None, None]


def test_a_single_iteration_and_odd_names_are_drawn(tmp_path):
    folder = MadeUp(modes={"nar-4": (0.0, 9.0, 9.0)}, steps=20).write(tmp_path / "$odd_{$ & <name>")
    found = read_runs([folder], "test")
    drawn = [*draw_task_pictures(found, "nmt"), *draw_curve_pictures(found)]
    assert [picture.png is not None for picture in drawn] == [True, True, False, True]


def test_looks_tell_kinds_by_colour_and_seeds_by_line(runs):
    looks = looks_of(runs)
    first, second, plain = (looks[run.label] for run in runs[:3])
    assert (first["color"], first["marker"]) == (second["color"], second["marker"])
    assert first["linestyle"] != second["linestyle"]
    assert plain["color"] != first["color"]
    assert plain["marker"] != first["marker"]


def test_the_frontier_is_what_nothing_faster_equals():
    points = [(5.0, 20.0), (9.0, 19.0), (9.0, 25.0), (40.0, 25.0), (50.0, 30.0)]
    assert frontier(points) == [(5.0, 20.0), (9.0, 25.0), (50.0, 30.0)]


def test_objectives_are_told_by_their_preset_and_what_differs():
    paper = dict(OBJECTIVE_PRESETS["paper"])
    none = {"weight_kl_ar_aux": 0.0, "weight_kl_nar_aux": 0.0}
    assert objective_text("paper", paper, "pair") == "paper"
    assert objective_text("paper", paper | none | {"weight_aux": 0.0}, "pair") == "paper without AUX, K"
    assert objective_text("paper", paper | {"weight_kl_ar_aux": 0.0, "weight_nar": 0.5}, "pair") == (
        "paper without K(AR, AUX), NAR x 0.5"
    )
    assert objective_text("released", OBJECTIVE_PRESETS["released/pair"], "pair") == "released"
    assert objective_text("?", {}, None) == "?"
