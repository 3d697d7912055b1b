"""Times launch choices on this GPU and writes the winners to the user's table, where `launch_config` finds them.

    lpmrf-fast tune [--op euler_step]

An op takes part when it names `candidates` and `tune_inputs` (see `registry.Op`). The op is run at each of these
inputs while its calls of `launch_config` are watched, which tells the sizes that a row of the table needs; then each
candidate answers in the heuristic's place. One that does not launch, or whose result differs from the heuristic's, is
out; the others are timed inside CUDA graphs, the heuristic's choice among them, and the fastest becomes a row.
"""

import json
import logging
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import launch
from .registry import OPS, Op, unavailable, use_backend

_log = logging.getLogger("lpmrf_kernels")

Config = dict[str, int]


@dataclass(frozen=True)
class Tuned:
    """One row for the table: the choice that won for the launch `name` at these sizes."""

    name: str
    sizes: Config
    choice: Config
    seconds: float
    default_seconds: float

    def __str__(self) -> str:
        sizes, choice = (" ".join(f"{k}={n}" for k, n in x.items()) for x in (self.sizes, self.choice))
        gain = self.default_seconds / self.seconds
        return f"{self.name} at {sizes}: {choice}, {self.seconds * 1e6:.1f} us, {gain:.2f}x the heuristic's choice"


def missing() -> str | None:
    """Why nothing can be tuned here, None if it can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; launch choices are for CUDA kernels"
    return unavailable("triton", "cuda")


def tune(ops=None, device: str = "cuda", log: Callable[[str], None] = _log.info) -> Path:
    """Tune these ops (None: all that have candidates) on this GPU and write the user's table; returns its path.

    Rows of other launches that the table has already stay, and every op is written as soon as it is done. Raises
    RuntimeError without a GPU, ValueError for an unknown op.
    """
    if reason := missing():
        raise RuntimeError(f"tune: {reason}")
    for op in ops or ():
        if op not in OPS:
            raise ValueError(f"tune: no op is called {op!r}; there are {', '.join(OPS)}")
    device = torch.device(device)
    path = launch.user_folder() / launch.table_name(torch.cuda.get_device_name(device))
    major, minor = torch.cuda.get_device_capability(device)
    for op in OPS.values():
        if ops and op.name not in ops or not op.candidates:
            continue
        rows: dict[str, list[Config]] = {}
        for tuned in tune_op(op, device):
            rows.setdefault(tuned.name, []).append({**tuned.sizes, **tuned.choice})
            log(str(tuned))
        for name, raced in op.race(device, median_in_a_graph).items():
            rows[name] = raced
            log("\n".join(f"{name}: {row}" for row in raced))
        write(path, rows, f"sm_{major}{minor}")
    return path


def write(path: Path, rows: dict[str, list[Config]], target: str) -> Path:
    """Put these rows into the table at `path`, whole or not at all, in place of the same launches' older ones."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or a damaged one
        table = {}
    table = {**table, "target": target, **rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {_lines(value)}" for name, value in sorted(table.items()))
    partial = path.with_suffix(".partial")
    partial.write_text(f"{{\n{lines}\n}}\n")
    partial.replace(path)
    launch.forget_tables()
    return path


def _lines(value) -> str:
    return json.dumps(value) if isinstance(value, str) else "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]"


def tune_op(op: Op, device: torch.device, measure: Callable[[Callable], float] | None = None) -> list[Tuned]:
    """Race the candidates of one op, at each of its inputs and for each of its launches.

    measure(function) → seconds a call; by default the median inside a CUDA graph.
    """
    measure = measure or median_in_a_graph
    won: dict[tuple, Tuned] = {}
    for arguments in op.tune_inputs(device):
        call = _caller(op.name, arguments)
        with use_backend("triton"):
            launches, expected = _launches(call)
            for name, (default, sizes) in launches.items():
                candidates = [dict(c) for c in op.candidates.get(name, ()) if c.keys() == default.keys()]
                key = (name, *sizes.items())
                if not candidates or key in won:
                    continue
                times = {}
                for choice in [default] + [c for c in candidates if c != default]:
                    with _chosen(name, choice):
                        if choice is default or _gives(call, expected):
                            times[tuple(choice.items())] = measure(call)
                best = min(times, key=times.get)
                won[key] = Tuned(name, sizes, dict(best), times[best], times[tuple(default.items())])
    return list(won.values())


def _caller(name: str, arguments: tuple) -> Callable[[], list[Tensor]]:
    """The op at these arguments; with its backward where one of them requires grad."""
    op = getattr(torch.ops.lpmrf, name)
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

    def call():
        outputs = op(*arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if wanted:
            smooth = [y for y in outputs if y.requires_grad]
            outputs += torch.autograd.grad(smooth, wanted, [torch.ones_like(y) for y in smooth])
        return outputs

    return call


def _launches(call) -> tuple[dict[str, tuple[Config, Config]], list[Tensor]]:
    """What `call` asks of `launch_config`: name → (default, sizes); and what it returns."""
    seen = {}

    def watch(name, default, sizes):
        seen[name] = dict(default), dict(sizes)
        return default

    with launch.watched(watch):
        return seen, [y.clone() for y in call()]


@contextmanager
def _chosen(name: str, choice: Config):
    with launch.watched(lambda asked, default, sizes: choice if asked == name else default):
        yield


def _gives(call, expected: list[Tensor]) -> bool:
    try:
        results = call()
        if expected[0].is_cuda:
            torch.cuda.synchronize(expected[0].device)
    except Exception as error:  # too many registers or too much shared memory, in the compiler's own words
        _log.debug("a candidate is out: %s", error)
        return False
    return all(_close(y, e) for y, e in zip(results, expected, strict=True))


def _close(y: Tensor, expected: Tensor) -> bool:
    """Other tiles add in another order; wrong ones are far off. NaN equals NaN."""
    y, expected = (t.double().nan_to_num(nan=1e30) for t in (y, expected))
    scale = expected.abs().max() if expected.numel() else 0
    return bool(((y - expected).abs() <= 1e-2 * scale + 1e-6).all())


def median_in_a_graph(function: Callable) -> float:
    return statistics.median(seconds_in_a_graph(function))


def seconds_in_a_graph(function: Callable, calls: int = 10, replays: int = 15) -> list[float]:
    """Seconds of one call on the GPU, from `replays` replays of a CUDA graph with `calls` calls in it.

    No launch is waited for on the host, as in the pipeline's own graphs. Small inputs stay in the L2 cache, there too.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 / calls for a, b in zip(marks, marks[1:])]
