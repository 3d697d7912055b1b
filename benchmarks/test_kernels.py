"""The cases of kernels.py under pytest-benchmark: its statistics, its comparison of saved runs.

    pytest benchmarks --benchmark-group-by=param:case --benchmark-autosave --benchmark-compare

One call a round, on a GPU a CUDA graph of it, waited for. `python -m benchmarks.kernels` checks values and writes the
recorded rows; on a shared CPU only its ratios, taken in turns, mean something.
"""

import pytest
import torch

from .cases import CASES, Maker
from .kernels import BATCH, providers

pytest.importorskip("pytest_benchmark")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
PROVIDERS = {"cpu": ("eager", "ours torch", "ours cpp"), "cuda": ("eager", "compile", "ours torch", "ours triton")}


@pytest.mark.parametrize(("device", "provider"), [(d, p) for d in DEVICES for p in PROVIDERS[d]])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(benchmark, case, device, provider):
    function = providers(case, device, compiled=provider == "compile")[provider]
    if isinstance(function, str):
        pytest.skip(function)
    arguments = case.inputs(Maker(device, torch.bfloat16, BATCH[device]))
    with torch.no_grad():
        function(*arguments)
        call = (lambda: function(*arguments)) if device == "cpu" else replay(lambda: function(*arguments))
        benchmark.pedantic(call, rounds=7, warmup_rounds=2)


def replay(function):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def call():
        graph.replay()
        torch.cuda.synchronize()

    return call
