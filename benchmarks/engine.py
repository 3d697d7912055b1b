"""How fast is a whole restoration, uint8 in and uint8 out, beside the plain networks and torch.compile of them?

    python -m benchmarks.engine --device cpu --out benchmarks/results/engine-cpu.json
    python -m benchmarks.engine --device cuda --preset full --batch 1 8 32 --steps 1 5 25 --out engine-gpu.json

The plain providers run the same weights on PyTorch's own operations, without our ops: `naive` in float32 and
contiguous, `eager` in bfloat16 and channels-last, `eager + graph` that in a CUDA graph, `compile` through torch.compile
(mode max-autotune). Ours: `engine` as a user gets it, `engine fp32`, `engine deterministic`, `engine step` (one
captured step) and `engine eager` (our ops, no graph). Pictures are compared with naive's before the clock starts. On a
CPU the providers take turns in one process, so that only ratios within a run mean something. Stages are timed by
themselves, and the queue (`submit`) last. Full size: published widths and random weights, for the clock alone.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin disturb each other
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import copy
import json
import math
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import lpmrf_fast
import lpmrf_kernels as ops
from lpmrf_fast import flow, models
from lpmrf_fast.engine import Engine
from lpmrf_fast.engine.graphs import CudaDevice
from lpmrf_fast.pipeline import LatentPMRFPipeline, Pipeline
from lpmrf_kernels import reference

from . import machine

FULL = ("swinir-l", "sim-vae-c32", "loouformer")
EXAMPLE = Path(lpmrf_fast.__file__).parent / "weights/demo/example.jpg"


# ---- what is compared


def load(preset: str, dtype: torch.dtype, device: str) -> Pipeline:
    """The bundled pipeline, or the published sizes with random weights, the same for the same seed."""
    if preset == "bundled":
        pipe = Pipeline.from_pretrained(dtype="fp32", device=device)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            networks = [cls(**config) for cls, config in (models.PRESETS[name] for name in FULL)]
        pipe = LatentPMRFPipeline(*networks)
    return pipe.to(dtype=dtype)


@contextmanager
def plain():
    """Models built of PyTorch's own operations: our ops are their references, which torch.compile sees through."""
    ours = {name: getattr(ops, name) for name in ops.__all__ if hasattr(reference, name)}
    try:
        for name in ours:
            setattr(ops, name, getattr(reference, name))
        yield
    finally:
        for name, op in ours.items():
            setattr(ops, name, op)


def plainly(pipe: Pipeline, memory_format) -> Pipeline:
    """The pipeline with nothing folded or made in advance, its activations in a memory format."""
    twin = copy.deepcopy(pipe)
    for network in twin.modules.values():
        network.to(memory_format=memory_format)
        for module in network.modules():
            if hasattr(module, "folded"):
                module.forward = lambda x, conv=module.conv: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    dtype = next(twin.velocity.parameters()).dtype

    def run(network, x, *args):
        return network(x.to(dtype, memory_format=memory_format), *args).float()

    def velocity_at(z, t, *_):
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(z.shape[0])
        return flow.velocity(twin.velocity, z.to(dtype, memory_format=memory_format), t, twin.time_runs_down)

    twin._run, twin.velocity_at, twin.tables = run, velocity_at, lambda *_: None
    return twin


class Plain:
    """What a user writes: the stages, one after the other."""

    def __init__(self, pipe: Pipeline, compiled: bool = False):
        self.pipe = pipe
        for network in pipe.modules.values() if compiled else ():
            for module in network.children() if hasattr(network, "encode") else (network,):
                module.compile(mode="max-autotune", dynamic=False)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seeds: list[int], steps: int) -> Tensor:
        with plain():
            x, _ = self.pipe.restore(pixels.float() / 255, steps, seeds)
        return (x * 255).round().to(torch.uint8)


class Ours:
    def __init__(self, pipe: Pipeline, context=nullcontext, **options):
        with context():
            self.engine = Engine(pipe, **options)
        self.context = context

    def __call__(self, pixels: Tensor, seeds: list[int], steps: int) -> Tensor:
        with self.context():
            return self.engine.restore(pixels, steps, seeds).images


