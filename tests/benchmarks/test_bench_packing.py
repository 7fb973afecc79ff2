"""The packing bench runs, and counts what packed rows leave out."""

from __future__ import annotations

from benchmarks.packing import PackingBench, bench_packing, describe


def test_rows_are_counted_and_padding_is_left_out():
    result = bench_packing(PackingBench("quickstart", ("like_length_pad_multiple_8",), 1, samples=512))
    assert set(result["ratios"]) == {"like_length_pad_multiple_8_padded_over_packed"}
    rows = result["rows"]["like_length_pad_multiple_8"]
    for what in ("decoder_rows", "source"):
        assert 0 < rows["packed"][what] < rows["padded"][what]
        assert f"{rows['packed'][what]:,}" in describe(result)
