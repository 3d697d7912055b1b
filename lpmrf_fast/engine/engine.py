"""The engine: degraded pixels in, restored pixels out, as one replay a batch on a GPU."""

import contextvars
import logging
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from lpmrf_kernels import registry, use_backend

from .. import flow
from .count import Estimate, estimate
from .graphs import Captured, CudaDevice, Graphs, algorithms
from .lanes import Lanes
from .memory import Room, free_memory, give_back, is_out_of_memory, keep_blocks, parse_bytes
from .plan import MODES, Plan, bucket, resolved_backends
from .prepare import Prepared
from .region import Buffers, Region, Segment
from .staging import CudaLane, HostLane, Job, Statistics, Worker
from .tiles import Box, blended, boxes, fill, tile_seed

log = logging.getLogger("lpmrf_fast.engine")
BUCKETS = 16
"""Buckets whose buffers are kept, least recently used ones go first."""
GPU_BATCH = 32
CPU_BATCH = 8
RESERVE = 0.9
"""Share of the free memory that batches are planned for."""


CLOSED = "this engine is closed; make another one"


class OutOfMemory(RuntimeError):
    """Memory that does not hold one photo, or one tile of it; one line."""


@dataclass
class Restored:
    """What an engine makes of a batch, in its order: (N, 3, H, W) uint8 tensors; for a list, and for views, lists of
    (3, H, W)."""

    images: Tensor | list[Tensor]
    posterior_means: Tensor | list[Tensor]
    finite: Tensor
    """(N,) bool: False for a photo whose result is NaN or infinite; its pixels are worth nothing."""

    @property
    def failed(self) -> list[int]:
        return [i for i, good in enumerate(self.finite.tolist()) if not good]


@dataclass
class Bucket:
    """What an engine holds for a plan."""

    buffers: Buffers
    segments: list[Segment]
    uses: int = 0
    photos: "list[Bucket]" = field(default_factory=list)
    """On a CPU, where every photo runs by itself: buckets of one photo over the rows of the buffers."""


