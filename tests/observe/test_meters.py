"""Figures: timing, work count, and files with one value a step after any number of resumes."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from janus_ds.batch import BatchCounts
from janus_ds.config.presets import resolve
from janus_ds.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import ResourceError
from janus_ds.observe import MetricsWriter, read_metrics
from janus_ds.train.reporting import StepMeter, device_peak_flops, memory_bytes, step_flops

COUNTS = BatchCounts(samples=2, source_tokens=600, target_tokens=400, ar_tokens=398, masked_tokens=200)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalar events as written, without TensorBoard's own purging."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name != "text":
                    found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return {tag: sorted(values) for tag, values in found.items()}


def test_one_value_a_step_after_kills_and_resumes(tmp_path: Path) -> None:
    """Three starts: killed at 5 with a checkpoint at 3, killed at 6 with one at 3, then to the end."""
    for start, end, value in ((0, 5, 1.0), (3, 6, 2.0), (3, 8, 3.0)):
        writer = MetricsWriter(tmp_path, start)
        for step in range(start + 1, end + 1):
            writer.write(step, {"loss": value, "bad": float("nan"), "note": "text"})
            writer.write_text(step, "samples", "some text")
        writer.close()
        # What a kill in the middle of a write leaves.
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 9, "lo')
        with max((tmp_path / "tensorboard").glob("events.*"), key=lambda p: p.stat().st_mtime).open(
            "ab"
        ) as file:
            file.write(b"\x20\x00\x00\x00")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), *((step, 3.0) for step in range(4, 9))]
    assert [(line["step"], line["loss"]) for line in lines] == expected
    assert lines[0]["bad"] is None
    MetricsWriter(tmp_path, 8).close()
    assert events(tmp_path / "tensorboard") == {"loss": expected}


def test_a_new_start_from_zero_removes_everything(tmp_path: Path) -> None:
    for _ in range(2):
        writer = MetricsWriter(tmp_path, 0)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert events(tmp_path / "tensorboard") == {"loss": [(1, 1.0)]}


def test_a_full_disk_under_tensorboard_is_told_in_words_by_the_rank_that_writes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    # What its thread leaves where a write has failed.
    writer._events.event_writer._async_writer._worker.exception = OSError(
        errno.ENOSPC, "No space left on device"
    )
    for act in (
        lambda: writer.write(1, {"loss": 1.0}),
        lambda: writer.write_text(1, "samples", "some text"),
        writer.flush,
    ):
        with pytest.raises(ResourceError, match=r"cannot be written \(No space") as caught:
            act()
        assert caught.value.local
    writer.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tensorboard").write_text("no folder")
    with pytest.raises(ResourceError, match=r"cannot be written \(File exists"):
        MetricsWriter(tmp_path / "other", 0)


def test_tokens_per_second_and_the_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 14.0, 14.0, 18.0, 18.0, 18.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = StepMeter(devices=4, peak_flops=1e9)
    meter.restart()
    meter.data_ready()
    timing = meter.finish(COUNTS, flops=1e8)
    assert timing["seconds"] == 4.0
    assert timing["tokens_per_second"] == pytest.approx(250)
    assert timing["tokens_per_second_device"] == pytest.approx(62.5)
    assert timing["data_wait_share"] == pytest.approx(0.25)
    assert timing["mfu"] == pytest.approx(1e8 / 4.0 / 4e9)
    # Two dropout draws are twice the work, and no more tokens.
    meter.data_ready()
    twice = meter.finish(COUNTS, flops=1e8, draws=2)
    assert twice["tokens_per_second"] == pytest.approx(125)
    assert twice["mfu"] == timing["mfu"]


def test_work_of_a_step_agrees_with_the_published_count() -> None:
    """BART-base 512/512, M/N = .5: a JANUS step is 2.24 AR steps, and an AR step 153 GFLOP forward."""
    model = ModelConfig(d_model=768, encoder_layers=6, decoder_layers=6, ffn_dim=3072, heads=12)
    alone = BatchCounts(samples=1, source_tokens=512, target_tokens=512, ar_tokens=511)
    both = replace(alone, masked_tokens=256)
    janus = step_flops(model, resolved("paper"), 50265, both)
    plain = step_flops(model, resolved("ar"), 50265, alone)
    assert plain / 3 == pytest.approx(153e9, rel=0.05)
    assert janus / plain == pytest.approx(2.24, rel=0.05)
    only_kl = replace(resolved("paper"), weight_aux=0.0)
    assert step_flops(model, only_kl, 50265, both) == janus, "AUX rows are there for the KL terms too"


def resolved(preset: str) -> ObjectiveConfig:
    return resolve(RunConfig(objective=ObjectiveConfig(preset=preset))).objective


def test_cpu_has_memory_and_no_known_peak() -> None:
    cpu = torch.device("cpu")
    assert device_peak_flops(cpu, torch.float32) is None
    assert memory_bytes(cpu) > 10**7


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
    ],
)
def test_a_peak_is_that_of_the_device_and_of_no_namesake(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    # Products in fp32 do not use TF32, whose peak data sheets give.
    assert torch.get_float32_matmul_precision() == "highest"
    assert device_peak_flops(torch.device("cuda"), torch.float32) is None


def written(folder: Path, end: int) -> None:
    writer = MetricsWriter(folder, 0)
    for step in range(1, end + 1):
        writer.write(step, {"loss": float(step)})
    writer.close()


def resumed(folder: Path, step: int) -> tuple[list[int], list[int]]:
    """Go on after `step` to step 12; the steps in both histories."""
    writer = MetricsWriter(folder, step)
    for number in range(step + 1, 13):
        writer.write(number, {"loss": float(number)})
    writer.close()
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    return steps, [number for number, _ in events(folder / "tensorboard").get("loss", [])]


@pytest.mark.parametrize("bad", [b"\xff\xfe{", b"[1]\n", b"{}\n", b'{"step": "x"}\n', b"[" * 100_000 + b"\n"])
def test_a_damaged_line_of_figures_costs_itself_only(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 8)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + bad + b"".join(lines[3:]))
    # Garbage without an end of its line takes the next line with it.
    lost = [] if bad.endswith(b"\n") else [4]
    steps, logged = resumed(tmp_path, 6)
    assert steps == [step for step in range(1, 13) if step not in lost]
    assert logged == list(range(1, 13))
    assert "metrics.jsonl is damaged and was set aside as damaged-1.metrics.jsonl" in caplog.text
    assert bad in (tmp_path / "damaged-1.metrics.jsonl").read_bytes()


@pytest.mark.parametrize("place", range(0, 600, 7))
def test_a_flipped_byte_in_a_tensorboard_file_never_keeps_a_run_from_going_on(
    tmp_path: Path, place: int
) -> None:
    written(tmp_path, 8)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= 0x80
    path.write_bytes(bytes(data))
    writer = MetricsWriter(tmp_path, 6)
    writer.write(7, {"loss": 7.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))


def test_a_damaged_tensorboard_file_is_set_aside_and_its_first_part_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 8)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3 :] = bytes(len(data) - len(data) * 2 // 3)
    path.write_bytes(bytes(data))
    steps, logged = resumed(tmp_path, 6)
    assert steps == list(range(1, 13))
    assert logged[:3] == [1, 2, 3]
    assert logged[-6:] == list(range(7, 13))
    assert "was set aside as damaged-1.events.out.records" in caplog.text