def providers(preset: str, device: str, batch: int, compiled: bool) -> dict:
    """Name → a function that makes a provider, so that its weights are there only while it runs."""
    cuda = device.startswith("cuda")
    fp32, bf16 = (lambda dtype=dtype: load(preset, dtype, device) for dtype in (torch.float32, torch.bfloat16))

    def graphed():  # the plain networks in our graph machinery
        return Ours(plainly(bf16(), torch.channels_last), plain, batch_size=batch, strict=True)

    found = {
        "naive": lambda: Plain(plainly(fp32(), torch.contiguous_format)),
        "eager": lambda: Plain(plainly(bf16(), torch.channels_last)),
        "engine": lambda: Ours(bf16(), batch_size=batch, strict=cuda),
        "engine fp32": lambda: Ours(fp32(), batch_size=batch, strict=cuda),
        "engine deterministic": lambda: Ours(bf16(), batch_size=batch, deterministic=True, strict=cuda),
    }
    if cuda:
        found["eager + graph"] = graphed
        found["engine step"] = lambda: Ours(bf16(), batch_size=batch, mode="step", strict=True)
        found["engine eager"] = lambda: Ours(bf16(), batch_size=batch, mode="eager")
    if compiled:
        found["compile"] = lambda: Plain(plainly(bf16(), torch.channels_last), compiled=True)
    return found


# ---- clocks


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def clock(function, device: str) -> tuple[float, object]:
    """Seconds of one call, from the call to the finished result, and that."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


def summary(times: list[float], batch: int) -> dict:
    p50, p90, p99 = (float(np.quantile(times, share)) for share in (0.5, 0.9, 0.99))
    return {"seconds": p50, "seconds_p90": p90, "seconds_p99": p99, "times": len(times), "images_per_s": batch / p50}


def difference(a: Tensor, b: Tensor) -> dict:
    """In 8-bit levels and decibels."""
    d = a.float() - b.float()
    error = d.square().mean().item()
    return {
        "levels": int(d.abs().max()),
        "psnr_of_naive": round(10 * math.log10(255**2 / error), 2) if error else math.inf,
    }


def photos(device: str, size: int, batch: int) -> Tensor:
    """The degraded face of the example picture, turned and mirrored: (batch, 3, size, size) uint8."""
    with Image.open(EXAMPLE) as picture:
        side = picture.height - 44  # below the strip with the labels
        face = picture.convert("RGB").crop((0, 44, side, 44 + side)).resize((size, size), Image.Resampling.BICUBIC)
    face = torch.from_numpy(np.array(face)).permute(2, 0, 1)
    turned = [face, face.flip(2), face.roll(size // 8, 1), face.roll(size // 8, 2)]
    return torch.stack([turned[i % 4] for i in range(batch)]).to(device)


# ---- running


def whole(preset, device, size, batch, steps, compiled, chosen, seconds) -> list[dict]:
    """Rows of one batch size and number of steps, end to end."""
    pixels, seeds = photos(device, size, batch), list(range(batch))
    rows, ready, naive = {}, {}, None
    for name, make in providers(preset, device, batch, compiled).items():
        if chosen and name not in (*chosen, "naive"):
            continue
        row = rows[name] = {"provider": name}
        try:
            started = time.perf_counter()
            provider = make()
            row["load_seconds"] = round(time.perf_counter() - started, 3)

            def call(provider=provider):
                return provider(pixels, seeds, steps)

            row["first_call_seconds"], result = clock(call, device)
            row["second_call_seconds"], result = clock(call, device)  # in which the engine captures
            naive = result if name == "naive" else naive
            if naive is not None:
                row |= difference(result, naive)
            if isinstance(provider, Ours) and provider.engine.captures:
                captured = provider.engine.captures[-1]
                row |= {"capture_seconds": captured.seconds, "graph_nodes": captured.nodes}
                row["graph_bytes"] = captured.pool_bytes + captured.bytes
            if device.startswith("cuda"):  # one at a time: they need the memory
                torch.cuda.reset_peak_memory_stats()
                times = until(lambda: clock(call, device)[0], seconds)
                row |= summary(times, batch) | {"peak_bytes": torch.cuda.max_memory_allocated()}
                if isinstance(provider, Ours):
                    provider.engine.close()
                del provider, call, result
                torch.cuda.empty_cache()
            else:
                ready[name] = call
        except Exception as failure:  # whatever a provider raises is the row
            row["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    times = {name: [] for name in ready}
    end, names = time.perf_counter() + seconds * len(ready), list(ready)
    while ready and (time.perf_counter() < end or len(times[names[0]]) < 3):
        for name in names:
            times[name].append(clock(ready[name], device)[0])
        names.reverse()  # nobody always follows the same one
    for name in ready:
        rows[name] |= summary(times[name], batch)
    base = rows["naive"].get("seconds")
    for row in rows.values():
        row |= {"batch": batch, "steps": steps, "size": size}
        if base and "seconds" in row:
            row["speed_of_naive"] = round(base / row["seconds"], 2)
    return list(rows.values())


def until(measure, seconds: float, least: int = 5) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        times.append(measure())
    return times


def stages(preset, device, size, batch, seconds) -> list[dict]:
    """Seconds of each stage by itself, in bfloat16 as the engine runs it; in a graph on a GPU."""
    pipe = load(preset, torch.bfloat16, device)
    with torch.no_grad(), Engine(pipe, batch_size=batch) as engine:
        s = engine.stages
        y = photos(device, size, batch).float() / 255
        mean = s.predict_mean(y)
        z = s.add_noise(s.encode(mean), list(range(batch)))
        t = torch.full((batch,), 0.5, device=device)
        parts = {
            "posterior mean": lambda: s.predict_mean(y),
            "encode": lambda: s.encode(mean),
            "one step": lambda: ops.euler_step(z, s.velocity_at(z, t), 0.04),
            "decode": lambda: s.decode(z),
        }
        rows = []
        for name, run in parts.items():
            row = {"stage": name, "batch": batch, "size": size}
            try:
                if engine._graphs:
                    capturer = CudaDevice(engine.device)
                    plan = engine.plan(size, size, batch)
                    (run,), row["graph_nodes"], *_ = capturer.capture([run], capturer.new_pool(), plan)
                run()
                row |= summary(until(lambda run=run: clock(run, device)[0], seconds), batch)
            except Exception as failure:
                row["failed"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            rows.append(row)
    return rows


def queue(preset, device, size, batch, steps, batches) -> dict:
    """The feeding side: batches in the CPU's memory through `submit`, as the batch job does it."""
    pixels = photos("cpu", size, batch)
    with Engine(load(preset, torch.bfloat16, device), batch_size=batch) as engine:
        engine.warm_up(size, size, batch, steps)
        for future in [engine.submit(pixels, steps) for _ in range(batches)]:
            future.result()
        s = engine.statistics
    return {
        "queue": f"{batches} batches",
        "batch": batch,
        "steps": steps,
        "size": size,
        "images_per_s": s.images_per_second,
        "idle_share": s.idle_share,
        "copy_in_seconds": s.copy_in,
        "compute_seconds": s.compute,
        "copy_out_seconds": s.copy_out,
    }


