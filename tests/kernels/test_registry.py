"""Which backend serves an op: forcing, falling back, counting, refusing, and the report about it."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lpmrf_kernels import backends, euler_step, fallbacks, registry, use_backend

Z = torch.ones(1, 2, 3, 4)


@pytest.fixture
def toy(monkeypatch):
    """An op `toy` with a C++ and a torch backend; the C++ one is there and takes float32 only."""
    monkeypatch.setattr(registry, "OPS", {})
    monkeypatch.setattr(registry, "cpp_missing", lambda: None)
    monkeypatch.setattr(registry, "_fallbacks", registry.Counter())

    def refuses(x):
        return None if x.dtype == torch.float32 else f"takes float32 only, not {x.dtype}"

    return registry.register(
        registry.Op(
            "toy",
            forward={"cpp": registry.Kernel(lambda x: "cpp", refuses), "torch": registry.Kernel(lambda x: "torch")},
            backward={"torch": registry.Kernel(lambda g: "torch")},
            notes={"backward": "it is not worth a kernel"},
        )
    )


def test_the_device_decides(toy):
    assert registry.run("toy", Z) == "cpp"
    assert registry.run("toy", Z.to("meta")) == "torch"
    assert registry.fallbacks() == {}


def test_context_goes_before_environment_goes_before_automatic(toy, monkeypatch):
    monkeypatch.setenv("LPMRF_BACKEND", "torch")
    assert registry.run("toy", Z) == "torch"
    with use_backend("cpp"):
        assert registry.run("toy", Z) == "cpp"
        with use_backend("torch"):
            assert registry.run("toy", Z) == "torch"
        assert registry.run("toy", Z) == "cpp"
    assert registry.run("toy", Z) == "torch"
    with use_backend("auto"):
        assert registry.run("toy", Z) == "cpp"


def test_choice_ends_with_an_exception(toy):
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert registry.run("toy", Z) == "cpp"


def test_choice_stays_in_its_thread(toy):
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(registry.run("toy", Z)))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_a_fallback_is_counted_and_logged_once(toy, caplog):
    with caplog.at_level(logging.INFO, "lpmrf_kernels"):
        for _ in range(3):
            assert registry.run("toy", Z.double()) == "torch"
    assert registry.fallbacks() == {("toy", "cpp", "takes float32 only, not torch.float64"): 3}
    assert [r.getMessage() for r in caplog.records] == [
        "toy: served by the reference instead of cpp: takes float32 only, not torch.float64"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_an_install_without_cpp_is_no_warning(toy, caplog, monkeypatch):
    monkeypatch.setattr(registry, "cpp_missing", lambda: "not built")
    with caplog.at_level(logging.INFO, "lpmrf_kernels"):
        assert registry.run("toy", Z) == "torch"
    assert caplog.records[0].levelno == logging.INFO


@pytest.mark.parametrize("value", ["1", "true"])
def test_strict_forbids_fallbacks(toy, monkeypatch, value):
    monkeypatch.setenv("LPMRF_STRICT", value)
    assert registry.run("toy", Z) == "cpp"
    with pytest.raises(RuntimeError, match="toy: LPMRF_STRICT forbids the reference in place of 'cpp': takes float32"):
        registry.run("toy", Z.double())
    with use_backend("torch"):  # asked for by name, so no fallback
        assert registry.run("toy", Z.double()) == "torch"
    monkeypatch.setenv("LPMRF_STRICT", "0")
    assert registry.run("toy", Z.double()) == "torch"


def test_a_forced_backend_raises_with_its_reason(toy):
    with use_backend("cpp"):
        with pytest.raises(RuntimeError, match="'cpp' was asked for and cannot serve: takes float32 only"):
            registry.run("toy", Z.double())
        with pytest.raises(RuntimeError, match="the C\\+\\+ kernels serve CPU tensors, not meta"):
            registry.run("toy", Z.to("meta"))
        with pytest.raises(RuntimeError, match="it has no backward of this op"):
            registry.run("toy", Z, direction="backward")
    with use_backend("triton"), pytest.raises(RuntimeError, match="it has no forward of this op"):
        registry.run("toy", Z)


def test_an_unknown_backend_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no backend is called 'cuda'; there are triton, cpp, torch and auto"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv("LPMRF_BACKEND", "fast")
    with pytest.raises(ValueError, match="LPMRF_BACKEND: no backend is called 'fast'"):
        euler_step(Z, Z, 1.0)


def test_the_environment_reaches_the_ops(monkeypatch):
    monkeypatch.setattr(registry, "cpp_missing", lambda: "not built")
    monkeypatch.setenv("LPMRF_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="euler_step: the backend 'cpp' was asked for and cannot serve: not built"):
        euler_step(Z, Z, 1.0)
    monkeypatch.setenv("LPMRF_BACKEND", "torch")
    assert torch.equal(euler_step(Z, Z, 1.0), Z * 2)


def test_triton_serves_cpu_tensors_in_the_interpreter_only(monkeypatch):
    monkeypatch.setattr(registry._triton, "MISSING", None)
    monkeypatch.setattr(registry._triton, "INTERPRETED", False)
    assert "Triton serves CUDA tensors, not cpu" in registry.unavailable("triton", "cpu")
    assert registry.unavailable("triton", "cuda") is None
    monkeypatch.setattr(registry._triton, "INTERPRETED", True)
    assert registry.unavailable("triton", "cpu") is None
    monkeypatch.setattr(registry._triton, "MISSING", "triton cannot be imported")
    assert registry.unavailable("triton", "cuda") == "triton cannot be imported"


# ---- the report


def test_backends_lists_every_op_both_ways():
    rows = {(row.op, row.direction) for row in backends("cpu")}
    assert rows == {(op, way) for op in registry.OPS for way in ("forward", "backward")}
    for row in backends("cpu") + backends("cuda"):
        if row.op != "attention":  # it has providers of its own
            assert row.backend and set(row.why_not) == {"triton", "cpp", "torch"} - {row.backend}
        assert all(row.why_not.values())


def test_backends_says_who_serves_and_why_not_another(toy, monkeypatch):
    forward, backward = backends("cpu")
    assert str(forward) == (
        "toy forward on cpu: cpp (not triton: it has no forward of this op; not torch: cpp comes first)"
    )
    assert backward.backend == "torch" and backward.why_not["cpp"] == "it is not worth a kernel"
    monkeypatch.setattr(registry, "cpp_missing", lambda: "not built")
    assert backends("cpu")[0].backend == "torch" and backends("cpu")[0].why_not["cpp"] == "not built"
    with use_backend("cpp"):
        assert backends("cpu")[0].backend is None and "nobody" in str(backends("cpu")[0])
        assert backends("cpu")[0].why_not["torch"] == "cpp was asked for"


def test_backends_agrees_with_what_runs():
    for row in backends("cpu"):
        if row.op == "euler_step" and row.direction == "forward":
            assert row.backend == registry.choose("euler_step", Z, Z, 1.0)


def test_fallbacks_is_a_copy():
    fallbacks()["x"] = 1
    assert "x" not in fallbacks()


# ---- without triton


def test_everything_imports_and_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, lpmrf_kernels as kernels
z = torch.ones(1, 2, 3, 4)
assert torch.equal(kernels.euler_step(z, z, 1.0), z * 2)
assert kernels.add_source_noise(z, 0.0, torch.tensor([1])).equal(z)
print(*kernels.backends("cuda"), sep="\\n")
with kernels.use_backend("triton"):
    try:
        kernels.euler_step(z, z, 1.0)
    except RuntimeError as error:
        print(error)
"""
    package = Path(registry.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "euler_step forward on cuda: torch (not triton: triton cannot be imported" in result.stdout
    assert "'triton' was asked for and cannot serve: triton cannot be imported" in result.stdout
