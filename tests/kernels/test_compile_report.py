"""The compile report: kernels compile ahead of time for GPUs that are not there, and what must not ship fails.

One kernel for one target here; `.ci/run` compiles all of them.
"""

import json
import os
import subprocess
import sys

import pytest

from lpmrf_kernels import _triton, compile_report
from lpmrf_kernels.compile_report import Compiled, cases_of
from lpmrf_kernels.registry import OPS

pytestmark = pytest.mark.skipif(_triton.MISSING is not None, reason=str(_triton.MISSING))


def test_compiles_without_spilling():
    results = compile_report.compile_report(["sm_90"], ["euler_step"], "bf16")
    assert [result.label for result in results] == ["bf16 v, flat", "bf16 v, strided"]
    for result in results:
        assert result.fault is None, str(result)
        assert result.stack == 0 and 0 < result.registers < 255 and result.seconds > 0, str(result)


def test_every_op_has_labels_of_its_own():
    for op in OPS.values():
        labels = [case.label for case in op.compile_cases()]
        assert len(set(labels)) == len(labels), op.name


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Compiled("op", "x", "sm_90", error="CompilationError"), "CompilationError"),
        (Compiled("op", "x", "sm_90", registers=255, stack=8, shared=0), "stack frame, this one has 8 B"),
        (Compiled("op", "x", "sm_86", 32, 0, 100 * 1024), "102400 B of shared memory, sm_86 has 101376"),
        (Compiled("op", "x; ACME BLOCK=1", "gfx942", 32, 0, 65 * 1024), "gfx942 has 65536"),
        (Compiled("op", "x; ACME BLOCK=1", "sm_90", 32, 8, 100 * 1024), None),
        (Compiled("op", "x; candidate BLOCK=1", "sm_90", 32, 8, 0), "a candidate must need no stack frame"),
        (Compiled("op", "x", "sm_80", 32, 0, 163 * 1024), None),
    ],
)
def test_what_must_not_ship(result, words):
    assert (result.fault is None) if words is None else (words in result.fault and "FAILS" in str(result))


def test_rows_of_shipped_tables_are_cases_of_their_target(monkeypatch, tmp_path):
    rows = [{"numel": 9, "BLOCK": 512, "num_warps": 2}, {"numel": 9, "TILE": 512, "num_warps": 2}]
    (tmp_path / "ACME.json").write_text(json.dumps({"target": "sm_89", "euler_step": rows}))
    monkeypatch.setattr(compile_report, "CONFIGS", tmp_path)
    plain, tuned = (cases_of(OPS["euler_step"], target) for target in ("sm_80", "sm_89"))
    assert len(plain) == 6 and len(tuned) == 12  # an older kernel's TILE is passed over, as launch_config does
    case = tuned["bf16 v, flat; ACME BLOCK=512 num_warps=2"]
    assert case.constexprs == {"FLAT": True, "BLOCK": 512} and case.num_warps == 2


def test_every_candidate_is_compiled_upon_a_case_of_its_launch():
    for op in OPS.values():
        raced = {case.config or op.name: case for case in op.compile_cases() if case.raced}
        labels = cases_of(op, "sm_90", candidates=True).keys() - cases_of(op, "sm_90").keys()
        for name, choices in op.candidates.items():
            assert name in raced, f"{op.name}: no case of the launch {name} is marked as raced"
            for choice in choices:
                text = f"{raced[name].label}; candidate {' '.join(f'{k}={n}' for k, n in choice.items())}"
                assert text in labels, text


def test_a_backward_is_not_compiled_with_its_forwards_rows(monkeypatch, tmp_path):
    row = {"hidden": 9, "ROWS": 4, "BLOCK_W": 8, "BLOCK_C": 64, "num_warps": 8}
    (tmp_path / "ACME.json").write_text(json.dumps({"target": "sm_89", "dwconv_geglu": [row]}))
    monkeypatch.setattr(compile_report, "CONFIGS", tmp_path)
    tuned = [label for label in cases_of(OPS["dwconv_geglu"], "sm_89") if "ACME" in label]
    assert len(tuned) == 3 and all(" forward; ACME" in label for label in tuned)


def test_a_compiler_that_dies_is_a_line_of_the_report(monkeypatch):
    run = subprocess.run
    calls = []

    def dies_first(command, **arguments):
        calls.append(command)
        code = "import os; os.write(2, b'assertion failed'); os.abort()"
        return run([sys.executable, "-c", code] if len(calls) == 1 else [sys.executable, "-c", echo], **arguments)

    echo = """
import json, sys
for op, label in json.load(sys.stdin):
    print(json.dumps({"op": op, "label": label, "target": "sm_90", "registers": 9}))
"""
    monkeypatch.setattr(subprocess, "run", dies_first)
    first, *others = compile_report.compile_report(["sm_90"], ["euler_step"], jobs=1)
    assert "the compiler died" in first.error and "assertion failed" in first.error
    assert len(others) == 5 and all(result.registers == 9 and result.error is None for result in others)


def test_refuses():
    with pytest.raises(ValueError, match="a target such as sm_90 or gfx942, got 'h100'"):
        compile_report.compile_report(["h100"])
    with pytest.raises(ValueError, match="no op is called 'nothing'"):
        compile_report.compile_report(ops=["nothing"])


@pytest.mark.parametrize(
    ("results", "status"), [([Compiled("op", "x", "sm_90", 9, 0, 0)], 0), ([Compiled("op", "x", "sm_90", 9, 8, 0)], 1)]
)
def test_exit_status(monkeypatch, capsys, results, status):
    monkeypatch.setattr(compile_report, "compile_report", lambda *_: results)
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    assert compile_report.main() == status
    assert f"1 compilations in 0 s, {status} faults" in capsys.readouterr().out


def test_command_line_says_what_is_wrong():
    package = os.path.dirname(os.path.dirname(compile_report.__file__))
    result = subprocess.run(
        [sys.executable, "-m", "lpmrf_kernels.compile_report", "--targets", "h100"],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "got 'h100'" in result.stderr and "Traceback" not in result.stderr
