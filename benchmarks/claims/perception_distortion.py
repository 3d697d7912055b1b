"""What do more steps and more source noise buy? PSNR against the sliced Wasserstein distance, over K and the noise.

    python -m benchmarks.claims.perception_distortion --out claims --clean val --degraded val_lq

Restores faces with the bundled checkpoint, or another one, for every K and every noise, with several noise seeds.
Posterior means and their latents are computed once; finished settings are kept in OUT, so that a stopped run goes on.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image

from lpmrf_fast.pipeline import Pipeline
from lpmrf_kernels import source_noise

from ..restoration_quality import pairs_of, tensor
from . import study


def load(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Degraded and original faces, (N, 3, H, W) in [0, 1]."""
    columns = ([], [])
    for paths in pairs:
        for column, path in zip(columns, paths):
            with Image.open(path) as image:
                column.append(tensor(image))
    return tuple(torch.stack(column) for column in columns)


def restored(pipe: Pipeline, starts: list[torch.Tensor], steps: int, noise_std: float, seed: int) -> torch.Tensor:
    """Faces from noise-free starts, one at a time, each with noise of its own."""
    faces = []
    for i, start in enumerate(starts):
        seeds = torch.tensor([1000 * seed + i], device=start.device)
        noise = source_noise(start.shape, seeds).to(start)
        faces.append(pipe.decode(pipe.sample(start + noise_std * noise, steps)).float().clamp(0, 1).cpu())
    return torch.cat(faces)


def over(rows: list[dict], axis: str, **fixed) -> dict[float, list[dict]]:
    """Value of `axis` → its rows, one a seed, of those where everything else is as given."""
    found = {}
    for row in sorted(rows, key=lambda row: (row[axis], row["seed"])):
        if all(row[name] == value for name, value in fixed.items()):
            found.setdefault(row[axis], []).append(row)
    return found


class Kept:
    """Rows of finished settings, one a line of a file; those of other weights or faces do not count."""

    def __init__(self, file: Path, of: dict):
        self.file, self.of = file, of
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows = {_setting(row): row for row in map(json.loads, lines) if row.pop("of") == of}

    def add(self, row: dict) -> None:
        self.rows[_setting(row)] = row
        with open(self.file, "a") as file:
            file.write(json.dumps({**row, "of": self.of}) + "\n")


def _setting(row: dict) -> tuple:
    return row["steps"], row["noise_std"], row["seed"]


def plot(args, reference: dict, lines: dict[str, dict]) -> None:
    figure, plots = study.axes(2, f"Perception against distortion, {args.model} checkpoint, {args.faces} faces")
    for ax, (axis, by_value) in zip(plots, lines.items()):
        for seed in range(args.seeds):
            # Without noise all seeds are one.
            line = [rows[min(seed, len(rows) - 1)] for rows in by_value.values()]
            ax.plot([r["psnr"] for r in line], [r["swd"] for r in line], ".-", color="tab:blue", alpha=0.6)
        for value, rows in by_value.items():
            ax.annotate(f"{value:g}", (rows[0]["psnr"], rows[0]["swd"]), fontsize=8)
        for name, marker in (("posterior mean", "s"), ("degraded", "x")):
            ax.plot(reference[name]["psnr"], reference[name]["swd"], marker, color="black", label=name)
        ax.set(xlabel="PSNR, dB", ylabel="sliced Wasserstein distance", title=f"over {axis}")
        ax.legend()
    figure.savefig(args.out / "perception_distortion.png", dpi=100)


@torch.no_grad()
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--clean", type=Path, required=True, help="folder of original faces")
    parser.add_argument("--degraded", type=Path, required=True, help="folder of the same faces, degraded")
    parser.add_argument("--model", default="bundled", help="checkpoint (default: the bundled one)")
    parser.add_argument("--faces", type=int, default=16, help="the first N (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="noise seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 5, 10, 25, 50])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.4])
    parser.add_argument("--at", type=int, default=25, help="steps of the rows over noise (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    name = None if args.model == "bundled" else args.model
    pipe = Pipeline.from_pretrained(name, dtype=args.dtype, device=args.device)
    pairs = pairs_of(args.degraded, args.clean)[: args.faces]
    degraded, original = load(pairs)
    means = torch.cat([pipe.predict_mean(y[None].to(pipe.device)) for y in degraded])
    starts = [pipe.encode(x[None]) for x in means]
    rebuilt = torch.cat([pipe.decode(pipe.encode(x[None].to(pipe.device))).float().cpu() for x in original])
    reference = {
        "degraded": study.scores(degraded, original),
        "posterior mean": study.scores(means.float().cpu(), original),
        "the originals through the VAE": study.scores(rebuilt.clamp(0, 1), original),
    }

    noises = sorted({pipe.noise_std, *args.noise})
    wanted = [(k, pipe.noise_std, seed) for seed in range(args.seeds) for k in args.steps]
    # Without noise there is nothing that a seed could change.
    wanted += [(args.at, std, seed) for seed in range(args.seeds) for std in noises if std or not seed]
    known = {"model": study.fingerprint(pipe), "dtype": args.dtype, "faces": [bad.stem for bad, _ in pairs]}
    kept = Kept(args.out / "perception_distortion.rows.jsonl", known)
    todo = [setting for setting in dict.fromkeys(wanted) if setting not in kept.rows]
    work = [setting[0] + 6 for setting in todo]  # decoding takes about as long as six steps
    started = time.monotonic()
    for i, (steps, std, seed) in enumerate(todo):
        found = study.scores(restored(pipe, starts, steps, std, seed), original)
        kept.add({"steps": steps, "noise_std": std, "seed": seed, **found})
        left = (time.monotonic() - started) / sum(work[: i + 1]) * sum(work[i + 1 :])
        said = f"{found['psnr']:.2f} dB  distance {found['swd']:.0f}  ETA {left:.0f} s"
        print(f"K {steps}  noise {std:g}  seed {seed}  {said}", flush=True)

    rows = [kept.rows[setting] for setting in dict.fromkeys(wanted)]
    lines = {
        "Euler steps": over(rows, "steps", noise_std=pipe.noise_std),
        "source noise": over(rows, "noise_std", steps=args.at),
    }
    table = {
        axis: {
            f"{value:g}": {measure: study.spread([r[measure] for r in found]) for measure in ("psnr", "ssim", "swd")}
            for value, found in by_value.items()
        }
        for axis, by_value in lines.items()
    }
    ends = [table["Euler steps"][f"{k:g}"] for k in (min(args.steps), max(args.steps))]
    psnr, swd = (
        [f"{end[measure]['mean']:.{digits}f}" for end in ends] for measure, digits in (("psnr", 2), ("swd", 0))
    )
    mean = reference["posterior mean"]
    caption = (
        f"From K = {min(args.steps)} to {max(args.steps)} Euler steps PSNR goes from {psnr[0]} to {psnr[1]} dB and the"
        f" sliced Wasserstein distance from {swd[0]} to {swd[1]}; the posterior mean has {mean['psnr']:.2f} dB and"
        f" {mean['swd']:.0f}. {len(pairs)} validation faces of {original.shape[-1]}x{original.shape[-2]}, {args.seeds}"
        f" noise seeds, the {args.model} checkpoint, whose flow was trained with noise {pipe.noise_std}: it has not"
        " been trained for the other noises. It does not show what flows that are trained for each noise do, nor a"
        " learned measure such as FID; so few faces give distances higher than many would."
    )
    study.write(
        args, "perception_distortion", caption, weights=known["model"], table=table, reference=reference, rows=rows
    )
    plot(args, reference, lines)


if __name__ == "__main__":
    main()
