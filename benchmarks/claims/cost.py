"""What do Latent-PMRF and PMRF cost at full size? FLOPs, bytes and memory by count, seconds by the clock.

    python -m benchmarks.claims.cost --out claims
    python -m benchmarks.claims.cost --out claims --device cuda --clocked-size 512 --batch 8

SwinIR-L in front of both; Sim-VAE-c32 and our 113 M LooUFormer, and PMRF's published HDiT. Random weights: they cost
the same. Counts are made on the meta device at `--size`; clocks run at `--clocked-size`, the methods' parts in turns.
"""

import argparse
import statistics
from pathlib import Path

import torch

from lpmrf_fast import models
from lpmrf_fast.engine.count import estimate
from lpmrf_fast.engine.plan import Plan
from lpmrf_fast.pipeline import LatentPMRFPipeline, PMRFPipeline, default_device, default_dtype

from ..engine import clock
from . import study


def pipelines(device, dtype) -> dict:
    """Both methods at full size, the posterior mean shared."""
    torch.manual_seed(0)
    with torch.device(device):
        mean, vae, latent, pixel = (
            models.build(name) for name in ("swinir-l", "sim-vae-c32", "loouformer", "hdit-imagenet256sp4")
        )
    found = {"Latent-PMRF": LatentPMRFPipeline(mean, vae, latent), "PMRF": PMRFPipeline(mean, pixel)}
    for pipe in found.values():
        pipe.to(device, dtype)
    return found


def counted(pipe, plan: Plan) -> dict:
    """By stage, for one image."""
    found = estimate(pipe, plan)
    stages = {
        name: {"gflop": round(c.flops / 1e9, 2), "gb_moved": round(c.moved / 1e9, 3)}
        for name, c in found.stages.items()
    }
    whole = {"gflop": round(found.flops / 1e9, 1), "gb_moved": round(found.moved / 1e9, 2)}
    memory = {"gb_weights": round(found.weights / 1e9, 3), "gb_beside_them": round(found.peak / 1e9, 3)}
    return {"stages": stages, "an image": {**whole, **memory}}


@torch.no_grad()
def clocked(pipes: dict, device: str, size: int, batch: int, times: int) -> dict:
    """Median seconds of every part, all of them in turns."""
    y = torch.rand(batch, 3, size, size, device=device)
    calls = {"posterior mean": lambda: pipes["PMRF"].predict_mean(y)}
    for name, pipe in pipes.items():
        z = pipe.encode(y)
        calls[f"{name}: a step"] = lambda p=pipe, z=z: p.velocity_at(z, 0.5)
        if name == "Latent-PMRF":
            calls["encode"] = lambda p=pipe: p.encode(y)
            calls["decode"] = lambda p=pipe, z=z: p.decode(z)
    taken = {name: [] for name in calls}
    for _ in range(times + 1):
        for name, call in calls.items():
            taken[name].append(clock(call, device)[0])
    return {name: statistics.median(seconds[1:]) / batch for name, seconds in taken.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cost.json")
    parser.add_argument("--size", type=int, default=512, help="of the counted images (default: %(default)s)")
    parser.add_argument("--clocked-size", type=int, default=256, help="of the clocked ones (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    args.device = str(default_device(args.device))
    dtype = default_dtype(args.dtype, torch.device(args.device))

    pipes = pipelines(args.device, dtype)
    counts = {
        name: counted(pipe, Plan(1, args.size, args.size, args.steps, args.device, ())) for name, pipe in pipes.items()
    }
    seconds = clocked(pipes, args.device, args.clocked_size, args.batch, args.times)
    image = {name: seconds["posterior mean"] + args.steps * seconds[f"{name}: a step"] for name in pipes}
    image["Latent-PMRF"] += seconds["encode"] + seconds["decode"]
    step = {
        name: next(c for s, c in found["stages"].items() if s.startswith("velocity"))["gflop"] / args.steps
        for name, found in counts.items()
    }
    seconds = {name: round(value, 4) for name, value in seconds.items()}
    flops = {name: found["an image"]["gflop"] for name, found in counts.items()}
    caption = (
        f"At {args.size}x{args.size} a step of PMRF takes {step['PMRF']:.0f} GFLOP and one of Latent-PMRF"
        f" {step['Latent-PMRF']:.0f}; an image with {args.steps} steps {flops['PMRF'] / 1e3:.1f} and"
        f" {flops['Latent-PMRF'] / 1e3:.1f} TFLOP. Clocked at {args.clocked_size}x{args.clocked_size}, {dtype}, batch"
        f" {args.batch}: {seconds['PMRF: a step']:.2f} and {seconds['Latent-PMRF: a step']:.2f} s a step,"
        f" {image['PMRF']:.1f} and {image['Latent-PMRF']:.1f} s an image. Networks: SwinIR-L for both, Sim-VAE-c32,"
        " LooUFormer of 113 M parameters (its official widths are not published, these are ours), the published HDiT"
        f" of {sum(p.numel() for p in pipes['PMRF'].velocity.parameters()) / 1e6:.0f} M. It does not show the engine's"
        " speed, nor that both are equally good at this cost."
    )
    study.write(args, "cost", caption, counted=counts, gflop_a_step=step, seconds=seconds, seconds_an_image=image)


if __name__ == "__main__":
    main()