def table(rows: list[dict]) -> str:
    titles = ("ms/image", 11), ("p99", 10), ("images/s", 10), ("x naive", 9), ("dB", 7), ("levels", 7)
    lines = [f"{'what':26}{'batch':>6}{'K':>4}" + "".join(title.rjust(width) for title, width in titles)]
    for row in rows:
        name = row.get("provider") or row.get("stage") or row.get("queue")
        text = f"{name:26}{row['batch']:6}{row.get('steps', ''):>4}"
        if "seconds" in row:
            text += f"{row['seconds'] / row['batch'] * 1e3:11.2f}{row['seconds_p99'] / row['batch'] * 1e3:10.2f}"
        else:
            text += f"{'':21}"
        if "images_per_s" in row:
            text += f"{row['images_per_s']:10.2f}{row.get('speed_of_naive', ''):>9}"
            text += f"{row.get('psnr_of_naive', ''):>7}{row.get('levels', ''):>7}"
        if "idle_share" in row:
            text += f"  idle {row['idle_share']:.0%}"
        lines.append(text + (f"  {row['failed'][:80]}" if "failed" in row else ""))
    return "\n".join(lines)


def run(device, preset, size, batches, steps, compiled, chosen, seconds, out=None, log=print) -> dict:
    """The report: machine and rows, written to `out` as they come."""
    started, rows = time.time(), []
    report = {"machine": machine.describe(device), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    report |= {"preset": preset, "rows": rows}

    def add(new):
        log(table(new).partition("\n")[2] if rows else table(new))
        rows.extend(new)
        report["seconds"] = round(time.time() - started, 1)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")

    for batch in batches:
        for k in steps:
            add(whole(preset, device, size, batch, k, compiled, chosen, seconds))
        add(stages(preset, device, size, batch, seconds / 4))
        add([queue(preset, device, size, batch, max(steps), 8 if device.startswith("cuda") else 2)])
    return report


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--preset", choices=("bundled", "full"), default="bundled", help="networks")
    parser.add_argument("--size", type=int, default=512, help="side of the photos")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 on a CPU, 1 8 32 on a GPU")
    parser.add_argument("--steps", type=int, nargs="+", help="default: 25 on a CPU, 1 5 25 on a GPU")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these beside naive")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each provider's clock (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; use --device cpu")
    batches, steps = args.batch or ([1, 8, 32] if cuda else [1]), args.steps or ([1, 5, 25] if cuda else [25])
    compiled = args.compile or "compile" in (args.only or ())
    run(args.device, args.preset, args.size, batches, steps, compiled, args.only, args.seconds, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
