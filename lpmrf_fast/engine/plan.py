"""What runs, said once: a Plan is the key of everything that an engine captures, and it can be read."""

from dataclasses import dataclass

import torch

from lpmrf_kernels import backends, use_backend

from .. import flow

MODES = ("graph", "step", "eager")
"""graph: one CUDA graph from pixels to pixels. step: graphs of the first stages, of one Euler step, which is replayed
as often as asked, and of the last stage; steps may then vary freely. eager: none, as always on a CPU."""


@dataclass(frozen=True)
class Plan:
    """One bucket: `batch` padded photos of exactly height x width, and how they are restored."""

    batch: int
    height: int
    width: int
    steps: int | None
    """Euler steps; None where one captured step serves any number (mode "step")."""
    device: str
    dtypes: tuple[tuple[str, str], ...]
    """Network → dtype of its parameters."""
    mode: str = "eager"
    deterministic: bool = False
    layout: str = "channels_last"
    backends: tuple[tuple[str, str], ...] = ()
    """Op → backend that serves it here; a dtype or shape that it refuses still goes to the reference."""

    def __post_init__(self):
        for name in ("batch", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan: {name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None:
            flow.time_grid(self.steps)
        if self.mode not in MODES:
            raise ValueError(f"Plan: mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        steps = "any number of steps" if self.steps is None else f"{self.steps} step{'s' * (self.steps != 1)}"
        dtypes = {dtype for _, dtype in self.dtypes}
        served = {}
        for op, backend in self.backends:
            served.setdefault(backend, []).append(op)
        text = f"{self.batch} x {self.width}x{self.height}, {steps}, {'+'.join(sorted(dtypes))}, {self.layout},"
        text += f" {self.device}, {self.mode}{', deterministic' * self.deterministic}"
        return text + "".join(f"\n  {backend}: {', '.join(ops)}" for backend, ops in sorted(served.items()))


def resolved_backends(device: torch.device, forced: str | None) -> tuple[tuple[str, str], ...]:
    """Op → the backend that serves its forward on this kind of device."""
    with use_backend(forced or "auto"):
        served = backends(device.type)
    return tuple((s.op, s.backend) for s in served if s.direction == "forward" and s.backend)


def buckets(limit: int) -> list[int]:
    """The padded batch sizes below a limit: powers of two, and the limit itself."""
    return sorted({*(1 << i for i in range(limit.bit_length())), limit})


def bucket(count: int, limit: int) -> int:
    """The smallest bucket that holds `count` photos, count <= limit."""
    return next(size for size in buckets(limit) if size >= count)
