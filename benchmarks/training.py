"""How fast is a training step of each stage, and how much memory does it take, with our modules and with plain ones?

    python -m benchmarks.training --out benchmarks/results/training-cpu.json
    python -m benchmarks.training --device cuda --preset full --out training-gpu.json

A step is the trainer's own: forward, backward, clipping, AdamW, EMA, on a batch that is already there. Providers run
the same weights: `plain` on PyTorch's own operations, `ours`, `ours` with activation checkpointing, and with
`--compile` the first two through torch.compile. Before the clock the gradients of a step are compared with plain's. On
a CPU providers take turns, so that only ratios within a run mean something.
"""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other

import torch

from lpmrf_fast import models
from lpmrf_fast.checkpoint import save_model
from lpmrf_fast.engine.count import Counter
from lpmrf_fast.training.config import TrainConfig
from lpmrf_fast.training.stages import Draws
from lpmrf_fast.training.trainer import Trainer, _Clock

from . import machine
from .engine import clock, plain, until
from .timing import quantile

SMALL_VAE = {
    "down_block_types": ["EncoderBlock2D"] * 4,
    "up_block_types": ["DecoderBlock2D"] * 4,
    "block_out_channels": [32, 48, 64, 96],
    "layers_per_block": 1,
    "layers_mid_block": 1,
    "latent_channels": 32,
}
SMALL_SD = {
    "class": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 48, 64, 96],
    "latent_channels": 32,
    "norm_num_groups": 16,
}
SMALL_SWINIR = {
    "img_size": 64, "embed_dim": 96, "depths": [4, 4], "num_heads": [3, 3], "window_size": 8, "mlp_ratio": 2, "sf": 8,
    "upsampler": "pixelshuffledirect", "unshuffle": True, "unshuffle_scale": 8,
}  # fmt: skip
SMALL_LATENT = {
    "in_channels": 32, "out_channels": 32, "patch_size": [1, 1], "block_dims": [128, 192], "block_layers": [2, 4],
    "block_types": ["neighborhood", "global"], "window_sizes": [7, 0], "head_dims": [64, 64], "time_embed_dim": 128,
    "mult": 2.0,
}  # fmt: skip
SMALL_PIXEL = {
    "preset": "hdit-s", "widths": [64, 128], "depths": [1, 2], "mapping_width": 128, "dropout_rate": [0, 0],
    "self_attns": [{"type": "neighborhood", "d_head": 64, "kernel_size": 7}, {"type": "global", "d_head": 64}],
}  # fmt: skip
# What: stage, network, side of the images, batch on a CPU, batch on a GPU.
CASES = {
    "small": {
        "vae": ("vae", SMALL_VAE, 128, 4, 32),
        "vae, SD style": ("vae", SMALL_SD, 128, 4, 32),
        "posterior mean": ("posterior-mean", SMALL_SWINIR, 256, 2, 16),
        "flow in latents": ("flow", SMALL_LATENT, 256, 4, 32),
        "flow in pixels": ("flow", SMALL_PIXEL, 128, 2, 16),
    },
    "full": {
        "vae": ("vae", {"preset": "sim-vae-c32"}, 256, 1, 8),
        "vae, SD style": ("vae", {"preset": "sd-vae"}, 256, 1, 8),
        "posterior mean": ("posterior-mean", {"preset": "swinir-m"}, 256, 1, 8),
        "flow in latents": ("flow", {"preset": "loouformer"}, 512, 1, 32),
        "flow in pixels": ("flow", {"preset": "hdit-xl2"}, 256, 1, 16),
    },
}


def trainer(what: str, preset: str, folder: Path, device: str, **options) -> tuple:
    """A trainer of a case with weights of seed 0, and a batch of noise for it.

    The flow's ends are given as a latent cache would: frozen networks are no part of the step.
    """
    stage, model, side, *batch = CASES[preset][what]
    batch = batch[device.startswith("cuda")]
    options = {"model": model, "batch_size": batch, "size": side, "cache": int(stage == "flow"), "warmup": 0, **options}
    if stage == "flow":
        options["source"] = "degraded"
        if model.get("in_channels", 32) == 32 and "hdit" not in model.get("preset", ""):
            options["vae"] = str(tiny_vae(folder))
    config = TrainConfig(out=str(folder), steps=1 << 20, tracker="none", device=device, workers=0, **options)
    found = Trainer(stage, config)
    generator = torch.Generator().manual_seed(1)
    if stage == "flow":
        shape = (batch, 32, side // 8, side // 8) if found.stage.vae else (batch, 3, side, side)
        data = [torch.randn(shape, generator=generator) for _ in range(2)]
    else:
        data = [torch.randint(256, (batch, 3, side, side), generator=generator, dtype=torch.uint8) for _ in range(2)]
    # What a run starts with is zero in places, and their gradients with it.
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    data = [t.to(device) for t in data]
    return found, data[0] if stage == "vae" else data


def tiny_vae(folder: Path) -> Path:
    """A VAE that nobody calls: it says that the flow lives in latents."""
    if not (folder / "vae").exists():
        network = models.SimVAE(**{**SMALL_VAE, "block_out_channels": [8] * 4})
        save_model(folder / "vae", network)
    return folder / "vae"


def step(found: Trainer, batch) -> None:
    found._step(itertools.repeat(batch), _Clock(0))


def gradients(found: Trainer, batch, context) -> list[torch.Tensor]:
    """Of one objective, without a step; random numbers are the same every time."""
    torch.manual_seed(2)
    size = found.config.batch_size
    with context(), found._autocast():
        loss, _ = found.objective(found.stage.prepare(batch), Draws((2,), range(size), size, found.device))
        loss.backward()
    result = [p.grad.float() for p in found.model.parameters() if p.grad is not None]
    found.model.zero_grad(set_to_none=True)
    return result


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Length of the difference of two gradients, as a share of the second's length."""
    apart = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)).sqrt()
    return float(apart / sum(b.square().sum() for b in theirs).sqrt())


