"""How fast is each op, beside PyTorch's own composition, torch.compile of it, and other libraries' kernels?

    python -m benchmarks.kernels --device cpu --out benchmarks/results/kernels-cpu.json
    python -m benchmarks.kernels --device cuda --ops layer_norm_2d attention --no-compile
    python -m benchmarks.kernels --device cpu --dtype fp32 --ops bias_silu --add --out kernels-cpu.json

Every provider's result is checked before the clock starts. Prints a table; the JSON has a row a provider, and the
machine. `README.md` says how to read a row. On a CPU only ratios within a run mean something: providers take turns, and
the allocator keeps freed memory, as in an engine.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lpmrf_kernels as ops
from lpmrf_fast.engine.memory import keep_blocks
from lpmrf_kernels import registry

from . import machine
from .cases import CASES, Case, Maker
from .timing import quantile, time_all

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = {"cpu": 1, "cuda": 8}


# ---- providers


def providers(case: Case, device: str, compiled: bool) -> dict[str, Callable | str]:
    """Name → callable of the case's arguments, or why it is absent."""
    kind = torch.device(device).type
    found: dict[str, Callable | str] = {"eager": case.eager}
    if compiled:
        found["compile"] = torch.compile(case.eager, dynamic=False)
    ours, op = case.function(), registry.OPS.get(case.op)
    for backend in ("torch", "cpp" if kind == "cpu" else "triton"):
        if ours is None or op is None:
            found[f"ours {backend}"] = "this version has no such op"
        elif backend not in op.forward:
            found[f"ours {backend}"] = op.notes.get("forward", "it has no kernel of this op")
        else:
            found[f"ours {backend}"] = registry.unavailable(backend, kind) or _on(backend, ours)
    for name, load in case.peers.items():
        if kind != "cuda":
            found[name] = "serves CUDA tensors only"
            continue
        try:
            found[name] = load()
        except Exception as error:  # whatever another package's import raises
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _on(backend: str, function: Callable) -> Callable:
    def call(*arguments):
        with ops.use_backend(backend):
            return function(*arguments)

    return call


# ---- numerics


def in_higher_precision(arguments: tuple, dtype: torch.dtype) -> tuple[tuple, torch.dtype]:
    """The arguments in the next higher precision: enough to tell an error from a rounding, and not too slow."""
    wide = torch.float64 if dtype == torch.float32 else torch.float32

    def cast(a):
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.to(wide)
        return wide if a is dtype else a

    return tuple(map(cast, arguments)), wide


