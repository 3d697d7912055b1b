"""Every Triton kernel compiles ahead of time for GPUs that are not there, without spilling."""

import os
import subprocess
import sys

import pytest

from lpmrf_kernels import _triton, compile_report, registry

pytestmark = pytest.mark.skipif(_triton.MISSING is not None, reason=str(_triton.MISSING))


@pytest.mark.parametrize("target", compile_report.TARGETS)
def test_compiles_without_spilling(target):
    results = compile_report.compile_report([target])
    assert {result.op for result in results} == {op.name for op in registry.OPS.values() if op.compile_cases()}
    for result in results:
        assert result.error is None, str(result)
        assert result.stack == result.local == 0 and 0 < result.registers < 255, str(result)
        assert result.shared <= 48 * 1024, str(result)


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
    first, *others = compile_report.compile_report(["sm_90"], ["euler_step"])
    assert "the compiler died" in first.error and "assertion failed" in first.error
    assert len(others) == 5 and all(result.registers == 9 and result.error is None for result in others)


def test_refuses():
    with pytest.raises(ValueError, match="a target such as sm_90 or gfx942, got 'h100'"):
        compile_report.compile_report(["h100"])
    with pytest.raises(ValueError, match="no op is called 'nothing'"):
        compile_report.compile_report(ops=["nothing"])


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
