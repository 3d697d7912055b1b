"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is imported. Where another test was first, test_interpreter.py starts a
process of its own, so that no order of the tests leaves the kernels out.
"""

import importlib
import os
import sys
from dataclasses import dataclass

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import lpmrf_kernels
from lpmrf_kernels import registry


@dataclass(frozen=True)
class Place:
    """A device and the backend that serves it."""

    device: str
    backend: str

    def __str__(self):
        return f"{self.device}-{self.backend}"

    def __enter__(self):
        self.__dict__["context"] = lpmrf_kernels.use_backend(self.backend)
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)


PLACES = [Place(*names.split("-")) for names in ("cpu-torch", "cpu-cpp", "cpu-triton", "cuda-torch", "cuda-triton")]


def _place(device, backend):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := registry.unavailable(backend, device):
        pytest.skip(reason)
    return Place(device, backend)


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    """Every device and backend; `with place:` forces it. Skips with the reason where it is not available."""
    return _place(request.param.device, request.param.backend)


@pytest.fixture
def interpreted():
    """The Triton kernels on CPU tensors."""
    return _place("cpu", "triton")


@pytest.fixture
def poisoned_memory():
    """`torch.empty` returns NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """The environment forces nothing, whatever the shell that runs the tests has set."""
    monkeypatch.delenv("LPMRF_BACKEND", raising=False)
    monkeypatch.delenv("LPMRF_ATTENTION", raising=False)
    monkeypatch.delenv("LPMRF_STRICT", raising=False)


@pytest.fixture
def module_of():
    """op name → its module; the package's attribute of that name is the public function."""
    return lambda op: importlib.import_module(f"lpmrf_kernels.{op}")