class Engine:
    """A pipeline made fast: batches of uint8 photos of any size, on the device and in the dtypes of its networks.

    pipeline: a LatentPMRFPipeline or PMRFPipeline; its weights are shared, not copied. Moving or casting it later
        leaves the engine as it is; new weights copied into it (or `load_state_dict` here) take effect.
    batch_size: photos of one padded size that run together at most. None: as many as memory holds, up to 32 on a GPU,
        and on a CPU up to one a thread and 8. A GPU's batches are padded to powers of two; on a CPU every photo runs by
        itself, those of a batch side by side, each on its share of the threads.
    max_memory: bytes, or text such as "8GB", that weights, activations and graphs may take, as predicted; a photo of
        which not even a tile fits is refused with OutOfMemory. None: what is free.
    mode: see `plan.MODES`; None: "graph" on a GPU, "eager" on a CPU.
    deterministic: one padded batch size for all and fixed algorithms, so that a photo's bits do not depend on its
        company; on a CPU, every photo on one thread.
    strict: a graph that cannot be captured raises CaptureError in place of running eagerly; None: as LPMRF_STRICT says.
    compile: one or several names of networks to put through torch.compile, with its options where it is a dict.
    waiting: batches that `submit` queues before it makes the caller wait.
    capturer: what captures graphs, in place of CUDA; for tests.

    A bucket (padded batch, exact padded height and width, steps) runs eagerly the first time, which warms it up, and
    is captured the second time; `warm_up` does both at once. All methods may be called from any thread; on a GPU,
    `restore` works on the caller's current stream. The caller's autocast, inference mode and default device change
    nothing. On a CPU the process's memory allocator is told to keep large blocks (`memory.keep_blocks`). Close it, or
    use it in a `with`: its thread, once `submit` has started it, keeps it alive.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written outside it
    def __init__(
        self,
        pipeline,
        *,
        batch_size: int | None = None,
        max_memory: int | str | None = None,
        mode: str | None = None,
        deterministic: bool = False,
        strict: bool | None = None,
        compile: Iterable[str] | Mapping[str, dict] = (),
        waiting: int = 2,
        capturer=None,
    ):
        batch_size = None if batch_size is None else _at_least_1("batch_size", batch_size)
        waiting = _at_least_1("waiting", waiting)
        self.device = torch.device(pipeline.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
            capturer = capturer or CudaDevice(self.device)
        self.mode = ("graph" if capturer else "eager") if mode is None else mode
        if self.mode not in MODES:
            raise ValueError(f"Engine: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if self.mode == "graph" and not capturer:
            raise ValueError(f"Engine: mode 'graph' needs a CUDA device, these networks are on {self.device}")
        self.deterministic, self.max_memory = deterministic, None if max_memory is None else parse_bytes(max_memory)
        self.batch_size = batch_size
        compile = (compile,) if isinstance(compile, str) else compile
        compile = compile if isinstance(compile, Mapping) else dict.fromkeys(compile, {})
        self._prepared = Prepared(pipeline, compile)
        self.stages = self._prepared.stages
        self._forced = registry.forced_backend()
        self._context = contextvars.copy_context()  # other choices of backends, such as use_attention's
        self._backends = resolved_backends(self.device, self._forced)
        self._region = Region(self.stages)
        strict = registry.strict() if strict is None else strict
        budget = self.max_memory and max(1, self.max_memory - self.weight_bytes)
        self._graphs = Graphs(capturer, budget, strict) if capturer and self.mode != "eager" else None
        self._lanes = Lanes(deterministic) if self.device.type == "cpu" and not self._graphs else None
        if self.device.type == "cpu":
            keep_blocks()
        self._buckets: OrderedDict[Plan, Bucket] = OrderedDict()
        self._room: Room | None = None
        self._waiting = waiting
        self._worker: Worker | None = None
        self._closed = self._ended = False
        """Nothing new is taken; nothing runs any more."""
        self._lock = threading.RLock()
        self._last_use = None
        """Event behind the last use of the static buffers: streams follow one another by it."""

    def __repr__(self) -> str:
        held = len(self._graphs.plans) if self._graphs else 0
        return f"Engine({type(self.stages).__name__}, {self.device}, mode={self.mode}, {held} graphs)"

    # ---- restoring

    def restore(
        self,
        images: Tensor | Sequence[Tensor],
        num_inference_steps: int = 25,
        seeds: int | Sequence[int] = 0,
        view: bool = False,
    ) -> Restored:
        """Restore a batch in the calling thread, on its current stream.

        images: (N, 3, H, W) uint8, or a list of (3, H, W) whose sizes may differ, on any device; the results are on the
        same one. seeds: one int for every photo alike, or one a photo. view: the results are views of the bucket's
        static buffers, on the engine's device, good until its next batch; they must fit into one.
        """
        job = self._job(images, num_inference_steps, seeds, view)
        device = self.device if view else job.rows[0][0].device

        def keep(results):
            return results if view else [t.clone() if t.device == device else t.to(device) for t in results]

        while job.left:
            plan = None
            try:
                plan, count = self._choose(job)
                if view and count < len(job.rows):
                    raise ValueError(f"a view holds one batch, here {count} photos of one size, got {len(job.rows)}")
                results = self._compute(plan, *job.take(count), job.steps, keep)
            except Exception as error:
                if self._retreat(plan, error) == "tiles":
                    job.begin()
            else:
                job.started += count
                job.landed(*results)
        return job.finish(job.done)

    def submit(
        self, images: Tensor | Sequence[Tensor], num_inference_steps: int = 25, seeds: int | Sequence[int] = 0
    ) -> "Future[Restored]":
        """Queue a batch in the CPU's memory for the engine's own thread; results are in the CPU's memory too.

        While one batch runs, the next is copied in and the last is copied out. Waits while the queue is full. Arguments
        as for `restore`, errors of the restoration are the future's. Its callbacks run in the engine's thread, which
        must not wait for itself: there, `submit` raises RuntimeError while the queue is full, and `close` always.
        """
        job = self._job(images, num_inference_steps, seeds)
        if any(photo.device.type != "cpu" for photo, _ in job.rows):
            raise ValueError("Engine.submit takes photos in the CPU's memory; call restore for those on a device")
        with self._lock:
            self._check_open()
            if self._worker is None:
                lane = CudaLane(self._compute, self.device) if self.device.type == "cuda" else HostLane(self._compute)
                self._worker = Worker(lane, self._choose, self._retreat, self._waiting)
            worker = self._worker
        worker.put(job)
        return job.future

    def warm_up(self, height: int, width: int, batch: int | None = None, num_inference_steps: int = 25) -> Plan:
        """Run a bucket and capture it now; the plan. Raises as restoring does."""
        batch = max(1, self.limit(height, width)) if batch is None else batch
        plan = self.plan(height, width, batch, num_inference_steps)
        for _ in range(2):
            self.replay(plan, num_inference_steps)
        return plan

    def buffers(self, plan: Plan) -> Buffers:
        """A bucket's static tensors, for programs that feed it themselves: write pixels and seeds, then `replay`.

        Both belong on one stream, with nobody else using this plan meanwhile. They stay while the plan is among the
        last ones used (`BUCKETS`); `replay` returns those that it used.
        """
        self._check_open()
        with self._lock, self._on_device():
            return self._bucket(plan).buffers

    def replay(self, plan: Plan, num_inference_steps: int = 25) -> Buffers:
        """Run a bucket on what stands in its buffers, on the current stream; images, means and finite are there then.

        num_inference_steps: those of the plan, or any for one of mode "step".
        """
        self._check_open()
        if plan.steps not in (None, num_inference_steps):
            raise ValueError(f"this plan has {plan.steps} steps, got {num_inference_steps}")
        return self._compute(plan, None, None, num_inference_steps, lambda results: self._buckets[plan].buffers)

    def close(self, cancel: bool = False) -> None:
        """Finish what was submitted (cancel: only what has begun), end the thread, free graphs and buffers."""
        with self._lock:
            worker = self._worker
            if worker is not None and worker.here():
                raise RuntimeError("a future's callback runs in the engine's thread: close the engine in another one")
            self._closed = True
        if worker is not None:
            worker.close(cancel)
        with self._lock:  # a `restore` in another thread ends after the batch that it is at
            self._ended = True
            self._free()
            if self._lanes:
                self._lanes.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.close(cancel=kind is not None)

    # ---- plans and memory

    def plan(self, height: int, width: int, batch: int = 1, num_inference_steps: int = 25) -> Plan:
        """How `batch` photos of a size would run together, in one bucket."""
        flow.time_grid(num_inference_steps)
        H, W = self._padded(height, width)
        limit = max(_at_least_1("batch", batch), self.limit(H, W))
        return Plan(
            batch=limit if self.deterministic else bucket(batch, limit),
            height=H,
            width=W,
            steps=None if self.mode == "step" else int(num_inference_steps),
            device=str(self.device),
            dtypes=dtypes(self.stages),
            mode=self.mode,
            deterministic=self.deterministic,
            backends=self._backends,
        )

    def estimate(self, plan: Plan) -> Estimate:
        """The plan's predicted FLOPs, bytes and memory, stage by stage."""
        return estimate(self.stages, plan)

    def limit(self, height: int, width: int) -> int:
        """How many photos of a size run together; 0: one is cut into tiles."""
        return self._memory().limit(*self._padded(height, width))

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        return self.stages.padded_size(_at_least_1("height", height), _at_least_1("width", width))

    @property
    def weight_bytes(self) -> int:
        networks = self._prepared.networks
        return sum(t.nbytes for t in (*networks.parameters(), *networks.buffers()))

    def _memory(self) -> Room:
        with self._lock:
            if self._room is None:
                gpu, budget, per_pixel = self.device.type == "cuda", None, None
                if self.max_memory:
                    budget = max(1, self.max_memory - self.weight_bytes)
                elif not self.deterministic and (self.batch_size is None or not gpu):
                    # Deterministic results must not depend on the moment. A GPU says when its memory is full; on a CPU
                    # the system ends the process.
                    free = free_memory(self.device)
                    budget = None if free is None else int(RESERVE * free)
                if budget is not None:
                    H, W = self.stages.padded_size(512, 512)
                    plan = Plan(1, H, W, 1, str(self.device), dtypes(self.stages))
                    per_pixel = estimate(self.stages, plan).peak / plan.pixels
                batch_size = self.batch_size or (GPU_BATCH if gpu else min(CPU_BATCH, torch.get_num_threads()))
                together = torch.get_num_threads() if self._lanes else batch_size
                self._room = Room(batch_size, self.stages.padded_size, budget, per_pixel, together)
            return self._room

    # ---- weights

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under their official names, with the network's name in front."""
        return self._prepared.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy new weights in place: captured graphs use them, and what is derived from them is made again.

        Raises CheckpointError, a ValueError, for weights of another architecture.
        """
        with self._lock, self._in_turn():
            self._prepared.load_state_dict(tensors)

    # ---- what happened

    @property
    def statistics(self) -> Statistics:
        """Of what was submitted."""
        return self._worker.statistics if self._worker else Statistics()

    @property
    def captures(self) -> list[Captured]:
        """Every graph capture so far: seconds, memory, nodes."""
        return list(self._graphs.reports) if self._graphs else []

    # ---- one bucket

    def _compute(self, plan: Plan, rows, seeds, steps: int, keep):
        """Run a bucket on the current stream → keep((images, means, finite)), views of as many rows as there are.

        rows: photos, or pixels (n, 3, H, W); None: what stands in the buffers. Whatever the thread, backends are those
        that were chosen where the engine was made.
        """
        return self._context.copy().run(self._compute_here, plan, rows, seeds, steps, keep)

    def _compute_here(self, plan: Plan, rows, seeds, steps: int, keep):
        count = plan.batch if rows is None else len(rows)
        with self._lock, self._on_device(), self._in_turn(), use_backend(self._forced or "auto"):
            if self._ended:
                raise RuntimeError(CLOSED)
            held = self._bucket(plan)
            buffers = held.buffers
            if self._prepared.changed():
                for other in self._buckets.values():
                    for part in (other, *other.photos):
                        part.buffers.stale = True
            if isinstance(rows, Tensor):
                buffers.pixels[:count].copy_(rows)
            elif rows is not None:
                fill(buffers.pixels, rows)
            if seeds is not None:
                seeds = seeds if isinstance(seeds, Tensor) else torch.tensor(seeds, dtype=torch.int64, device="cpu")
                buffers.seeds[:count].copy_(seeds)
            if held.photos:
                self._lanes.run([partial(self._run, plan, photo, steps) for photo in held.photos[:count]])
            else:
                self._run(plan, held, steps)
            return keep([t[:count] for t in (buffers.images, buffers.means, buffers.finite)])

    @torch.inference_mode()
    def _run(self, plan: Plan, held: Bucket, steps: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # the caller's, which other threads do not have
            self._run_segments(plan, held, steps)

    def _run_segments(self, plan: Plan, held: Bucket, steps: int) -> None:
        held.buffers.set_grid(steps, self.stages.eps)
        self._region.refresh(held.buffers)
        runs = [segment.run for segment in held.segments]
        fixed = plan.deterministic and self.device.type == "cuda"
        with algorithms(True) if fixed else nullcontext():
            if self._graphs and held.uses:
                captured = self._graphs.get(plan) or self._graphs.capture(plan, runs)
                runs = captured.replays if captured else runs
            for segment, run in zip(held.segments, runs):
                for _ in range(steps if segment.repeats else 1):
                    run()
        held.uses += 1

    @torch.inference_mode(False)
    def _bucket(self, plan: Plan) -> Bucket:
        held = self._buckets.get(plan)
        if held is None:
            while len(self._buckets) >= BUCKETS:
                self._synchronize()
                old, _ = self._buckets.popitem(last=False)
                if self._graphs:
                    self._graphs.drop(old)
            buffers = Buffers(plan, self.device, self.stages.state_dtype)
            held = self._buckets[plan] = Bucket(buffers, self._region.segments(plan, buffers))
            if self._lanes:
                one, rows = replace(plan, batch=1), (buffers.row(i) for i in range(plan.batch))
                held.photos = [Bucket(row, self._region.segments(one, row)) for row in rows]
        self._buckets.move_to_end(plan)
        return held

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(CLOSED)

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _in_turn(self):
        return _InTurn(self) if self.device.type == "cuda" else nullcontext()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _free(self) -> None:
        with self._lock:
            self._synchronize()
            self._buckets.clear()
            if self._graphs:
                self._graphs.clear()
            give_back(self.device)

    # ---- jobs

    def _job(self, images, steps, seeds, view: bool = False) -> Job:
        self._check_open()
        flow.time_grid(steps)
        photos = _photos(images)
        seeds = _seeds(seeds, len(photos))

        def cut():
            rows, places = [], []
            for photo, seed in zip(photos, seeds):
                tiles = self._tiles(*photo.shape[-2:])
                places.append(tiles)
                rows += [(box.of(photo), tile_seed(seed, i)) for i, box in enumerate(tiles)]

            def finish(done) -> Restored:
                done, results = iter(done), []
                for photo, tiles in zip(photos, places):
                    *pictures, finite = zip(*(next(done) for _ in tiles))
                    whole = (blended(parts, tiles, *photo.shape[-2:]) for parts in pictures)
                    results.append((*whole, torch.stack(finite).all()))
                pictures, means, finite = zip(*results)
                if isinstance(images, Tensor) and not view:
                    return Restored(torch.stack(pictures), torch.stack(means), torch.stack(finite))
                return Restored(list(pictures), list(means), torch.stack(finite))

            return rows, finish

        return Job(cut, int(steps))

    def _tiles(self, height: int, width: int) -> list[Box]:
        return boxes(height, width, self._memory().tile(*self.stages.padded_size(height, width)))

    def _choose(self, job: Job) -> tuple[Plan, int]:
        """The plan of the next rows of a job, and how many they are."""
        sizes = [self.stages.padded_size(*photo.shape[-2:]) for photo, _ in job.left[: self._memory().batch_size]]
        count = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
        count = min(count, max(1, self.limit(*sizes[0])))
        self._check_room(*sizes[0])
        return self.plan(*sizes[0], count, job.steps), count

    def _check_room(self, height: int, width: int) -> None:
        """Raises OutOfMemory where `max_memory` does not hold one photo, or tile, of a padded size."""
        room = self._memory()
        if self.max_memory and height * width > room.pixels:
            need, given = self.weight_bytes + height * width * room.bytes_per_pixel, self.max_memory
            raise OutOfMemory(
                f"max_memory: {width}x{height} pixels take about {need / 1e6:,.0f} MB with the networks,"
                f" {given / 1e6:,.0f} MB are given; give more, or a smaller picture"
            )

    def _retreat(self, plan: Plan | None, error: Exception) -> str:
        """What to do about a batch that failed: "batch", it may be smaller now; "tiles", or its photos in tiles.

        Raises where nothing helps.
        """
        if plan is None or not is_out_of_memory(error):
            raise error
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the attempt
        with self._lock:
            self._free()
            smaller = not self.deterministic and self._memory().shrink(plan.height, plan.width, plan.batch)
        if not smaller:
            raise OutOfMemory(
                f"out of memory at {plan.width}x{plan.height} pixels{f', {plan.batch} at once' * (plan.batch > 1)}; use"
                " a smaller picture, another device or more memory"
            ) from error
        log.info("out of memory: %s; trying less", str(plan).splitlines()[0])
        return "batch" if plan.batch > 1 else "tiles"


class _InTurn:
    """The current stream waits for the last use of an engine's buffers, and marks its own."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __enter__(self):
        if self.engine._last_use is not None:
            torch.cuda.current_stream(self.engine.device).wait_event(self.engine._last_use)

    def __exit__(self, *exception):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.engine.device))
        self.engine._last_use = event


