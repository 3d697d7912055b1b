"""CUDA graphs of an engine: one memory pool, a budget, least recently used ones go first.

Graphs of one pool use the same memory for what lives inside a replay, which is safe because an engine's replays are
serial; what goes in and out lies outside. A pool gives memory back only as a whole: `clear`.
"""

import ctypes
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .memory import is_out_of_memory
from .plan import Plan

log = logging.getLogger("lpmrf_fast.engine")
WARM_UPS = 2
_capturing = threading.RLock()
"""One capture at a time in a process: it empties caches, and the choice of algorithms is the process's."""


class OverBudget(MemoryError):
    """A graph that alone takes more than the budget."""


class CaptureError(RuntimeError):
    """A region that cannot be captured, in strict mode; one line."""


@dataclass
class Captured:
    """The graphs of one plan, one a segment, and what they took."""

    plan: Plan
    replays: list[Callable[[], None]]
    seconds: float
    """Warm-up and capture."""
    pool_bytes: int
    """What the shared pool grew by."""
    bytes: int
    """What the graphs take beside it."""
    nodes: int | None
    """Kernels, copies and so on in one replay of each graph; None where CUDA does not tell."""

    def __str__(self) -> str:
        nodes = "" if self.nodes is None else f", {self.nodes} nodes"
        size = (self.pool_bytes + self.bytes) / 1e6
        return f"captured in {self.seconds:.2f} s, {size:.0f} MB{nodes}: {str(self.plan).splitlines()[0]}"


class Graphs:
    """Plan → its captured graphs.

    device: what captures, see `CudaDevice`. budget: bytes that graphs and pool may take, None: as many as there are.
    strict: a capture that fails raises CaptureError; otherwise it is logged once and `capture` returns None.
    """

    def __init__(self, device, budget: int | None = None, strict: bool = False):
        self.device, self.budget, self.strict = device, budget, strict
        self.failures: dict[Plan, str] = {}
        self.reports: list[Captured] = []
        """Every capture there was, in order, without their graphs."""
        self._held: OrderedDict[Plan, Captured] = OrderedDict()
        self._pool, self._pool_bytes = None, 0

    @property
    def plans(self) -> list[Plan]:
        """Those captured, least recently used first."""
        return list(self._held)

    @property
    def bytes(self) -> int:
        return self._pool_bytes + sum(captured.bytes for captured in self._held.values())

    def get(self, plan: Plan) -> Captured | None:
        captured = self._held.get(plan)
        if captured is not None:
            self._held.move_to_end(plan)
        return captured

    def capture(self, plan: Plan, runs: Sequence[Callable[[], None]]) -> Captured | None:
        """Capture each of `runs`; graphs of other plans go if the budget asks for it. None: it cannot be captured.

        Raises CaptureError in strict mode, OverBudget or PyTorch's own error where memory is too small; all graphs
        and their pool are then gone.
        """
        if plan in self.failures:
            return self._failed(plan, self.failures[plan])
        try:
            captured = self._captured(plan, runs)
            while self._over() and len(self._held) > 1:
                self._held.popitem(last=False)
            if self._over() and self._pool_bytes > captured.pool_bytes:  # grown by graphs that are gone
                self.clear()
                captured = self._captured(plan, runs)
            if self._over():
                raise OverBudget(f"a graph takes {self.bytes / 1e9:.2f} GB of {self.budget / 1e9:.2f} GB out of memory")
        except Exception as error:
            self._held.pop(plan, None)
            if is_out_of_memory(error):
                self.clear()
                raise
            return self._failed(plan, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return captured

    def drop(self, plan: Plan) -> None:
        """Forget a plan's graphs, if any. The pool keeps their memory for the others."""
        self._held.pop(plan, None)

    def clear(self) -> None:
        """Drop all graphs and give the pool's memory back."""
        self._held.clear()
        self._pool, self._pool_bytes = None, 0
        self.device.release()

    def _captured(self, plan: Plan, runs) -> Captured:
        if self._pool is None:
            self._pool = self.device.new_pool()
        started = time.perf_counter()
        replays, nodes, pool, other = self.device.capture(runs, self._pool, plan)
        captured = Captured(plan, replays, time.perf_counter() - started, pool, other, nodes)
        self._pool_bytes += pool
        self._held[plan] = captured
        self.reports.append(Captured(plan, [], captured.seconds, pool, other, nodes))
        log.info("%s", captured)
        return captured

    def _over(self) -> bool:
        return self.budget is not None and self.bytes > self.budget

    def _failed(self, plan: Plan, reason: str) -> None:
        if self.strict:
            raise CaptureError(f"this plan cannot be captured: {reason} ({str(plan).splitlines()[0]})")
        if reason not in self.failures.values():
            log.warning("runs without a CUDA graph: %s", reason)
        self.failures[plan] = reason
        return None


class CudaDevice:
    """What captures on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def new_pool(self):
        with torch.cuda.device(self.device):
            return torch.cuda.graph_pool_handle()

    def release(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def capture(self, runs, pool, plan: Plan):
        """→ (replays, nodes, bytes that the pool grew by, bytes beside it).

        Warms up and captures on a stream of its own; other threads may go on working meanwhile. Convolutions try
        their algorithms in the warm-up, unless the plan is deterministic.
        """
        with torch.cuda.device(self.device), algorithms(plan.deterministic):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    for run in runs:
                        run()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
            graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in runs]
            for graph, run in zip(graphs, runs):
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    run()
            nodes = [_nodes(graph) for graph in graphs]
            for graph in graphs:
                graph.instantiate()
            torch.cuda.synchronize()
            grown = torch.cuda.memory_reserved() - reserved
            beside = max(0, free - torch.cuda.mem_get_info()[0] - grown)
            torch.cuda.current_stream().wait_stream(stream)
            return [g.replay for g in graphs], None if None in nodes else sum(nodes), max(0, grown), beside


@contextmanager
def algorithms(deterministic: bool):
    """cuDNN's choice of algorithms: fixed ones, or the fastest of those that it tries. For one thread at a time."""
    cudnn = torch.backends.cudnn
    with _capturing:
        before = cudnn.benchmark, cudnn.deterministic
        cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before


def _nodes(graph) -> int | None:
    """Nodes of a captured graph, by the CUDA runtime that PyTorch has loaded."""
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        count = ctypes.c_size_t()
        failed = runtime.cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return None if failed else count.value
