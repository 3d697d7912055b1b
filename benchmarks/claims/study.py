"""What the claims share: small networks of equal size, runs of equal compute through the trainer, scores on the way.

A run is a folder below OUT/runs, named after what it trains, its seed and a digest of all its settings: claims that
need the same run share it, one that was stopped goes on, and one of other settings is another run. Nothing here trains:
that is `lpmrf_fast.training`.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other

import torch
from PIL import Image

from lpmrf_fast import models
from lpmrf_fast.engine.count import Counter
from lpmrf_fast.evaluation import psnr, sliced_wasserstein
from lpmrf_fast.evaluation.metrics import ssim
from lpmrf_fast.training.config import TrainConfig
from lpmrf_fast.training.data import find_images, read_image
from lpmrf_fast.training.stages import CLASSES, unit
from lpmrf_fast.training.trainer import Trainer

from .. import machine

# ---- settings of a study


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, NAME.json and NAME.png")
    parser.add_argument("--train", required=True, help="clean faces, as the trainer takes them")
    parser.add_argument("--val", required=True, help="clean faces of other people")
    parser.add_argument("--faces", type=int, default=32, help="validation faces (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=64, help="pixels of a side, a multiple of 32 (default: %(default)s)"
    )
    parser.add_argument("--width", type=float, default=1.0, help="factor on the networks' widths (default: 1)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (default: %(default)s)")
    parser.add_argument("--flow-tflop", type=float, default=0.4, help="training compute of a flow, in 10^12 FLOPs")
    parser.add_argument("--vae-tflop", type=float, default=8.0, help="of a VAE")
    parser.add_argument("--mean-tflop", type=float, default=3.2, help="of the posterior mean, which all flows share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    return parser


def scaled(width: float, unit: int, *widths: int) -> list[int]:
    """Widths times a factor, as multiples of `unit`: what heads or groups divide."""
    return [max(1, round(width * w / unit)) * unit for w in widths]


def resized(source: str, args, name: str) -> str:
    """A folder of the faces at the study's size, made once: photographs take longer to read than a step takes."""
    folder = args.out / "faces" / f"{name}-{args.size}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(find_images(source)):
            Image.fromarray(read_image(path, args.size)).save(part / f"{i:06d}.png")
        part.rename(folder)
    return str(folder)


