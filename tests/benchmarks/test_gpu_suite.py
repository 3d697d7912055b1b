"""The GPU suite without a GPU: parts are chosen, a failing, crashing or hanging one does not stop the rest."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import PARTS, Part


def part(name, code, minutes=1.0, results=None):
    return Part(name, minutes, (sys.executable, "-c", code), results)


def test_a_failing_part_does_not_stop_the_others(tmp_path):
    def read(out):
        return {"read": (out / "made").read_text()}

    parts = [
        part("raises", "raise SystemExit('it went wrong')"),
        part("crashes", "import os; os.abort()", results=lambda out: json.loads((out / "none").read_text())),
        part("hangs", "print('on its way', flush=True); import time; time.sleep(60)", minutes=0.05),
        Part("absent", 1, ("/no/such/program",)),
        part("works", "open(r'{out}/made', 'w').write('x'); print('done')", results=read),
    ]
    rows = gpu_suite.run(parts, tmp_path / "out", 1, {"device": "none"}, log=lambda line: None)
    assert [row["status"] for row in rows[:3]] == ["failed (1)", "failed (-6)", "out of time"]
    assert "FileNotFoundError" in rows[3]["status"] and rows[4]["status"] == "ok"
    assert rows[0]["last_line"] == "it went wrong" and rows[2]["last_line"] == "on its way"
    assert rows[2]["seconds"] < 30 and "FileNotFoundError" in rows[1]["no_results"]
    out = tmp_path / "out"
    assert json.loads((out / "works.json").read_text()) == {"read": "x"}
    suite = json.loads((out / "suite.json").read_text())
    assert suite["parts"] == [{**row, "machine": {"device": "none"}} for row in rows]
    assert suite["parts"][4]["results"] == {"read": "x"} and suite["parts"][0]["log"] == ["it went wrong"]
    assert len(gpu_suite.table(rows).splitlines()) == 5


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_what_a_part_has_started_ends_with_it(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code += "; open(r'{out}/pid', 'w').write(str(p.pid)); time.sleep(60)"
    (row,) = gpu_suite.run([part("parent", code, 0.1)], tmp_path, 0.1, {}, log=lambda line: None)
    assert row["status"] == "out of time"
    pid = (tmp_path / "pid").read_text()
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_parts_after_the_end_are_not_run(tmp_path):
    parts = [part("long", "import time; time.sleep(60)"), part("late", "")]
    rows = gpu_suite.run(parts, tmp_path, 0.03, {}, log=lambda line: None)
    assert [row["status"] for row in rows] == ["out of time", "no time left"]


def test_what_a_part_leaves_goes_to_the_next_ones_and_no_more(tmp_path):
    limits = []
    parts = [part("a", "", 3), part("b", "", 3), part("c", "", 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_suite, "run_part", lambda part, out, seconds: limits.append(seconds) or ROW)
        gpu_suite.run(parts, tmp_path, 10, {}, log=lambda line: None)
        assert limits == pytest.approx([200, 400, 600], abs=5)  # nobody has used anything
        limits.clear()
        gpu_suite.run(parts, tmp_path, 5, {}, log=lambda line: None)
        assert limits == pytest.approx([180, 180, 300], abs=5)


ROW = {"part": "x", "status": "ok", "seconds": 0.0, "last_line": ""}


def test_what_was_written_before_the_time_was_up_counts(tmp_path):
    code = "import time; open(r'{out}/slow.json', 'w').write('[1, 2]'); time.sleep(60)"
    (row,) = gpu_suite.run([part("slow", code, 0.05)], tmp_path, 0.05, {}, log=lambda line: None)
    assert row["status"] == "out of time" and row["results"] == [1, 2]
    (row,) = gpu_suite.run([part("slow", "", 0.05)], tmp_path, 1, {}, log=lambda line: None)
    assert "results" not in row and "FileNotFoundError" in row["no_results"]  # those of another time do not


def test_another_command_goes_on_where_the_first_has_ended(tmp_path):
    def run(machine, **codes):
        parts = [part(name, code) for name, code in codes.items()]
        gpu_suite.run(parts, tmp_path, 1, {"device": machine}, log=lambda line: None)
        rows = json.loads((tmp_path / "suite.json").read_text())["parts"]
        return [(row["part"], row["status"], row["machine"]["device"]) for row in rows]

    assert run("A", one="", two="raise SystemExit(3)") == [("one", "ok", "A"), ("two", "failed (3)", "A")]
    assert run("B", two="", three="") == [("one", "ok", "A"), ("two", "ok", "B"), ("three", "ok", "B")]
    (tmp_path / "suite.json").write_text("{")  # cut off
    assert run("C", one="") == [("one", "ok", "C")]


def test_parts_are_chosen_by_run_and_by_name():
    first, second = gpu_suite.chosen(None, PARTS), gpu_suite.chosen(None, PARTS, 2)
    assert [*first, *second] == PARTS and "training" in {p.name for p in second}
    assert [p.name for p in gpu_suite.chosen("training,correctness", PARTS)] == ["correctness", "training"]
    with pytest.raises(ValueError, match="no part is called 'all'; there are correctness, tune, engine"):
        gpu_suite.chosen("all", PARTS)
    assert sum(p.minutes for p in first) <= 9 and sum(p.minutes for p in second) <= 9


def test_the_parts_commands_are_understood():
    """Their modules take these arguments: what they refuse is the GPU that is not there, or nothing."""
    for p in PARTS:
        module, words = p.command[2], [word.replace("{out}", "/none") for word in p.command[3:]]
        if module.startswith("benchmarks."):
            main = importlib.import_module(module).main
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("torch.cuda.is_available", lambda: False)
                patch.setattr("benchmarks.machine.describe", stop)
                with pytest.raises((Reached, SystemExit)) as end:
                    main(words)
            if end.type is SystemExit:
                assert end.value.code == 2


class Reached(Exception):
    pass


def stop(device):
    assert device == "cuda"
    raise Reached


def test_the_whole_command_on_a_cpu(pipe, tmp_path, capsys):
    """Real parts, tiny: tests, kernels, the engine, one that fails; then the one that was left, behind them."""
    model, python = str(pipe.save_pretrained(tmp_path / "model")), (sys.executable, "-m")
    kernels = (*python, "benchmarks.kernels", "--device", "cpu", "--no-compile", "--seconds", "0")
    engine = (*python, "benchmarks.engine", "--device", "cpu", "--preset", model, "--size", "64", "--steps", "1")
    parts = [
        Part(
            "correctness",
            1.5,
            (*python, "pytest", "tests/engine/test_plan.py", "-vv", "-k", "cannot"),
            gpu_suite.test_counts,
        ),
        Part("kernels", 2, (*kernels, "--ops", "euler_step", "--out", "{out}/kernels.json")),
        Part("training", 1, (*python, "benchmarks.training", "--cases", "no such case", "--out", "{out}/t.json")),
        Part(
            "engine",
            3,
            (
                *(*engine, "--batch", "1", "--only", "engine fp32", "--parts", "providers", "--seconds", "0"),
                *("--out", "{out}/engine.json"),
            ),
            run=2,
        ),
    ]
    arguments = ["--out", str(tmp_path / "out"), "--minutes", "9"]
    assert gpu_suite.main(arguments, parts, "cpu") == 1
    assert gpu_suite.main([*arguments, "--run", "2"], parts, "cpu") == 0
    table = capsys.readouterr().out
    assert "training" in table and "failed (2)" in table and "no case 'no such case'" in table
    rows = {row["part"]: row for row in json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]}
    assert list(rows) == ["correctness", "kernels", "training", "engine"]
    assert rows["correctness"]["results"]["passed"] >= 1 and rows["correctness"]["results"]["which_failed"] == []
    assert {row["op"] for row in rows["kernels"]["results"]["rows"]} == {"euler_step"}
    found = {row["provider"]: row for row in rows["engine"]["results"]["rows"]}
    assert found["engine fp32"]["speed_of_naive"] > 0 and found["engine fp32"]["levels"] <= 2
    assert rows["engine"]["machine"]["versions"]["torch"] and rows["engine"]["machine"]["commit"]


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "gpu_suite: PyTorch sees no GPU; nothing was run\n"
    assert not (tmp_path / "out").exists()


def test_the_tests_lines_are_read_also_those_of_a_run_that_was_cut_off(tmp_path):
    (tmp_path / "correctness.log").write_text(
        "tests/a.py::b PASSED                       [  3%]\n"
        "tests/a.py::c[x y] FAILED                  [  6%]\n"
        "tests/a.py::d SKIPPED (needs a GPU)        [  9%]\n"
        "[gw1] [ 12%] PASSED tests/a.py::e[cuda-triton-1] \n"
        "[gw0] [ 15%] ERROR tests/a.py::f \n"
        "tests/a.py::g \n"
        "FAILED tests/a.py::c[x y] - assert 0\n"
    )
    failed = ["tests/a.py::c[x y]", "tests/a.py::f"]
    assert gpu_suite.test_counts(tmp_path) == {"passed": 2, "failed": 2, "skipped": 1, "which_failed": failed}