def outputs(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error_of(result, exact: list[Tensor]) -> float:
    """Largest difference to the exact result, as a share of the largest exact value; of whole levels for integers."""
    worst = 0.0
    for y, e in zip(outputs(result), exact, strict=True):
        scale = e.double().abs().max().item() if e.is_floating_point() else 1.0
        difference = (y.double() - e.double()).abs().max().item()
        worst = max(worst, difference / (scale or 1.0))
        if not torch.isfinite(y.double()).all():
            return float("inf")
    return worst


# ---- running


def run_case(case: Case, device: str, dtype: torch.dtype, batch: int, compiled: bool, budget: float) -> list[dict]:
    """The rows of one case; a provider that is absent, wrong or broken has a row that says so."""
    arguments = case.inputs(Maker(device, dtype, batch))
    wide, _ = in_higher_precision(arguments, dtype)
    exact = outputs((case.exact or case.eager)(*wide))
    del wide
    rounding = 1.0 if not exact[0].is_floating_point() else torch.finfo(dtype).eps
    bound = 2 * (0.0 if case.exact else error_of(case.eager(*arguments), exact)) + rounding

    rows, ready = {}, {}
    for name, provider in providers(case, device, compiled).items():
        row = rows[name] = {"provider": name}
        if isinstance(provider, str):
            row["absent"] = provider
            continue
        try:
            started = time.perf_counter()
            result = provider(*arguments)
            row["first_call_seconds"] = round(time.perf_counter() - started, 3)  # with compilation, where there is one
            row["error"] = error_of(result, exact)
        except Exception as failure:  # whatever a provider raises is the row
            row["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            continue
        if row["error"] > bound and not (case.exact and name in ("eager", "compile")):
            row["failed"] = f"wrong values: error {row['error']:.2g}, allowed {bound:.2g}"
            continue
        ready[name] = lambda provider=provider: provider(*arguments)
    del exact

    moved, computed = case.bytes(*arguments), case.flops(*arguments)
    times, failures = _timed({**ready, **roofline(device, dtype, moved)}, device, budget)
    for name, failure in failures.items():
        rows.get(name, {})["failed"] = failure
    bandwidth = moved / quantile(times["copy"], 0.5)
    rate = matmul_flops(device) / quantile(times["matmul"], 0.5)
    bound_seconds = max(moved / bandwidth, computed / rate)
    eager = quantile(times["eager"], 0.5) if "eager" in times else None
    for name in ready.keys() & times.keys():
        median = quantile(times[name], 0.5)
        rows[name] |= {
            "seconds": median,
            "seconds_p20": quantile(times[name], 0.2),
            "seconds_p80": quantile(times[name], 0.8),
            "times": len(times[name]),
            "speed_of_eager": round(eager / median, 3) if eager else None,
            "gb_per_s": round(moved / median / 1e9, 2),
            "gflop_per_s": round(computed / median / 1e9, 1),
            "share_of_copy": round(moved / bandwidth / median, 3),
            "share_of_roofline": round(bound_seconds / median, 3),
        }
    shared = {
        "op": case.op,
        "case": case.label,
        "shape": next(list(a.shape) for a in arguments if isinstance(a, Tensor)),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "bytes": moved,
        "flops": computed,
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        **machine.gpu_state(device),
    }
    return [shared | row for row in rows.values()]


def matmul_flops(device: str) -> int:
    return 2 * _side(device) ** 3


def _side(device: str) -> int:
    return 8192 if device.startswith("cuda") else 1024


def roofline(device: str, dtype: torch.dtype, moved: int) -> dict[str, Callable]:
    """The two ceilings, timed with the providers: a copy that moves as many bytes, and a square matrix product."""
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.ones(_side(device), _side(device), dtype=dtype, device=device)
    return {"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}


def _timed(functions: dict[str, Callable], device: str, budget: float):
    """Times by name, and why some have none: on a GPU one that cannot be captured in a graph must not stop the rest."""
    if not device.startswith("cuda"):
        return time_all(functions, device, budget), {}
    times, failures = {}, {}
    for name, function in functions.items():
        try:
            times |= time_all({name: function}, device, budget)
        except Exception as failure:
            failures[name] = " ".join(f"not timed in a graph: {type(failure).__name__}: {failure}".split())[:300]
    return times, failures


def table(rows: list[dict]) -> str:
    """The rows as people read them; of what is absent only the names."""
    lines, absent = [f"{'op and case':46}{'provider':16}{'ms':>10}{'x eager':>9}{'roofline':>10}"], {}
    for row in rows:
        name = f"{row['op']} {row['case']}"[:45]
        if "seconds" in row:
            speed = f"{row['speed_of_eager']:.2f}" if row["speed_of_eager"] else ""
            numbers = f"{row['seconds'] * 1e3:10.3f}{speed:>9}{row['share_of_roofline']:10.0%}"
            lines.append(f"{name:46}{row['provider']:16}{numbers}")
        elif "failed" in row:
            lines.append(f"{name:46}{row['provider']:16}  {row['failed'][:100]}")
        else:
            absent.setdefault((name, row["absent"]), []).append(row["provider"])
    lines += [f"{name:46}not here: {', '.join(who)} ({why[:80]})" for (name, why), who in absent.items()]
    return "\n".join(lines)


def run(device: str, dtype: str, batch: int | None, chosen, compiled: bool, budget: float, save=lambda report: None):
    """The report: machine and rows. `chosen`: names of ops, None for all. save(report) is called after every case, so
    that a run that is cut off has left its rows. Raises ValueError for an unknown op.
    """
    known = list(dict.fromkeys(case.op for case in CASES))
    for name in chosen or ():
        if name not in known:
            raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(known)}")
    started, rows = time.time(), []
    report = {"machine": machine.describe(device), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "rows": rows}
    batch = batch or BATCH[torch.device(device).type]
    for case in CASES:
        if chosen and case.op not in chosen:
            continue
        try:
            with torch.no_grad():
                new = run_case(case, device, DTYPES[dtype], batch, compiled, budget)
        except Exception as failure:
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            new = [{"op": case.op, "case": case.label, "provider": "all", "failed": reason}]
        print(table(new).partition("\n")[2] if rows else table(new), flush=True)
        rows += new
        report["seconds"] = round(time.time() - started, 1)
        save(report)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    return report


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, help=f"images (default: {BATCH})")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time on a CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each case on a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument("--add", action="store_true", help="keep the rows of other ops and dtypes that OUT has already")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; use --device cpu")
    if args.device.startswith("cpu"):
        # As an engine does, for all providers: else the system's zeroing of every result's new pages is what is timed.
        keep_blocks()

    earlier = []
    if args.add and args.out and args.out.exists():
        earlier = json.loads(args.out.read_text())["rows"]

    def save(report):
        if args.out:
            here = {(row["op"], row.get("dtype")) for row in report["rows"]}
            kept = [row for row in earlier if (row["op"], row.get("dtype")) not in here]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({**report, "rows": kept + report["rows"]}, indent=1) + "\n")

    try:
        run(args.device, args.dtype, args.batch, args.ops, not args.no_compile, args.seconds, save)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
