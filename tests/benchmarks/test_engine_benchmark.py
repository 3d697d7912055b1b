"""The engine's benchmark runs, compares pictures before it clocks, and writes rows as they come."""

import json

import pytest
import torch

from benchmarks import engine


@pytest.fixture
def preset(pipe, tmp_path):
    return str(pipe.save_pretrained(tmp_path / "model"))


def test_rows_of_a_small_run(preset, tmp_path):
    """Every provider in a process of its own, with stages, cold start and the queue."""
    out, logged = tmp_path / "engine.json", []
    report = engine.run("cpu", preset, 64, [2], [1], False, ["engine fp32"], 0.0, out, logged.append)
    rows = report["rows"]
    assert json.loads(out.read_text())["rows"] == rows and not [row for row in rows if "failed" in row]
    whole = {row["provider"]: row for row in rows if "provider" in row}
    assert set(whole) == {"naive", "engine fp32"} and whole["naive"]["levels"] == 0
    ours = whole["engine fp32"]
    assert (
        ours["levels"] <= 2 and ours["speed_of_naive"] > 0 and ours["cold_start_seconds"] > ours["first_call_seconds"]
    )
    assert ours["seconds"] <= ours["seconds_p90"] <= ours["seconds_p99"] and ours["times"] >= 2
    stages = {(row["stage"], row["of"]): row for row in rows if "stage" in row}
    names = ("posterior mean", "encode", "steps", "decode")
    assert set(stages) == {(stage, provider) for stage in names for provider in whole}
    assert all(row["speed_of_naive"] == 1 for (_, provider), row in stages.items() if provider == "naive")
    (queue,) = (row for row in rows if "queue" in row)
    assert queue["queue"] == "2 batches" and 0 <= queue["idle_share"] <= 1
    assert "x naive" in logged[0] and "2 batches" in logged[-1] and "x naive" not in logged[-1]
    (about,) = report["runs"]
    assert about["run"] == 1 and about["command"].startswith("python -m benchmarks.engine")
    assert about["machine"]["versions"]["torch"] == torch.__version__ and about["networks"]["vae"].startswith("SimVAE")
    again = engine.run("cpu", preset, 64, [1], [1], False, ["naive"], 0.0, out, parts=["queue"], before=report)
    assert json.loads(out.read_text()) == again and [about["run"] for about in again["runs"]] == [1, 2]
    assert [row["run"] for row in again["rows"]] == [1] * (len(again["rows"]) - 1) + [2]


def test_rows_are_written_as_they_come(monkeypatch, preset, tmp_path):
    """A run that is cut off keeps what it has."""
    out = tmp_path / "engine.json"

    def rows(*_):
        for i in range(2):
            yield {"queue": str(i), "batch": 1}
        assert [row["queue"] for row in json.loads(out.read_text())["rows"]] == ["0", "1"]
        raise RuntimeError("cut off")

    monkeypatch.setattr(engine, "queue", rows)
    report = engine.run("cpu", preset, 64, [1], [1], False, None, 0.0, out, parts=["queue"])
    assert report["rows"][2] == {"queue": "queue", "batch": 0, "failed": "RuntimeError: cut off", "run": 1}


def test_an_unknown_provider_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        engine.main(["--device", "cpu", "--only", "engin"])
    assert (
        end.value.code == 2
        and "no provider is called 'engin'; there are naive, engine, eager" in capsys.readouterr().err
    )


def test_the_naive_side_is_pytorchs_own(pipe):
    """No op of ours, whatever the networks call, and the pipeline's own result."""
    pixels, names = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), set()
    expected = pipe(pixels, 2, seed=3, output_type="pt").images

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    naive = engine.Plain(engine.plainly(pipe, torch.contiguous_format))
    with Names():
        result = naive(pixels, [3], 2)
    assert names == {"aten"}
    assert (result.float() / 255 - expected).abs().max() < 2 / 255
    with Names(), torch.no_grad():
        pipe(pixels, 2, seed=3)
    assert "lpmrf" in names


def test_a_provider_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    arguments = ("no such folder", "cpu", 64, 1, 1, False, ["engine"], 0.0)
    rows = list(engine.attempted("providers", engine.on_cpu, *arguments))
    assert [row["provider"] for row in rows] == ["naive", "engine"]
    assert all("no such folder" in row["failed"] and "\n" not in row["failed"] for row in rows)
    assert "no such folder" in engine.table(rows)


def test_a_process_that_dies_is_said():
    class Dies:
        @staticmethod
        def send(what):
            raise BrokenPipeError

    process = engine.Apart.__new__(engine.Apart)
    process.connection = Dies
    process.process = type("Process", (), {"join": lambda self: None, "exitcode": -9})()
    with pytest.raises(RuntimeError, match="its process ended with -9"):
        process()


def test_a_part_that_fails_is_a_row():
    def breaks():
        raise RuntimeError("no such\nkernel")

    (row,) = engine.attempted("queue", breaks)
    assert row["failed"] == "RuntimeError: no such kernel" and "no such kernel" in engine.table([row])