def dtypes(pipeline) -> tuple[tuple[str, str], ...]:
    """Network → dtype of its parameters, as a plan writes it."""

    def of(network):
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        return str(dtype).removeprefix("torch.")

    return tuple((name, of(network)) for name, network in pipeline.modules.items())


def _photos(images) -> list[Tensor]:
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be (N, 3, H, W) or a list of (3, H, W), got the shape {tuple(images.shape)}")
    try:
        photos = list(images)
    except TypeError:
        kind = type(images).__name__
        raise TypeError(f"images must be a tensor (N, 3, H, W) or a list of (3, H, W), got {kind}") from None
    if not photos:
        raise ValueError("there are no images; give at least one")
    for i, photo in enumerate(photos):
        if not isinstance(photo, Tensor) or photo.dtype != torch.uint8:
            kind = photo.dtype if isinstance(photo, Tensor) else type(photo).__name__
            raise TypeError(f"image {i}: an engine takes uint8 tensors, got {kind}; the pipeline itself takes others")
        if photo.dim() != 3 or photo.shape[0] != 3 or photo.numel() == 0:
            raise ValueError(f"image {i}: must be (3, H, W), RGB, with pixels, got the shape {tuple(photo.shape)}")
    return photos


def _seeds(seeds, count: int) -> list[int]:
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    seeds = [seeds] * count if isinstance(seeds, Integral) else seeds
    try:
        seeds = list(seeds)
    except TypeError:
        seeds = [seeds]  # what it is shows below
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seeds must be ints of 64 bits, got {seed!r}")
    if len(seeds) != count:
        raise ValueError(f"seeds: {len(seeds)} seeds for {count} images; give one int, or one a photo")
    return [int(seed) for seed in seeds]


def _at_least_1(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"Engine: {name} must be an int of at least 1, got {value!r}")
    return int(value)
