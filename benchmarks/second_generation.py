"""All three stages of a checkpoint as small as the bundled one, on a GPU that one has for minutes at a time.

    python -m benchmarks.second_generation --data portraits --out runs/second --minutes 9

DATA has the folders `train` and `val`. The same command, given again, goes on where the last one stopped, until it says
that all is done (exit status 0; 3: there is more to do). `--total` minutes are shared out among the stages by the pace
that each shows in its first seconds; a stage that nearly fits into its run is cut to fit, so that three runs of nine
minutes take one stage each and nothing but finished networks goes from one to the next. Networks and recipes are the
presets demo-vae, demo-posterior-mean and demo-flow with the changes of `STAGES` below: about 8 million parameters,
16 MB in half precision. Where a kernel of ours fails, LPMRF_BACKEND=torch trains on PyTorch's own.

OUT/checkpoint is the result, for `--model` or to be shipped. OUT/shards has all that the next run needs, or the result,
in files of 15 MiB at most, for machines that lose their disk; in a new OUT, either of these puts them together again:

    python -m benchmarks.second_generation --data portraits --out runs/second --shards shards --minutes 9
    mkdir -p runs/second && cat shards/state.tar.* | tar x -C runs/second
"""

import argparse
import dataclasses
import io
import json
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import torch

from lpmrf_fast.checkpoint import load_model
from lpmrf_fast.pipeline import LatentPMRFPipeline
from lpmrf_fast.training.config import TrainConfig, load_config
from lpmrf_fast.training.trainer import Stopped, Trainer

UNFINISHED = 3
SHARD = 15 << 20

# Stage → preset, share of the minutes, and what a GPU changes: larger batches, and as many workers as it has patience.
# A degraded face of 512x512 costs a worker about 30 ms (AMD EPYC core): 14 workers feed some 400 faces a second.
# The flow learns a few latents by heart: it gets more degradations of each face than it can visit many times.
STAGES = {
    "vae": ("demo-vae", 0.32, {"batch_size": 32, "crop": 256, "workers": 8, "ema_decay": 0.999}),
    "posterior-mean": (
        "demo-posterior-mean",
        0.34,
        {"batch_size": 16, "workers": 14, "ema_decay": 0.999, "jitter": 0.03},
    ),
    "flow": ("demo-flow", 0.34, {"batch_size": 64, "cache": 16, "workers": 14, "ema_decay": 0.999}),
}


def settings(stage: str, args) -> TrainConfig:
    preset, _, changes = STAGES[stage]
    changes = {**changes, "train": str(args.data / "train"), "val": str(args.data / "val"), "device": args.device}
    if stage == "flow":
        changes |= {"posterior_mean": str(args.out / "posterior-mean/model"), "vae": str(args.out / "vae/model")}
    config = load_config(preset)
    return dataclasses.replace(config, out=str(args.out / stage), tracker="none", **changes)


def train(stage: str, config, seconds: float) -> bool:
    """Go on with a run for so long at most; whether it has come to its end."""
    trainer = Trainer(stage, config)
    timer = threading.Timer(max(0.0, seconds), lambda: setattr(trainer, "stopping", True))
    timer.start()
    try:
        trainer.fit()
    except Stopped:
        return False
    finally:
        timer.cancel()
        trainer.close()
    return True


def pace(stage: str, config, seconds: float) -> float:
    """Steps a second, in a run that is thrown away: the median, so that a slow start does not count."""
    with tempfile.TemporaryDirectory() as folder:
        never, latents = 1 << 20, f"{config.out}/latents"
        short = dataclasses.replace(config, out=f"{folder}/warm", val=None, latents=latents, save_every=never)
        # Fills the latent cache, which the run itself then finds, and compiles kernels.
        train(stage, dataclasses.replace(short, steps=4, warmup=1), 600)
        # Each line of the log makes the host wait for a GPU.
        lines = 8 if torch.cuda.is_available() and config.device != "cpu" else 1
        timed = dataclasses.replace(short, out=f"{folder}/timed", steps=never, log_every=lines)
        train(stage, timed, seconds)
        rows = [json.loads(line) for line in (Path(timed.out) / "log.jsonl").read_text().splitlines()]
    return statistics.median(row["images_per_second"] for row in rows) / config.batch_size


