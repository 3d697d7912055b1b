"""Which backend serves which op, and why another does not.

Three backends: `triton` (CUDA tensors; CPU tensors under the interpreter, when forced), `cpp` (CPU tensors, built
from csrc/) and `torch` (the reference, everywhere). Who wins: `use_backend(name)`, over the environment variable
LPMRF_BACKEND, over the automatic choice by device. Both take effect per call, so they also reach code that was
compiled or exported before.

A detour is never silent. When the automatic choice passes over the device's own backend, because it is not there or
because it does not take these tensors, `fallbacks()` counts it and the log says so once; LPMRF_STRICT=1 makes it a
RuntimeError. A backend that was asked for by name and cannot serve raises RuntimeError with its reason.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from . import _triton

BACKENDS = ("triton", "cpp", "torch")
AUTOMATIC = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}  # other devices: the reference

_log = logging.getLogger("lpmrf_kernels")


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an op."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args: None
    """The reason why it does not take these arguments, None if it does. Name dtypes, not sizes: reasons are counted."""


@dataclass(frozen=True)
class CompileCase:
    """One ahead-of-time compilation of a Triton kernel: what `compile_report` tries on every target.

    The tile sizes are the heuristic's defaults at the real shapes. Pointers are taken to be 16-byte aligned.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    divisible: Collection[str] = ()
    """Integers that a launch sees to be multiples of 16: loads are then as wide as they really are."""
    aligned: bool = False
    """All integers are."""
    num_stages: int | None = None
    """None: Triton's own default."""
    config: str | None = None
    """The name that the launcher gives to `launch_config`, None: the op's."""
    raced: bool = False
    """Whether `tune` races the launch's candidates on such inputs: the report compiles them upon this case."""


@dataclass(frozen=True)
class Op:
    """What the registry knows of an op. The first argument of every implementation is a tensor: its device decides."""

    name: str
    forward: Mapping[str, Kernel]
    backward: Mapping[str, Kernel] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """"forward" and "backward" → why the reference, or plain PyTorch, is the only one there."""
    compile_cases: Callable[[], list[CompileCase]] = list
    candidates: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)
    """Name given to `launch_config` → the choices that `tune` times in its place, each with the heuristic's keys."""
    tune_inputs: Callable[[torch.device], Iterable[tuple]] = lambda device: ()
    """Arguments of `torch.ops.lpmrf.<name>` at the pipeline's shapes; one that requires grad times the backward too."""
    race: Callable[[torch.device, Callable], dict[str, list[dict[str, int]]]] = lambda device, measure: {}
    """(device, measure(function) → seconds) → further rows of the GPU's table, by name, for `tune` to write."""
    served: "Callable[[str, str], Served] | None" = None
    """(direction, device) → its line of `backends()`, for an op that chooses for itself."""

    def __post_init__(self):
        assert "torch" in self.forward, f"{self.name} has no reference"
        assert set(self.forward) | set(self.backward) <= set(BACKENDS), f"{self.name} names an unknown backend"


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    assert op.name not in OPS, f"{op.name} is registered twice"
    OPS[op.name] = op
    return op


# ---- choosing

_forced: ContextVar[str | None] = ContextVar("lpmrf_backend", default=None)
_fallbacks: Counter[tuple[str, str, str]] = Counter()
_lock = Lock()


@contextmanager
def use_backend(name: str):
    """Serve every op called inside by this backend: "triton", "cpp", "torch", or "auto" to undo an outer choice.

    Goes with the thread or task that entered it. Raises ValueError for another name; an op that the backend cannot
    serve raises RuntimeError when it is called. Ops without any kernel (see `backends()`) are always the reference's.
    """
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str, who: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{who}: no backend is called {name!r}; there are {', '.join(BACKENDS)} and auto")
    return name


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or else by LPMRF_BACKEND; None when the device decides."""
    name = _forced.get() or _known(os.environ.get("LPMRF_BACKEND") or "auto", "LPMRF_BACKEND")
    return None if name == "auto" else name


def strict() -> bool:
    """Whether LPMRF_STRICT forbids fallbacks."""
    return os.environ.get("LPMRF_STRICT", "").lower() not in ("", "0", "false", "no", "off")


@cache
def cpp_missing() -> str | None:
    """Load the C++ kernels, once; the reason why they are not there, None if they are."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the C++ kernels are not built (install with a compiler, torch and --no-build-isolation)"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels do not load ({error})"
    return None


