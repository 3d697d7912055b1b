"""The GPU suite without a GPU: parts are chosen, a failing, crashing or hanging one does not stop the rest."""

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
    assert json.loads((out / "suite.json").read_text()) == {"machine": {"device": "none"}, "parts": rows}
    assert len(gpu_suite.table(rows).splitlines()) == 5


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_what_a_part_has_started_ends_with_it(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code += "; open(r'{out}/pid', 'w').write(str(p.pid)); time.sleep(60)"
    (row,) = gpu_suite.run([part("parent", code, 0.1)], tmp_path, 1, {}, log=lambda line: None)
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


def test_parts_are_chosen_by_name():
    assert [p.name for p in gpu_suite.chosen(None, PARTS)] == [p.name for p in PARTS]
    assert [p.name for p in gpu_suite.chosen("kernels,correctness", PARTS)] == ["correctness", "kernels"]
    with pytest.raises(ValueError, match="no part is called 'all'; there are correctness, tune, kernels"):
        gpu_suite.chosen("all", PARTS)
    assert sum(p.minutes for p in PARTS) <= 9


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "gpu_suite: PyTorch sees no GPU; nothing was run\n"
    assert not (tmp_path / "out").exists()


def test_the_tests_report_is_read(tmp_path):
    (tmp_path / "correctness.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">'
        '<testcase classname="a" name="b"><failure/></testcase><testcase classname="a" name="c"/>'
        "</testsuite></testsuites>"
    )
    counts = gpu_suite.test_counts(tmp_path)
    assert counts == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "seconds": 2.5, "failed": ["a::b"]}
