"""What the two methods cost at full size: parameters, FLOPs, bytes and memory, a step and an image; seconds a step.

    python -m benchmarks.cost --out benchmarks/results/cost.json
    python -m benchmarks.cost --size 256 --batch 8 --device cuda

Latent-PMRF with our full-size LooUFormer (the official widths are not published), PMRF with its published HDiT. The
counts are exact and need no such device: tensors of the meta device have shapes and no data (`lpmrf_fast.engine.count`
says what is counted). Seconds are of one prepared Euler step with random weights, which cost what others do; the
networks take turns.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
from pathlib import Path

import torch

from lpmrf_fast import LatentPMRFPipeline, PMRFPipeline
from lpmrf_fast.engine import Plan, estimate
from lpmrf_fast.models import PRESETS

from . import machine
from .timing import quantile, time_all

METHODS = {  # pipeline, presets of its networks, side of a source element in pixels
    "Latent-PMRF": (LatentPMRFPipeline, ("swinir-l", "sim-vae-c32", "loouformer"), 8),
    "PMRF": (PMRFPipeline, ("swinir-l", "hdit-imagenet256sp4"), 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pipeline(method: str, dtype: torch.dtype):
    """At full size, without weights: on the meta device."""
    make, presets, _ = METHODS[method]
    with torch.device("meta"):
        networks = [cls(**config) for cls, config in map(PRESETS.get, presets)]
        return make(*(n.to(dtype=dtype, memory_format=torch.channels_last).eval() for n in networks))


def count(method: str, dtype: torch.dtype, batch: int, size: int, steps: int) -> dict:
    """FLOPs, bytes moved and activation memory, of a step and of an image; of one image, memory of the whole batch."""
    pipe = pipeline(method, dtype)
    plan = Plan(batch, size, size, steps, "meta", ())
    counted = estimate(pipe, plan)
    velocity = counted.stages[next(name for name in counted.stages if name.startswith("velocity"))]
    parameters = {n: sum(p.numel() for p in network.parameters()) for n, network in pipe.modules.items()}
    return {
        "method": method,
        "networks": dict(zip(pipe.modules, METHODS[method][1])),
        "parameters": {**parameters, "all": sum(parameters.values())},
        "step": {
            "gflop": round(velocity.flops / steps / batch / 1e9, 1),
            "mb_moved": round(velocity.moved / steps / batch / 1e6, 1),
            "operations": round(velocity.launches / steps),
            "activation_mb": round(velocity.peak / 1e6, 1),
        },
        "image": {
            "gflop": round(counted.flops / batch / 1e9, 1),
            "mb_moved": round(counted.moved / batch / 1e6, 1),
            "operations": round(sum(stage.launches for stage in counted.stages.values())),
            "activation_mb": round(max(stage.peak for stage in counted.stages.values()) / 1e6, 1),
        },
        "weights_mb": round(counted.weights / 1e6, 1),
    }


def stepper(method: str, dtype: torch.dtype, batch: int, size: int, device: str):
    """A function that takes one Euler step with the full-size network."""
    pipe = pipeline(method, dtype)
    network, side = pipe.velocity.to_empty(device=device), size // METHODS[method][2]
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.normal_(std=0.02)
        z = torch.randn(batch, network.in_channels, side, side, device=device)
        tables = pipe.tables(torch.tensor([0.5], device=device), side, side)
    return lambda: pipe.euler_step(z, 0.5, 0.04, tables, 0)


def run(device: str, dtype: torch.dtype, batch: int, size: int, steps: int, seconds: float) -> dict:
    """The report: machine and a row a method. `seconds` 0: nothing is timed."""
    rows = [count(method, dtype, batch, size, steps) for method in METHODS]
    if seconds:
        with torch.inference_mode():
            functions = {method: stepper(method, dtype, batch, size, device) for method in METHODS}
            times = time_all(functions, device, seconds)
        for row in rows:
            ours = times[row["method"]]
            row["step"] |= {"seconds": quantile(ours, 0.5), "seconds_p80": quantile(ours, 0.8), "times": len(ours)}
    return {
        "machine": machine.describe(device),
        "plan": {"size": size, "batch": batch, "steps": steps, "dtype": str(dtype).removeprefix("torch.")},
        "rows": rows,
    }


def table(report: dict) -> str:
    plan, lines = report["plan"], []
    timed = f"seconds on {report['machine']['device']}"
    lines.append(
        f"{plan['size']}x{plan['size']}, batch {plan['batch']}, {plan['dtype']}; an image: {plan['steps']} steps"
    )
    columns = ("parameters M", "GFLOP", "MB moved", "operations", "activation MB", timed)
    lines.append(f"{'':22}" + "".join(f"{name:>{max(14, len(name) + 2)}}" for name in columns))
    for row in report["rows"]:
        for what in ("step", "image"):
            cost = row[what]
            velocity = row["parameters"]["velocity" if what == "step" else "all"]
            cells = [f"{velocity / 1e6:.1f}", *(f"{cost[k]:,}" for k in ("gflop", "mb_moved", "operations"))]
            cells += [f"{cost['activation_mb']:,}", f"{cost['seconds']:.3f}" if "seconds" in cost else ""]
            padded = (f"{cell:>{max(14, len(name) + 2)}}" for cell, name in zip(cells, columns))
            lines.append(f"{row['method'] + ', ' + what:22}" + "".join(padded))
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where steps are timed"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="side of the photo in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of an image (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="time for timing; 0: counts only")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    try:
        report = run(args.device, DTYPES[args.dtype], args.batch, args.size, args.steps, args.seconds)
    except ValueError as error:
        parser.error(str(error))
    print(table(report))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
