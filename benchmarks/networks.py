"""How fast are a pipeline's networks on our kernels, beside the same networks on PyTorch alone?

    python -m benchmarks.networks --dtype bf16 --out benchmarks/results/networks-cpu.json [--add]

Each part of a restoration (posterior mean, encoding, all velocity steps, decoding) runs in turns with the backend that
serves it by itself and with `use_backend("torch")`, as LPMRF_BACKEND=torch would: the same weights, dtype and layout,
and in both cases all that is no op of ours, such as tables made once and projections in one matrix product.
`difference` is the largest one between the two results, as a share of the largest value. On a CPU: a GPU runs the whole
restoration as one graph, which `benchmarks.engine` measures.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lpmrf_fast.engine.memory import keep_blocks
from lpmrf_fast.pipeline import LatentPMRFPipeline
from lpmrf_kernels import use_backend

from . import machine
from .kernels import DTYPES
from .timing import quantile, time_all


def parts(pipe: LatentPMRFPipeline, size: int, batch: int, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Name → function of each part, on random pixels and latents."""
    y = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    y = y.contiguous(memory_format=torch.channels_last)
    z = pipe.encode(y)
    return {
        "posterior mean": lambda: pipe.predict_mean(y),
        "encode": lambda: pipe.encode(y),
        f"{steps} velocity steps": lambda: pipe.sample(z, steps),
        "decode": lambda: pipe.decode(z),
    }


def on_torch(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call():
        with use_backend("torch"):
            return function()

    return call


def run(pipe: LatentPMRFPipeline, size: int, batch: int, steps: int, seconds: float) -> list[dict]:
    """A row a part."""
    rows = []
    with torch.inference_mode():
        for name, function in parts(pipe, size, batch, steps).items():
            sides = {"ours": function, "torch": on_torch(function)}
            ours, plain = (side().float() for side in sides.values())
            times = time_all(sides, "cpu", seconds)
            medians = {side: quantile(values, 0.5) for side, values in times.items()}
            rows.append(
                {
                    "part": name,
                    "dtype": str(next(pipe.velocity.parameters()).dtype).removeprefix("torch."),
                    "size": size,
                    "batch": batch,
                    "threads": torch.get_num_threads(),
                    **{f"seconds_{side}": median for side, median in medians.items()},
                    **{f"seconds_{side}_p{p}": quantile(times[side], p / 100) for side in sides for p in (20, 80)},
                    "times": len(times["ours"]),
                    "speed_of_torch": round(medians["torch"] / medians["ours"], 3),
                    "difference": ((ours - plain).abs().max() / plain.abs().max()).item(),
                }
            )
            row = rows[-1]
            print(
                f"{name:20}{row['dtype']:10}{row['seconds_ours'] * 1e3:10.1f} ms{row['seconds_torch'] * 1e3:10.1f} ms"
                f"{row['speed_of_torch']:8.2f} times as fast",
                flush=True,
            )
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: the bundled one)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--size", type=int, default=512, help="side of the photo in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25, help="of an image (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for timing each part (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of other dtypes and sizes that OUT has already"
    )
    args = parser.parse_args(argv)
    keep_blocks()  # as an engine does
    pipe = LatentPMRFPipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype], device="cpu")
    report = {
        "machine": machine.describe("cpu"),
        "rows": run(pipe, args.size, args.batch, args.steps, args.seconds),
    }
    if args.out:
        key = lambda row: (row["dtype"], row["size"], row["batch"])
        new = set(map(key, report["rows"]))
        if args.add and args.out.exists():
            report["rows"] = [r for r in json.loads(args.out.read_text())["rows"] if key(r) not in new] + report["rows"]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
