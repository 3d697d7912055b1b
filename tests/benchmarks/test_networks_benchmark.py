"""The benchmark of whole networks: every part has a row, its two sides agree, and rows of other runs stay."""

import json

import pytest

from benchmarks import networks


def test_rows_of_the_bundled_checkpoint(tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = ["--size", "128", "--steps", "2", "--seconds", "0", "--out", str(out)]
    assert networks.main([*options, "--dtype", "fp32"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["posterior mean", "encode", "2 velocity steps", "decode"]
    for row in rows:
        # Not the same sums, so not the same bits; the results of one network all the same.
        assert 0 < row["difference"] < 1e-3, row
        assert row["speed_of_torch"] == pytest.approx(row["seconds_torch"] / row["seconds_ours"], rel=1e-2)
    assert networks.main([*options, "--size", "192", "--dtype", "fp32", "--add"]) == 0
    assert [row["size"] for row in json.loads(out.read_text())["rows"]] == [128] * 4 + [192] * 4
    assert capsys.readouterr().out.count("times as fast") == 8