class Study:
    """Runs of a study: `args` are those of `arguments`."""

    def __init__(self, args):
        self.args = args
        torch.set_num_threads(args.threads)
        self.planning, self.todo, self.left = False, {}, 0.0
        self.train, self.val = (resized(getattr(args, name), args, name) for name in ("train", "val"))

    def gather(self, runs):
        """`runs(study)`, once to see what there is to do, and once to do it."""
        self.planning, self.todo = True, {}
        runs(self)
        self.planning, self.left = False, sum(self.todo.values())
        self.started, self.total = time.monotonic(), self.left
        return runs(self)

    # ---- networks

    def sim_vae(self) -> dict:
        """Sim-VAE as published but for the widths: factor 8, 32 channels, layer norm."""
        kinds = {"down_block_types": ["EncoderBlock2D"] * 4, "up_block_types": ["DecoderBlock2D"] * 4}
        counts = {"layers_per_block": 1, "layers_mid_block": 1, "latent_channels": 32}
        return {"class": "SimVAE", **kinds, "block_out_channels": scaled(self.args.width, 8, 24, 32, 48, 64), **counts}

    def sd_vae(self) -> dict:
        """Stable Diffusion's AutoencoderKL with as many parameters: group norm, attention in the middle."""
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        counts = {"layers_per_block": 1, "latent_channels": 32, "norm_num_groups": 8}
        channels = scaled(self.args.width, 8, 24, 32, 40, 56)
        return {"class": "AutoencoderKL", **kinds, "block_out_channels": channels, **counts}

    def loouformer(self, told: bool = False) -> dict:
        """Velocity network in latents; `told`: it sees a condition beside its state."""
        return {
            "in_channels": 64 if told else 32,
            "out_channels": 32,
            "patch_size": [1, 1],
            "block_dims": scaled(self.args.width, 32, 64, 128),
            "block_layers": [1, 2],
            "block_types": ["neighborhood", "global"],
            "window_sizes": [7, 0],
            "head_dims": [32, 32],
            "time_embed_dim": scaled(self.args.width, 32, 128)[0],
            "mult": 2.0,
            "zero_init_last_layer": True,
        }

    def hdit(self) -> dict:
        """PMRF's velocity network in pixels, 4x4 patches: the same widths, depths and heads."""
        near = {"type": "neighborhood", "d_head": 32, "kernel_size": 7}
        return {
            "class": "HDiT",
            "in_channels": 3,
            "out_channels": 3,
            "widths": scaled(self.args.width, 32, 64, 128),
            "depths": [1, 2],
            "patch_size": [4, 4],
            "self_attns": [near, {"type": "global", "d_head": 32}],
            "mapping_depth": 2,
            "mapping_width": scaled(self.args.width, 32, 128)[0],
            "dropout_rate": [0, 0],
            "mapping_dropout_rate": 0.0,
        }

    # ---- runs

    def mean(self) -> Path:
        """The posterior mean that all flows share: a small SwinIR on 4x4 patches."""
        model = {"embed_dim": 64, "depths": [4], "num_heads": [2], "window_size": 8, "mlp_ratio": 2, "ape": True}
        model |= {"img_size": self.args.size // 4, "sf": 4, "upsampler": "pixelshuffledirect"}
        model |= {"unshuffle": True, "unshuffle_scale": 4}
        options = {"model": model, "identity_init": True, "objective": "psnr", "grad_clip": 10.0, "lr": 5e-4}
        self.run("posterior-mean", "mean", 0, self.args.mean_tflop, points=4, schedule="trapezoid", **options)
        return self.folder / "model"

    def vae(self, kind: str, seed: int, points: int = 8) -> list[dict]:
        """Rows of a VAE, "sim" or "sd"; its network is then in `folder / "model"`."""
        model = self.sim_vae() if kind == "sim" else self.sd_vae()
        crop = self.args.size // 2
        steps = 1e12 * self.args.vae_tflop / training_flops("vae", model, crop) / self.args.batch
        # The average is over a tenth of the run at most: a longer one would still hold its beginning.
        options = {"model": model, "crop": crop, "lr": 1e-3, "ema_decay": max(0.5, min(0.99, 1 - 10 / steps))}
        return self.run("vae", f"{kind}-vae", seed, self.args.vae_tflop, points, schedule="trapezoid", **options)

    def flow(self, name: str, seed: int, model: dict, budget: float = 1.0, points: int = 6, **options) -> list[dict]:
        """Rows of a flow with `budget` times the compute."""
        compute = self.args.flow_tflop * budget
        # Runs that start alike share their latents, whatever their seed.
        start = [options.get(key) for key in ("source", "condition", "posterior_mean", "vae")]
        latents = self.args.out / "latents" / hashlib.sha256(json.dumps(start).encode()).hexdigest()[:8]
        options |= {"model": model, "time_sampling": "stratified", "cache": 2, "latents": str(latents), "lr": 1e-3}
        # The rate stays constant, as PMRF's: a row of a long run is then the last one of a short run. A long average or
        # warm-up would delay the method with the fewer steps for its compute.
        options |= {"schedule": "constant", "warmup": 20, "ema_decay": 0.9}
        return self.run("flow", name, seed, compute, points, **options)

    def latent_pmrf(self, seed: int, kind: str = "sim") -> list[dict]:
        """In the latents of the VAE of seed 0, as all flows of a study."""
        mean = self.mean()
        self.vae(kind, 0)
        ends = {"posterior_mean": str(mean), "vae": str(self.folder / "model")}
        return self.flow(f"latent-pmrf-{kind}", seed, self.loouformer(), **ends)

    def pmrf(self, seed: int, budget: float = 1.0) -> list[dict]:
        mean = str(self.mean())
        return self.flow("pmrf", seed, self.hdit(), budget, points=round(3 * budget), posterior_mean=mean)

    def run(self, stage: str, name: str, seed: int, tflop: float, points: int, **options) -> list[dict]:
        """Train for so much compute, scored `points` times and before the first step; returns the scores' rows.

        Each has `step`, `tflop` and `seconds` of training, and the scores. A finished run is only read.
        """
        a = self.args
        per_step = training_flops(stage, options["model"], options.get("crop") or a.size) * a.batch
        every = max(1, round(1e12 * tflop / points / per_step))
        small = a.size / 512  # the published degradation, as hard for faces of this size as theirs is for 512
        degradation = {"sigma": [0.1, 15 * small], "r": [0.8, max(1, 32 * small)], "q": [60, 100], "kernel_size": 11}
        shared = dict(
            train=self.train, val=self.val, val_images=a.faces, size=a.size, batch_size=a.batch, seed=seed, workers=0,
            degradation=degradation, steps=every * points, val_every=every, save_every=every, log_every=every, keep=1,
            betas=(0.9, 0.99), warmup=50, ema_decay=0.99, tracker="none", device=a.device,
        )  # fmt: skip
        options = {**shared, **options}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = a.out / "runs" / f"{name}-{seed}-{digest}"
        config = TrainConfig(out=str(self.folder), **options)
        rows = scores_of(self.folder)
        if not rows or rows[-1]["step"] < config.steps:
            if self.planning:
                self.todo[self.folder.name] = tflop
                return [{"step": 0, "tflop": 0.0}]
            self._announce(config.steps)
            Scored(stage, config).fit()
            self.left -= tflop
            rows = scores_of(self.folder)
        return [{**row, "tflop": row["step"] * per_step / 1e12} for row in rows]

    def _announce(self, steps: int):
        done, spent = self.total - self.left, time.monotonic() - self.started
        eta = f"about {spent / done * self.left / 60:.0f} minutes left" if done else "no estimate yet"
        print(f"{self.folder.name}: {steps} steps; {done:.1f} of {self.total:.1f} TFLOP done, {eta}", flush=True)


def scores_of(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k.removeprefix("val_"): v for k, v in row.items()} for row in rows if "val_swd" in row]


