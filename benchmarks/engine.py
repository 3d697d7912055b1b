"""How fast is a whole restoration, uint8 in and uint8 out, beside the plain networks and torch.compile of them?

    python -m benchmarks.engine --device cpu --out benchmarks/results/engine-cpu.json
    python -m benchmarks.engine --device cpu --batch 4 --only "engine fp32" --parts providers --add --out engine.json
    python -m benchmarks.engine --device cuda --preset full --batch 1 8 32 --steps 1 5 25 --out engine-gpu.json

The plain providers run the same weights on PyTorch's own operations, without our ops: `naive` in float32 and
contiguous, `eager` in bfloat16 and channels-last, `eager + graph` that in a CUDA graph, `compile` through torch.compile
(mode max-autotune). Ours: `engine` as a user gets it, in bfloat16, `engine fp32`, `engine deterministic`, `engine step`
(one captured step) and `engine eager` (our ops, no graph). Pictures are compared with naive's before the clock starts.
On a CPU every provider is a process of its own, so that none has what another one sets, and they take turns: only
ratios within a run mean something. A GPU has one provider at a time. `stage` rows time parts by themselves, `queue` is
the feeding side (`submit`), `cold start` a new process up to its first restored batch. Full size: published widths and
random weights, for the clock alone.
"""

import argparse
import copy
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

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
PARTS = ("cold start", "providers", "stages", "queue")
EXAMPLE = Path(lpmrf_fast.__file__).parent / "weights/demo/example.jpg"


# ---- what is compared


def load(preset: str, dtype: torch.dtype, device: str) -> Pipeline:
    """A checkpoint ("bundled", or a folder), or "full": the published sizes with random weights, the same each time."""
    if preset == "full":
        torch.manual_seed(0)
        with torch.device(device):
            networks = [cls(**config) for cls, config in (models.PRESETS[name] for name in FULL)]
        pipe = LatentPMRFPipeline(*networks)
    else:
        pipe = Pipeline.from_pretrained(None if preset == "bundled" else preset, dtype="fp32", device=device)
    return pipe.to(dtype=dtype)


@contextmanager
def plain():
    """Models of PyTorch's own layers and operations: our ops are their references, which torch.compile sees through."""
    with ExitStack() as stack:
        for name in ops.__all__:
            if hasattr(reference, name):
                stack.enter_context(patch.object(ops, name, getattr(reference, name)))
        stack.enter_context(patch.object(flow, "euler_step", reference.euler_step))
        stack.enter_context(patch.object(models.layers, "linear", plain_linear))
        for module in vars(models).values():
            if hasattr(module, "pointwise"):
                stack.enter_context(patch.object(module, "pointwise", plain_pointwise))
        yield


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def plain_pointwise(layer: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, torch.nn.Conv2d):
        return layer(x)
    return F.linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias).permute(0, 3, 1, 2)


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

    context = staticmethod(plain)

    def __init__(self, pipe: Pipeline, compiled: bool = False):
        self.stages = pipe
        for network in pipe.modules.values() if compiled else ():
            for module in network.children() if hasattr(network, "encode") else (network,):
                module.compile(mode="max-autotune", dynamic=False)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seeds: list[int], steps: int) -> Tensor:
        with plain():
            x, _ = self.stages.restore(pixels.float() / 255, steps, seeds)
        return (x * 255).round().to(torch.uint8)


class Ours:
    def __init__(self, pipe: Pipeline, context=nullcontext, **options):
        with context():
            self.engine = Engine(pipe, **options)
        self.context, self.stages = context, self.engine.stages

    def __call__(self, pixels: Tensor, seeds: list[int], steps: int) -> Tensor:
        with self.context():
            return self.engine.restore(pixels, steps, seeds).images


def stage_functions(provider: Plain | Ours, pixels: Tensor, seeds: list[int], steps: int) -> dict:
    """Stage → a function that runs it by itself, "steps" all of them."""
    s, device = provider.stages, pixels.device
    lanes = getattr(getattr(provider, "engine", None), "_lanes", None)
    if lanes and len(pixels) > 1:  # photo by photo, side by side, as the engine does it
        photo = [stage_functions(provider, pixels[i : i + 1], seeds[i : i + 1], steps) for i in range(len(pixels))]
        return {name: lambda name=name: lanes.run([p[name] for p in photo]) for name in photo[0]}

    def inside(function):
        def run():
            with torch.inference_mode(), provider.context():
                return function()

        return run

    y = pixels.float() / 255
    mean = inside(lambda: s.predict_mean(y))()
    z = inside(lambda: s.add_noise(s.encode(mean), seeds))()
    times = torch.tensor(flow.time_grid(steps, s.eps)[:-1], device=device)
    tables = inside(lambda: s.tables(times, *z.shape[-2:]))()

    def sample():
        x = z
        for k in range(steps):
            x = s.euler_step(x, times[k], 1 / steps, tables, k)
        return x

    found = {
        "posterior mean": lambda: s.predict_mean(y),
        "encode": lambda: s.encode(mean),
        "steps": sample,
        "decode": lambda: s.decode(z),
    }
    return {name: inside(function) for name, function in found.items()}