def peak_bytes(found: Trainer, batch, context, device: str) -> int:
    """Most memory that a step takes beside weights, EMA and the optimiser's state.

    On a CPU what PyTorch's operations return is counted, without their own work space.
    """
    with context():
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(found, batch)
            return torch.cuda.max_memory_allocated() - before
        counter = Counter()
        with counter:
            counter.started = True
            with counter.stage("step"):
                step(found, batch)
    return int(counter.stages["step"].peak)


PROVIDERS = {
    "plain": (plain, {}),
    "ours": (nullcontext, {}),
    "ours, activation checkpointing": (nullcontext, {"activation_checkpointing": True}),
    "plain compiled": (plain, {"compile": True}),
    "ours compiled": (nullcontext, {"compile": True}),
}


def measure(what: str, preset: str, device: str, precision: str, seconds: float, chosen: list[str]) -> list[dict]:
    """Rows of one case, one a provider."""
    cuda = device.startswith("cuda")
    rows, ready, reference = {}, {}, None
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(chosen):
            context, options = PROVIDERS[name]
            row = rows[name] = {"case": what, "provider": name}
            try:
                found, batch = trainer(what, preset, Path(folder) / str(i), device, precision=precision, **options)
                row |= {"batch": found.config.batch_size, "size": found.config.size}
                row["parameters"] = sum(p.numel() for p in found.model.parameters())
                grads = gradients(found, batch, context)
                if reference is None:
                    reference = grads
                row["gradient_difference"] = difference(grads, reference)
                del grads

                def once(found=found, batch=batch, context=context):
                    with context():
                        return clock(lambda: step(found, batch), device)[0]

                row["first_step_seconds"] = once()
                print(f"{what}, {name}: first step {row['first_step_seconds']:.1f} s", file=sys.stderr, flush=True)
                if not options.get("compile") or cuda:  # the CPU's count does not look into compiled code
                    row["peak_bytes"] = peak_bytes(found, batch, context, device)
                if cuda:  # one at a time: they need the memory
                    row |= summary(until(once, seconds))
                    del found, batch, once
                    torch.cuda.empty_cache()
                else:
                    ready[name] = once
            except Exception as failure:  # whatever a provider raises is the row
                row["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        times = {name: [] for name in ready}
        end, names = time.perf_counter() + seconds * len(ready), list(ready)
        while ready and (time.perf_counter() < end or len(times[names[0]]) < 3):
            for name in names:
                times[name].append(ready[name]())
            names.reverse()  # nobody always follows the same one
    for name in ready:
        rows[name] |= summary(times[name])
    base = rows.get("plain", {})
    for row in rows.values():
        for key, ratio in (("seconds", "speed_of_plain"), ("peak_bytes", "memory_of_plain")):
            if key in base and key in row:
                larger, smaller = (base[key], row[key]) if key == "seconds" else (row[key], base[key])
                row[ratio] = round(larger / smaller, 3)
    return list(rows.values())


def summary(times: list[float]) -> dict:
    p20, p50, p80 = (quantile(times, share) for share in (0.2, 0.5, 0.8))
    seconds = {"seconds": p50, "seconds_p20": p20, "seconds_p80": p80, "times": len(times)}
    return {**seconds, "steps_per_s": 1 / p50}


def line(row: dict) -> str:
    text = f"{row['case']:16}{row['provider']:32}"
    if "failed" in row:
        return text + row["failed"]
    memory = f"{row['peak_bytes'] / 1e6:9.0f} MB" if "peak_bytes" in row else f"{'-':>12}"
    ratios = f"{row.get('speed_of_plain', 1):6.2f}x speed {row.get('memory_of_plain', math.nan):6.2f}x memory"
    return text + f"{row['steps_per_s']:8.2f} steps/s {memory} {ratios}  gradient {row['gradient_difference']:.1e}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with all rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=CASES, help="sizes (default: full on a GPU, small on a CPU)")
    parser.add_argument("--cases", nargs="+", help="of them, by name (default: all)")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="of them, by name (default: see --compile)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="through torch.compile as well: minutes of compiling")
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps for every provider (default: %(default)s)")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    preset = args.preset or ("full" if cuda else "small")
    for name in args.cases or ():
        if name not in CASES[preset]:
            parser.error(f"no case {name!r}; there are {', '.join(CASES[preset])}")
    chosen = [name for name, (_, options) in PROVIDERS.items() if args.compile or "compile" not in options]
    chosen = args.providers or chosen
    report = {"preset": preset, "precision": args.precision, "machine": machine.describe(args.device), "rows": []}
    for what in args.cases or CASES[preset]:
        for row in measure(what, preset, args.device, args.precision, args.seconds, chosen):
            report["rows"].append(row)
            print(line(row), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return any("failed" in row for row in report["rows"])


if __name__ == "__main__":
    sys.exit(main())
