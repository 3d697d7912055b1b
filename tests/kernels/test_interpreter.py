"""The Triton kernels are tested without a GPU too, whatever ran first in this process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lpmrf_kernels import _triton


def test_kernels_under_the_interpreter():
    if _triton.MISSING:
        pytest.skip(_triton.MISSING)
    if _triton.INTERPRETED:
        pytest.skip("the tests of this process run them")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(Path(__file__).parent),
            "-k",
            "cpu-triton or wrong or triton_really",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