def providers(preset: str, device: str, batch: int, compiled: bool) -> dict:
    """Name → a function that makes a provider, so that its weights are there only while it runs."""
    cuda = device.startswith("cuda")
    fp32, bf16 = (lambda dtype=dtype: load(preset, dtype, device) for dtype in (torch.float32, torch.bfloat16))

    def graphed():  # the plain networks in our graph machinery
        return Ours(plainly(bf16(), torch.channels_last), plain, batch_size=batch, strict=True)

    found = {  # in this order, so that a run that is cut off has the ones that matter
        "naive": lambda: Plain(plainly(fp32(), torch.contiguous_format)),
        "engine": lambda: Ours(bf16(), batch_size=batch, strict=cuda),
        "eager": lambda: Plain(plainly(bf16(), torch.channels_last)),
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
        "psnr_of_naive": round(10 * math.log10(255**2 / error), 2) if error else None,
    }


def photos(device: str, size: int, batch: int) -> Tensor:
    """The degraded face of the example picture, turned and mirrored: (batch, 3, size, size) uint8."""
    with Image.open(EXAMPLE) as picture:
        side = picture.height - 44  # below the strip with the labels
        face = picture.convert("RGB").crop((0, 44, side, 44 + side)).resize((size, size), Image.Resampling.BICUBIC)
    face = torch.from_numpy(np.array(face)).permute(2, 0, 1)
    turned = [face, face.flip(2), face.roll(size // 8, 1), face.roll(size // 8, 2)]
    return torch.stack([turned[i % 4] for i in range(batch)]).to(device)


# ---- a process of its own


def serve(connection, name: str, preset: str, device: str, size: int, batch: int, steps: int, compiled: bool) -> None:
    """The other end of `Apart`: answers (seconds, pixels or None) or a line of what failed."""
    try:
        pixels, seeds = photos(device, size, batch), list(range(batch))
        provider = providers(preset, device, batch, compiled)[name]()
        stages = None
        while (what := connection.recv()) is not None:
            if what != WHOLE and stages is None:
                stages = stage_functions(provider, pixels, seeds, steps)
            run = (lambda: provider(pixels, seeds, steps)) if what == WHOLE else stages[what]
            seconds, result = clock(run, device)
            connection.send((seconds, result.cpu().numpy() if what == WHOLE else None))
    except Exception as failure:  # whatever it is, it is the row
        connection.send(line(failure))


WHOLE = "the whole restoration"


class Apart:
    """A provider in a process of its own. Calls raise RuntimeError with what failed there."""

    def __init__(self, name: str, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.started = time.perf_counter()
        self.process = context.Process(target=serve, args=(theirs, name, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, what: str = WHOLE) -> tuple[float, np.ndarray | None]:
        """Seconds there, and the pixels of the whole restoration."""
        try:
            self.connection.send(what)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()


def line(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]


def in_turns(runs: dict, seconds: float, least: int = 2) -> dict[str, list[float]]:
    """Seconds of each of runs, name → function that returns them, for about `seconds` each."""
    times, end, names = {name: [] for name in runs}, time.perf_counter() + seconds * len(runs), list(runs)
    while names and (time.perf_counter() < end or len(times[names[0]]) < least):
        for name in names:
            times[name].append(runs[name]())
        names.reverse()  # nobody always follows the same one
    return times


# ---- rows


def on_cpu(preset, device, size, batch, steps, compiled, chosen, seconds, staged=True) -> list[dict]:
    """Rows of one batch size, end to end and, where `staged`, stage by stage."""
    arguments = (preset, device, size, batch, steps, compiled)
    rows, ready, naive = {}, {}, None
    try:
        for name in wanted(providers(preset, device, batch, compiled), chosen):
            row = rows[name] = {"provider": name}
            process = Apart(name, *arguments)
            try:
                row["first_call_seconds"], result = process()
                row["cold_start_seconds"] = time.perf_counter() - process.started
                naive = result if name == "naive" else naive
                if naive is not None:
                    row |= difference(torch.from_numpy(result), torch.from_numpy(naive))
                ready[name] = process
            except RuntimeError as failure:
                row["failed"] = str(failure)
                process.close()
        for name, times in in_turns({n: lambda p=p: p()[0] for n, p in ready.items()}, seconds).items():
            rows[name] |= summary(times, batch)
        stages = []
        for stage in ("posterior mean", "encode", "steps", "decode") if staged else ():
            for process in ready.values():
                process(stage)
            times = in_turns({n: lambda p=p, stage=stage: p(stage)[0] for n, p in ready.items()}, seconds / 8)
            stages += [{"stage": stage, "of": n} | summary(t, batch) for n, t in times.items()]
    finally:
        for process in ready.values():
            process.close()
    return compared([*rows.values(), *stages], batch, steps, size)


def on_gpu(preset, device, size, batch, steps, compiled, chosen, seconds) -> Iterator[dict]:
    """Rows of one batch size and number of steps, end to end; one provider at a time: they need the memory."""
    pixels, seeds = photos(device, size, batch), list(range(batch))
    rows, naive = [], None
    found = providers(preset, device, batch, compiled)
    for name in wanted(found, chosen):
        row = {"provider": name}
        rows.append(row)
        provider = result = None
        try:
            started = time.perf_counter()
            provider = found[name]()
            row["load_seconds"] = round(time.perf_counter() - started, 3)
            row["first_call_seconds"], result = clock(lambda p=provider: p(pixels, seeds, steps), device)
            if isinstance(provider, Ours):  # which captures in its second call
                row["second_call_seconds"], result = clock(lambda p=provider: p(pixels, seeds, steps), device)
            naive = result if name == "naive" else naive
            if naive is not None:
                row |= difference(result, naive)
            if isinstance(provider, Ours) and provider.engine.captures:
                captured = provider.engine.captures[-1]
                row |= {"capture_seconds": captured.seconds, "graph_nodes": captured.nodes}
                row["graph_bytes"] = captured.pool_bytes + captured.bytes
                row["predicted_peak_bytes"] = provider.engine.estimate(captured.plan).peak
            torch.cuda.reset_peak_memory_stats()
            times = until(lambda p=provider: clock(lambda: p(pixels, seeds, steps), device)[0], seconds)
            row |= summary(times, batch) | {"peak_bytes": torch.cuda.max_memory_allocated()}
            row["gpu_state"] = machine.gpu_state(device)
        except Exception as failure:  # whatever a provider raises is the row
            row["failed"] = line(failure)
        if isinstance(provider, Ours):
            provider.engine.close()
        del provider, result
        torch.cuda.empty_cache()
        yield compared(rows, batch, steps, size)[-1]


def wanted(names, chosen) -> list[str]:
    return [name for name in names if not chosen or name in (*chosen, "naive")]


def compared(rows: list[dict], batch: int, steps: int, size: int) -> list[dict]:
    """The rows with the ratio of naive's seconds for the same to theirs."""
    base = {row.get("stage"): row.get("seconds") for row in rows if "naive" in (row.get("provider"), row.get("of"))}
    for row in rows:
        row |= {"batch": batch, "steps": steps, "size": size}
        if base.get(row.get("stage")) and "seconds" in row:
            row["speed_of_naive"] = round(base[row.get("stage")] / row["seconds"], 2)
    return rows


def until(measure, seconds: float, least: int = 3) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        times.append(measure())
    return times


def graphed_stages(preset, device, size, batch, steps, seconds) -> Iterator[dict]:
    """Seconds of each stage in a CUDA graph of its own, in bfloat16 as the engine runs it."""
    with Engine(load(preset, torch.bfloat16, device), batch_size=batch) as engine:
        provider = Ours.__new__(Ours)
        provider.engine, provider.context, provider.stages = engine, nullcontext, engine.stages
        for name, run in stage_functions(provider, photos(device, size, batch), list(range(batch)), steps).items():
            row = {"stage": name, "of": "engine", "batch": batch, "steps": steps, "size": size}
            try:
                capturer, plan = CudaDevice(engine.device), engine.plan(size, size, batch, steps)
                (replay,), row["graph_nodes"], *_ = capturer.capture([run], capturer.new_pool(), plan)
                replay()
                row |= summary(until(lambda replay=replay: clock(replay, device)[0], seconds), batch)
            except Exception as failure:
                row["failed"] = line(failure)
            yield row


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


def cold_start(preset, device, size, steps) -> dict:
    """Seconds from a new process to its first restored photo, the imports and the checkpoint included."""
    process = Apart("engine", preset, device, size, 1, steps, False)
    try:
        process()
        seconds = time.perf_counter() - process.started
    finally:
        process.close()
    return {"queue": "cold start", "batch": 1, "steps": steps, "size": size, "cold_start_seconds": seconds}


def attempted(name: str, function, *arguments) -> Iterator[dict]:
    """The rows that a part of the report makes, as they come, and one that says why there are no more of them."""
    try:
        rows = function(*arguments)
        yield from [rows] if isinstance(rows, dict) else rows
    except Exception as failure:
        yield {"queue": name, "batch": 0, "failed": line(failure)}


def networks(preset: str) -> dict[str, str]:
    """Which networks a checkpoint has: classes and millions of parameters. Times do not depend on their values."""
    try:
        modules = load(preset, torch.float32, "cpu").modules
    except ValueError:  # every row will say so
        return {}
    return {k: f"{type(m).__name__}, {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for k, m in modules.items()}


def table(rows: list[dict], head: bool = True) -> str:
    titles = ("ms/image", 11), ("p99", 10), ("images/s", 10), ("x naive", 9), ("dB", 7), ("levels", 7)
    lines = head * [f"{'what':36}{'batch':>6}{'K':>4}" + "".join(title.rjust(width) for title, width in titles)]
    for row in rows:
        name = row.get("provider") or row.get("queue") or f"  {row['stage']}, {row['of']}"
        text = f"{name:36}{row['batch']:6}{row.get('steps', ''):>4}"
        if "seconds" in row:
            text += f"{row['seconds'] / row['batch'] * 1e3:11.2f}{row['seconds_p99'] / row['batch'] * 1e3:10.2f}"
        else:
            text += f"{'':21}"
        if "images_per_s" in row:
            text += f"{row['images_per_s']:10.2f}{row.get('speed_of_naive', ''):>9}"
            text += f"{row.get('psnr_of_naive') or '':>7}{row.get('levels', ''):>7}"
        if "idle_share" in row:
            text += f"  idle {row['idle_share']:.0%}"
        if "cold_start_seconds" in row:
            text += f"  cold start {row['cold_start_seconds']:.1f} s"
        lines.append(text + (f"  {row['failed'][:80]}" if "failed" in row else ""))
    return "\n".join(lines)


def run(
    device, preset, size, batches, steps, compiled, chosen, seconds, out=None, log=print, parts=PARTS, before=None
) -> dict:
    """The report: runs, each with its command and machine, and rows, written to `out` as they come.

    before: the report of earlier runs, which this one goes behind.
    """
    started, cuda = time.time(), device.startswith("cuda")
    report = before or {"runs": [], "rows": []}
    about = {
        "run": len(report["runs"]) + 1,
        "command": shlex.join(["python", "-m", "benchmarks.engine", *sys.argv[1:]]),
    }
    about |= {"preset": preset, "machine": machine.describe(device)}
    about["started"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if preset != "full":
        about["networks"] = networks(preset)
    report["runs"].append(about)

    def add(part, function, *arguments):
        if part not in parts:
            return
        for row in attempted(part, function, preset, device, size, *arguments):
            log(table([row], head="seconds" not in about))
            report["rows"].append(row | {"run": about["run"]})
            about["seconds"] = round(time.time() - started, 1)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1) + "\n")

    for batch in batches:
        for k in steps:
            if cuda:
                add("providers", on_gpu, batch, k, compiled, chosen, seconds)
            else:
                add("providers", on_cpu, batch, k, compiled, chosen, seconds, "stages" in parts)
        if cuda:
            add("stages", graphed_stages, batch, max(steps), seconds / 4)
        add("queue", queue, batch, max(steps), 8 if cuda else 2)
    if cuda:  # on a CPU every provider's row has it
        add("cold start", cold_start, max(steps))
    return report


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--preset", default="bundled", help="networks: bundled, full, or a checkpoint's folder")
    parser.add_argument("--size", type=int, default=512, help="side of the photos")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 4 on a CPU, 1 8 32 on a GPU")
    parser.add_argument("--steps", type=int, nargs="+", help="default: 25 on a CPU, 1 5 25 on a GPU")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these beside naive")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the report (default: all)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each provider's clock (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument("--add", action="store_true", help="to the rows that OUT has; compare only those of one `run`")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; use --device cpu")
    batches, steps = args.batch or ([1, 8, 32] if cuda else [1, 4]), args.steps or ([1, 5, 25] if cuda else [25])
    compiled = args.compile or "compile" in (args.only or ())
    known = providers(args.preset, args.device, 1, True)
    for name in args.only or ():
        if name not in known:
            parser.error(f"no provider is called {name!r}; there are {', '.join(known)}")
    what = (args.device, args.preset, args.size, batches, steps, compiled, args.only, args.seconds)
    before = json.loads(args.out.read_text()) if args.add and args.out and args.out.exists() else None
    report = run(*what, args.out, parts=args.parts, before=before)
    return int(any("failed" in row for row in report["rows"] if row["run"] == len(report["runs"])))


if __name__ == "__main__":
    sys.exit(main())
