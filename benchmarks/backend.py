"""`accelerate` on models of diffusers at their published sizes: their own code against the fused ops, in turns.

    python -m benchmarks.backend --out benchmarks/results/backend-cpu.json
    python -m benchmarks.backend --device cuda --size 512 --batch 8

Random weights, which cost what others do. Each row also has the largest difference between the two answers, in units of
the largest value; a memory format or dtype is applied to both sides alike.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import sys
from pathlib import Path

import torch

from lpmrf_fast import accelerate, restore_original

from . import machine
from .timing import quantile, time_all

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def autoencoder(batch: int, size: int, **kind):
    """Stable Diffusion's VAE: what decodes one batch."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, **blocks).eval().to(**kind)
    z = torch.randn(batch, 4, size // 8, size // 8).to(**kind)
    return vae.decoder, lambda: vae.decoder(z)


def unet(batch: int, size: int, **kind):
    """Stable Diffusion 1.5's UNet: one denoising step."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(cross_attention_dim=768).eval().to(**kind)
    z = torch.randn(batch, 4, size // 8, size // 8).to(**kind)
    text = torch.randn(batch, 77, 768).to(z)
    return network, lambda: network(z, 500, text).sample


MODELS = {"SD VAE, decoder": autoencoder, "SD 1.5 UNet, step": unet}


def row(name: str, device: str, batch: int, size: int, dtype: str, layout: str, seconds: float) -> dict:
    torch.manual_seed(0)
    network, call = MODELS[name](batch, size, device=device, dtype=DTYPES[dtype], memory_format=LAYOUTS[layout])

    def fused():
        for module, cls in changed.items():
            module.__class__ = cls
        return call()

    def own():
        restore_original(network)
        return call()

    with torch.inference_mode():
        expected = own()
        report = accelerate(network)
        changed = {module: type(module) for module in network.modules() if hasattr(type(module), "_original_class")}
        error = ((fused() - expected).abs().max() / expected.abs().max()).item()
        times = time_all({"own": own, "fused": fused}, device, seconds)
    medians = {side: quantile(times[side], 0.5) for side in times}
    return {
        "model": name,
        "shape": [batch, size, size],
        "dtype": dtype,
        "layout": layout,
        "replaced": len(report.replaced),
        "difference": error,
        "seconds": medians,
        "times": len(times["own"]),
        "speedup": medians["own"] / medians["fused"],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["channels-last"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    rows = []
    for name in args.models:
        for dtype in args.dtypes:
            for layout in args.layouts:
                rows.append(row(name, args.device, args.batch, args.size, dtype, layout, args.seconds))
                r = rows[-1]
                own, fused = r["seconds"].values()
                print(
                    f"{name:20} {dtype} {layout:14} own {own:.3f} s, fused {fused:.3f} s:"
                    f" {r['speedup']:.2f} times as fast, difference {r['difference']:.0e}",
                    flush=True,
                )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine.describe(args.device), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