def unavailable(backend: str, device: str) -> str | None:
    """Why this machine's `backend` serves no tensors on this type of device; None if it does."""
    if backend == "triton":
        if _triton.MISSING:
            return _triton.MISSING
        if device != "cuda" and not (device == "cpu" and _triton.INTERPRETED):
            return f"Triton serves CUDA tensors, not {device} (its interpreter: TRITON_INTERPRET=1 before the import)"
    elif backend == "cpp":
        return cpp_missing() if device == "cpu" else f"the C++ kernels serve CPU tensors, not {device}"
    return None


def choose(name: str, *args, direction: str = "forward") -> str:
    """The backend that serves this op with these arguments. Raises RuntimeError where the module's docstring says."""
    kernels = getattr(OPS[name], direction)
    device = args[0].device.type
    asked = forced_backend()
    for backend in (asked,) if asked else AUTOMATIC.get(device, ("torch",)):
        if backend in kernels:
            reason = unavailable(backend, device) or kernels[backend].refuses(*args)
        else:
            reason = f"it has no {direction} of this op"
        if reason is None:
            return backend
        if asked:
            raise RuntimeError(f"{name}: the backend {backend!r} was asked for and cannot serve: {reason}")
        _fell_back(name, backend, reason)
    raise AssertionError(f"{name}: the reference refused")


def backend_of_backward(name: str, *args) -> str:
    """For an op whose forward takes `args`: the forward's backend if it has a backward, else the reference."""
    backend = choose(name, *args)
    return backend if backend in OPS[name].backward else "torch"


def run(name: str, *args, direction: str = "forward"):
    """Call the op's implementation in the backend that `choose` names."""
    return getattr(OPS[name], direction)[choose(name, *args, direction=direction)].run(*args)


def _fell_back(name: str, backend: str, reason: str) -> None:
    if strict():
        raise RuntimeError(f"{name}: LPMRF_STRICT forbids the reference in place of {backend!r}: {reason}")
    with _lock:
        _fallbacks[name, backend, reason] += 1
        first = _fallbacks[name, backend, reason] == 1
    if first:
        # An install without a compiler is a supported one: said, but not as a warning at every start.
        level = logging.INFO if reason == cpp_missing() else logging.WARNING
        _log.log(level, "%s: served by the reference instead of %s: %s", name, backend, reason)


def fallbacks() -> dict[tuple[str, str, str], int]:
    """How often the reference stood in: (op, backend passed over, reason) → calls of this process."""
    with _lock:
        return dict(_fallbacks)


# ---- reporting


@dataclass(frozen=True)
class Served:
    """One line of `backends()`: `backend` serves the op's `direction` on `device`, None if nobody can."""

    op: str
    direction: str
    device: str
    backend: str | None
    why_not: Mapping[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.why_not.items())
        return f"{self.op} {self.direction} on {self.device}: {self.backend or 'nobody'} ({others})"


def backends(device: str | None = None) -> list[Served]:
    """Forward and backward of each op: which backend serves it on `device`, and why each other one does not.

    `device` is a device type ("cpu", "cuda"); None lists those of this machine. An op may still go to the reference
    for a dtype or shape that its kernel does not take: its docstring has the rule, `fallbacks()` has the count.
    """
    devices = [device] if device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [_served(op, way, d) for d in devices for op in OPS.values() for way in ("forward", "backward")]


def _served(op: Op, direction: str, device: str) -> Served:
    if op.served:
        return op.served(direction, device)
    kernels = {"torch": None, **getattr(op, direction)}  # without a kernel, PyTorch computes it
    asked = forced_backend() if len(kernels) > 1 else None
    order = AUTOMATIC.get(device, ("torch",))
    why_not = {}
    for backend in BACKENDS:
        if backend not in kernels:
            why_not[backend] = op.notes.get(direction, f"it has no {direction} of this op")
        elif reason := unavailable(backend, device):
            why_not[backend] = reason
        elif asked and backend != asked:
            why_not[backend] = f"{asked} was asked for"
        elif not asked and backend not in order:
            why_not[backend] = f"it serves {device} only when it is asked for"
    able = [b for b in (order if not asked else BACKENDS) if b not in why_not]
    why_not.update((b, f"{able[0]} comes first") for b in able[1:])
    return Served(op.name, direction, device, able[0] if able else None, why_not)
