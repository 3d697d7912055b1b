"""The engine's benchmark runs, compares pictures before it clocks, and writes rows as they come."""

import copy
import json

import pytest

from benchmarks import engine


@pytest.fixture(autouse=True)
def small(pipe, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda preset, dtype, device: copy.deepcopy(pipe).to(device, dtype))


def test_rows_of_a_small_run(tmp_path):
    out = tmp_path / "engine.json"
    logged = []
    report = engine.run("cpu", "bundled", 64, [1], [1], False, ["engine"], 0.0, out, logged.append)
    assert json.loads(out.read_text())["rows"] == report["rows"]
    rows = {row.get("provider") or row.get("stage") or row.get("queue"): row for row in report["rows"]}
    assert {"naive", "engine", "posterior mean", "encode", "one step", "decode", "2 batches"} == set(rows)
    assert not [name for name, row in rows.items() if "failed" in row]
    ours = rows["engine"]
    assert ours["psnr_of_naive"] > 30 and ours["speed_of_naive"] > 0 and ours["seconds"] <= ours["seconds_p99"]
    assert rows["naive"]["levels"] == 0 and 0 <= rows["2 batches"]["idle_share"] <= 1
    assert "x naive" in logged[0] and any("2 batches" in text for text in logged)


def test_a_provider_that_fails_is_a_row(monkeypatch):
    def broken():
        raise RuntimeError("no such\nkernel")

    made = engine.providers
    monkeypatch.setattr(engine, "providers", lambda *a: {**made(*a), "engine": broken})
    rows = engine.whole("bundled", "cpu", 64, 1, 1, False, ["engine"], 0.0)
    assert [row.get("failed") for row in rows] == [None, "RuntimeError: no such kernel"]
