"""The packing bench runs, and counts what packed rows leave out."""

from __future__ import annotations

import json

from benchmarks.packing import main


def test_rows_are_counted_and_padding_is_left_out(tmp_path, capsys):
    file, name = tmp_path / "packing.json", "like_length_pad_multiple_8"
    options = ["--model", "quickstart", "--only", name, "--rounds", "1", "--samples", "512"]
    assert main([*options, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["ratios"]) == {f"{name}_padded_over_packed"}
    rows, printed = result["rows"][name], capsys.readouterr().out
    for what in ("decoder_rows", "source"):
        assert 0 < rows["packed"][what] < rows["padded"][what]
        assert f"{rows['packed'][what]:,}" in printed
