"""How well does a checkpoint restore a folder of degraded faces? Scores of every face, and pictures to look at.

    python -m benchmarks.restoration_quality --clean val --degraded val_lq --out scores.json --pictures sheets

Prints PSNR of the degraded faces, the posterior means and the restored faces, the sliced Wasserstein distances to the
originals, and the seconds a face; writes one JSON with every face. Faces pair up by the stem of their file names.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lpmrf_fast.evaluation import psnr, sliced_wasserstein
from lpmrf_fast.pipeline import Pipeline

from .machine import describe


def tensor(image: Image.Image) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)


def pairs_of(degraded: Path, clean: Path) -> list[tuple[Path, Path]]:
    """(degraded, original) files of one stem, sorted. Exits where there is none."""
    originals = {p.stem: p for p in clean.iterdir()}
    pairs = [(p, originals[p.stem]) for p in sorted(degraded.iterdir()) if p.stem in originals]
    if not pairs:
        sys.exit(f"no file of {degraded} has the name of one in {clean}")
    return pairs


def sheet(columns: dict[str, Image.Image], size: int = 512) -> Image.Image:
    """The named pictures side by side under their names."""
    picture = Image.new("RGB", (size * len(columns), size + 24), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, image) in enumerate(columns.items()):
        draw.text((i * size + 8, 6), name, fill="black")
        picture.paste(image.resize((size, size)), (i * size, 24))
    return picture


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of original faces")
    parser.add_argument("--degraded", type=Path, required=True, help="folder of the same faces, degraded")
    parser.add_argument("--model", help="checkpoint (default: the bundled one)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, help="only the first N faces")
    parser.add_argument("--out", type=Path, help="JSON with all numbers")
    parser.add_argument("--pictures", type=Path, help="folder for one sheet a face")
    args = parser.parse_args(argv)

    pairs = pairs_of(args.degraded, args.clean)[: args.limit]
    pipe = Pipeline.from_pretrained(args.model, dtype=args.dtype)
    stacks, seconds = {"degraded": [], "posterior mean": [], "restored": [], "original": []}, []
    for done, (bad, good) in enumerate(pairs, 1):
        with Image.open(bad) as a, Image.open(good) as b:
            degraded, original = a.convert("RGB"), b.convert("RGB")
        started = time.perf_counter()
        result = pipe(degraded, num_inference_steps=args.steps, seed=args.seed)
        seconds.append(time.perf_counter() - started)
        columns = dict(zip(stacks, (degraded, result.posterior_means[0], result.images[0], original)))
        for name, image in columns.items():
            stacks[name].append(tensor(image))
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            sheet(columns).save(args.pictures / f"{bad.stem}.png")
        print(f"\r{done}/{len(pairs)}  {seconds[-1]:.1f} s a face", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    stacks = {name: torch.stack(images) for name, images in stacks.items()}
    original = stacks.pop("original")
    decibels = {name: psnr(images, original) for name, images in stacks.items()}
    distances = {name: sliced_wasserstein(images, original) for name, images in stacks.items()}
    averages = {name: sum(d.values()) / len(d) for name, d in distances.items()}
    print(f"{'':16}{'PSNR dB':>9}{'SWD':>8}   SWD by level")
    for name in stacks:
        levels = " ".join(f"{size}:{d:.0f}" for size, d in distances[name].items())
        print(f"{name:16}{decibels[name].mean():9.2f}{averages[name]:8.1f}   {levels}")
    ratio = averages["restored"] / averages["posterior mean"]
    print(f"restored / posterior mean SWD {ratio:.3f}; {sorted(seconds)[len(seconds) // 2]:.2f} s a face (median)")
    if args.out:
        faces = {p.stem: {n: round(float(d[i]), 3) for n, d in decibels.items()} for i, (p, _) in enumerate(pairs)}
        report = {
            "steps": args.steps,
            "seed": args.seed,
            "psnr": {n: round(float(d.mean()), 3) for n, d in decibels.items()},
            "swd": {n: round(v, 2) for n, v in averages.items()},
            "swd_by_level": {n: {k: round(v, 2) for k, v in d.items()} for n, d in distances.items()},
            "swd_ratio": round(ratio, 4),
            "seconds_median": round(sorted(seconds)[len(seconds) // 2], 3),
            "machine": describe("cuda" if torch.cuda.is_available() else "cpu"),
            "psnr_of_each_face": faces,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