def pack(out: Path, plan: dict) -> list[Path]:
    """Write OUT/shards anew: plan and finished networks, and of an unfinished stage its newest checkpoint."""
    files = [out / "plan.json", *out.glob("checkpoint/*"), *out.glob("*/log.jsonl"), *out.glob("*/model/*")]
    for stage, known in plan.items():
        if not known["done"]:
            files += sorted((out / stage).glob("checkpoint-*.pt*"))[-2:]  # and its digest
    shutil.rmtree(out / "shards", ignore_errors=True)
    (out / "shards").mkdir()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for file in filter(Path.exists, files):
            tar.add(file, file.relative_to(out))
    parts = []
    for first in range(0, whole.getbuffer().nbytes, SHARD):
        parts.append(out / "shards" / f"state.tar.{len(parts):03d}")
        parts[-1].write_bytes(whole.getbuffer()[first : first + SHARD])
    return parts


def unpack(shards: Path, out: Path) -> None:
    """What `pack` wrote, into OUT. Raises FileNotFoundError where there is nothing."""
    parts = sorted(shards.glob("state.tar.*"))
    if not parts:
        raise FileNotFoundError(f"{shards}: no state.tar.000 in it; leave --shards out to start anew")
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
        tar.extractall(out, filter="data")


def unfinished(out: Path, plan: dict) -> int:
    parts = pack(out, plan)
    said = ", ".join(f"{name} {'done' if known['done'] else 'begun'}" for name, known in plan.items())
    print(f"time is up ({said}); give the same command again, or go on from {parts[0].parent}")
    return UNFINISHED


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, checkpoint and shards")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run (default: %(default)s)")
    parser.add_argument("--total", type=float, default=25.0, help="minutes of training in all (default: %(default)s)")
    parser.add_argument("--shards", type=Path, help="folder of shards to go on from, where OUT is new")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    plan_file = args.out / "plan.json"
    if args.shards and not plan_file.exists():
        unpack(args.shards, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = json.loads(plan_file.read_text()) if plan_file.exists() else {}

    worked = False
    try:
        for stage in STAGES:
            if plan.get(stage, {}).get("done"):
                continue
            wanted = 60 * args.total * STAGES[stage][1]
            if stage not in plan and worked and end - time.monotonic() < wanted / 2:
                return unfinished(args.out, plan)
            config, worked = settings(stage, args), True
            if stage not in plan:
                speed = pace(stage, config, min(12, wanted / 10))
                left = end - time.monotonic()
                seconds = left if wanted / 2 < left < wanted else wanted
                plan[stage] = {"steps": max(10, int(0.9 * seconds * speed)), "done": False}  # the rest: validation
                plan_file.write_text(json.dumps(plan, indent=1))
            steps = plan[stage]["steps"]
            often = max(1, steps // 8)
            changes = {"warmup": min(config.warmup, steps // 10), "val_every": often, "save_every": often}
            config = dataclasses.replace(config, steps=steps, **changes)
            plan[stage]["done"] = train(stage, config, end - time.monotonic())
            plan_file.write_text(json.dumps(plan, indent=1))
            if not plan[stage]["done"]:
                return unfinished(args.out, plan)
    except BaseException:  # whatever stops it, what there is may be all that comes back from the machine
        pack(args.out, plan)
        raise

    networks = [load_model(args.out / stage / "model") for stage in ("posterior-mean", "vae", "flow")]
    pipe = LatentPMRFPipeline(*networks, noise_std=settings("flow", args).noise_std)
    pipe.save_pretrained(args.out / "checkpoint", dtype="fp16")
    size = sum(file.stat().st_size for file in (args.out / "checkpoint").iterdir()) / 1e6
    pack(args.out, plan)
    print(f"all done: {args.out / 'checkpoint'}, {size:.1f} MB; score it with python -m benchmarks.restoration_quality")
    return 0


if __name__ == "__main__":
    sys.exit(main())
