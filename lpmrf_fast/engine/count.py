"""What a plan costs, before anything runs: FLOPs, bytes moved and memory of each stage, counted on the meta device.

Its tensors have shapes, dtypes and strides and no data, so that a plan for a GPU is counted on a machine without one.
A multiplication and an addition are two FLOPs. Bytes are what each operation reads and writes if it goes through
memory once; views cost nothing. Memory is the most that lives at once beside the weights, without the work space that
libraries take. An engine on a CPU runs every photo by itself, as many at once as there are threads: so it is counted.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .plan import Plan
from .prepare import replica
from .region import Buffers, Region

WORKSPACE = {"cpu": 2.5, "other": 1.15}
"""Memory is taken to be this much more than counted: libraries' work space, and blocks that do not fit together.

On a CPU a process was measured to take 1.4 to 2.5 times as much, with `memory.keep_blocks`, small and full-size
networks, while the sum of its tensors was as counted: glibc 2.36 hardly ever finds an aligned block among freed ones of
its size. On GPUs not measured yet.
"""


@dataclass
class Cost:
    """Of one stage."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes read and written."""
    launches: float = 0.0
    peak: float = 0.0
    """Bytes of activations at once."""


@dataclass(frozen=True)
class Estimate:
    """What a plan is predicted to take; printing it shows a table."""

    plan: Plan
    stages: dict[str, Cost]
    weights: int
    """Bytes of parameters and buffers."""

    @property
    def counted(self) -> float:
        """Bytes of tensors at once beside the weights."""
        return max(cost.peak for cost in self.stages.values())

    @property
    def peak(self) -> int:
        """Bytes of memory beside the weights, work space included."""
        kind = torch.device(self.plan.device).type
        return int(WORKSPACE.get(kind, WORKSPACE["other"]) * self.counted)

    @property
    def memory(self) -> int:
        return self.weights + self.peak

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.stages.values())

    @property
    def moved(self) -> float:
        return sum(cost.moved for cost in self.stages.values())

    def __str__(self) -> str:
        rows = [("stage", "GFLOP", "GB moved", "operations", "memory GB")]
        total = Cost(self.flops, self.moved, sum(c.launches for c in self.stages.values()), self.counted)
        for name, c in {**self.stages, "total": total}.items():
            rows.append((name, f"{c.flops / 1e9:,.1f}", f"{c.moved / 1e9:,.2f}", f"{c.launches:,.0f}"))
            rows[-1] += (f"{c.peak / 1e9:,.2f}",)
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join([r[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(r[1:], widths[1:]))]) for r in rows]
        lines.append(f"memory: {self.weights / 1e9:.2f} GB of weights and about {self.peak / 1e9:.2f} GB beside them")
        return "\n".join([str(self.plan), *lines])


def estimate(pipeline, plan: Plan) -> Estimate:
    """Count a plan; `pipeline` may be on another device, its networks are only looked at."""
    counter = Counter()
    device = torch.device("meta")
    with torch.no_grad(), counter:
        stages = replica(pipeline, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))
        tensors = [t for n in stages.modules.values() for t in (*n.parameters(), *n.buffers())]
        weights = sum(t.nbytes for t in tensors)
        counter.leave_out(tensors)  # a view of a weight is no activation
        runs = plan.batch if plan.mode == "eager" and torch.device(plan.device).type == "cpu" else 1
        together = min(runs, torch.get_num_threads())
        one = replace(plan, batch=plan.batch // runs, steps=1)  # every step costs the same
        buffers = Buffers(one, device, stages.state_dtype)
        counter.started = True
        (segment,) = Region(stages, counter.stage).segments(one, buffers)
        segment.run()
    counter.stages.pop("tables", None)  # made once, not with every batch
    for name, cost in counter.stages.items():
        times = runs * ((plan.steps or 1) if name == "velocity" else 1)
        cost.flops, cost.moved, cost.launches = (x * times for x in (cost.flops, cost.moved, cost.launches))
        cost.peak = together * cost.peak + (runs - together) * buffers.bytes
    if plan.steps != 1:
        name = "velocity, a step" if plan.steps is None else f"velocity, {plan.steps} steps"
        counter.stages = {(name if key == "velocity" else key): cost for key, cost in counter.stages.items()}
    return Estimate(plan, counter.stages, weights)


# ---- counting

FREE = {"empty", "empty_strided", "empty_like", "new_empty", "lift_fresh", "detach", "device"}


def _attention(args, out) -> float:
    q, k = args[:2]  # (B, heads, L, D)
    return 4 * q.numel() * k.shape[-2]


def _neighborhood(args, out) -> float:
    return 4 * args[0].numel() * args[3] ** 2  # q, k, v (B, H, W, heads, D), kernel_size


def _window(args, out) -> float:
    return 4 * out.numel() * args[2] ** 2  # qkv (B, H, W, 3C), bias, window_size


def _depthwise(args, out) -> float:
    weights = [a for a in args[1:4] if isinstance(a, Tensor) and a.dim() == 4]  # without one there is no convolution
    return sum(2 * args[0].numel() * w[0].numel() for w in weights)


FLOPS: dict[str, Callable] = {
    "attention": _attention,
    "neighborhood_attention_2d": _neighborhood,
    "window_attention": _window,
    "dwconv_rope_qkv": _depthwise,
    "dwconv_geglu": _depthwise,
}
"""Ops of lpmrf_kernels that multiply: name → FLOPs of (args, out). The others are bound by memory."""


class Counter(TorchDispatchMode):
    """Adds up what the operations inside cost, by stage."""

    def __init__(self):
        super().__init__()
        self.stages: dict[str, Cost] = {}
        self.started = False
        self._cost = Cost()
        self._live = 0
        self._known = set()

    @contextmanager
    def stage(self, name: str):
        self._cost = self.stages.setdefault(name, Cost())
        self._cost.peak = max(self._cost.peak, self._live)
        yield
        self._cost = Cost()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.started:
            return out
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outs:
            self._track(tensor.untyped_storage())
        packet = func.overloadpacket
        name = packet.__name__
        if outs and not func.is_view and name not in FREE:
            ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if name == "_unsafe_view" or (name in ("_to_copy", "clone") and outs[0] is ins[0]):
                return out
            self._cost.launches += 1
            self._cost.moved += sum(t.nbytes for t in {id(t): t for t in (*ins, *outs)}.values())
            if func.namespace == "lpmrf":
                self._cost.flops += FLOPS.get(name, lambda *_: 0)(args, out)
            elif packet in flop_registry:
                self._cost.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out

    def leave_out(self, tensors) -> None:
        """Their memory is not counted, nor that of views of them."""
        self._known.update(t.untyped_storage()._cdata for t in tensors)

    def _track(self, storage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = storage.nbytes()
            self._live += size
            self._cost.peak = max(self._cost.peak, self._live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