class Scored(Trainer):
    """The trainer, which scores the EMA weights by more measures and counts the seconds of its own steps.

    On a CPU they are this process's, so that other work beside it does not count.
    """

    seconds = 0.0

    def fit(self):
        rows = [row for row in scores_of(self.out) if row["step"] <= self.step]
        if self.step:
            self.seconds = json.loads((self.out / "seconds.json").read_text())[str(self.step)]
        if self.step % self.config.val_every == 0 and (not rows or rows[-1]["step"] < self.step):
            self.validate(*self.stage.validation())  # before the first step, or killed after the last save
        super().fit()

    def save(self):
        file = self.out / "seconds.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, self.step: self.seconds}))
        super().save()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def _step(self, loader, clock):
        before = self._now()
        terms = super()._step(loader, clock)
        self.seconds += self._now() - before
        return terms

    @torch.no_grad()
    def validate(self, clean, degraded):
        network = self.ema.module.eval()
        with self._autocast():
            _, rows = self.stage.judge(network, clean.to(self.device), degraded.to(self.device))
        x = unit(clean)
        y = rows[-1 if not self.stage.degrades else -2].float().clamp(0, 1).cpu()
        self.log.write(self.step, seconds=self.seconds, **{f"val_{k}": v for k, v in scores(y, x).items()})


def scores(y: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """Means over faces in [0, 1] of PSNR in dB and SSIM, and the sliced Wasserstein distance averaged over levels."""
    distance = sliced_wasserstein(y, x)
    swd = sum(distance.values()) / len(distance)
    return {"psnr": float(psnr(y, x).mean()), "ssim": float(ssim(y, x).mean()), "swd": swd}


# ---- compute and size


def on_meta(stage: str, model: dict):
    """The network of a config without weights."""
    options = dict(model)
    default = {"vae": "SimVAE", "posterior-mean": "SwinIR", "flow": "LooUFormer"}[stage]
    preset, cls = options.pop("preset", None), options.pop("class", default)
    with torch.device("meta"):
        return models.build(preset, **options) if preset else CLASSES[cls](**options)


def parameters(stage: str, model: dict) -> int:
    return sum(p.numel() for p in on_meta(stage, model).parameters())


def training_flops(stage: str, model: dict, size: int) -> float:
    """FLOPs of one image in a training step: three times the network's forward pass, as usual.

    What is frozen or computed once (posterior mean and VAE in front of a flow) is not in it.
    """
    network, counter = on_meta(stage, model), Counter()
    image = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad(), counter:
        counter.started = True
        with counter.stage("forward"):
            if stage == "vae":
                network.decode(network.encode(image).chunk(2, dim=1)[0])
            elif stage == "posterior-mean":
                network(image)
            else:
                channels = model["in_channels"]
                side = size if channels in (3, 6) else size // 8
                network(torch.empty(1, channels, side, side, device="meta"), torch.empty(1, device="meta"))
    return 3 * counter.stages["forward"].flops


# ---- results

FOLDERS = ("train", "val", "clean", "degraded", "out")
"""Settings that say nothing about a result elsewhere."""


def spread(values: list[float]) -> dict:
    """Of runs with different seeds."""
    return {
        "mean": round(statistics.fmean(values), 4),
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "values": [round(v, 4) for v in values],
    }


def what_was_run(s: "Study") -> str:
    """A sentence for a caption."""
    a, train, val = s.args, len(find_images(s.train)), len(find_images(s.val))
    steps = round(1e12 * a.flow_tflop / training_flops("flow", s.loouformer(), a.size) / a.batch)
    sizes = {n: parameters("flow", m) / 1e6 for n, m in (("LooUFormer", s.loouformer()), ("HDiT", s.hdit()))}
    return (
        f"{a.seeds} seeds; {train} training faces and {min(a.faces, val)} of other people for validation, at"
        f" {a.size}x{a.size}, with blind degradation of that scale; velocity networks of"
        f" {sizes['LooUFormer']:.2f} M (LooUFormer) and {sizes['HDiT']:.2f} M parameters (HDiT), VAEs of"
        f" {parameters('vae', s.sim_vae()) / 1e6:.2f} M; {a.flow_tflop:g} TFLOP a flow (in latents {steps} steps of"
        f" {a.batch} faces), {a.vae_tflop:g} a VAE; 25 Euler steps."
    )


def fingerprint(pipe) -> str:
    """Of a pipeline's weights."""
    digest = hashlib.sha256()
    for network in pipe.modules.values():
        for tensor in network.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def write(args, name: str, caption: str, **results) -> None:
    """OUT/NAME.json: what was found, what was run on what, and the caption."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in FOLDERS}
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    report = {"caption": caption, **results, "settings": settings, "machine": machine.describe(device)}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{file}\n{caption}")


def axes(columns: int, title: str):
    """A figure with a row of plots. Raises ImportError with what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "lpmrf-fast[bench]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, found = pyplot.subplots(1, columns, figsize=(5 * columns, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for ax in [found] if columns == 1 else found:
        ax.grid(alpha=0.3)
    return figure, found
