"""The feeding side: a queue of batches, a thread that keeps the device busy with them, and what it measured.

On a GPU every batch has a slot of pinned and device memory: while the graph works on one batch, the next one is copied
in and the last one out, each on a stream of its own. Two slots suffice, because a bucket's own buffers are outside
them.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan
from .tiles import fill


@dataclass
class Statistics:
    """What an engine's queue did, from its first batch to its last."""

    images: int = 0
    """Photos, or tiles of photos."""
    batches: int = 0
    copy_in: float = 0.0
    """Seconds of copies to the device, those that replays hid included; and so on."""
    compute: float = 0.0
    copy_out: float = 0.0
    started: float | None = None
    finished: float | None = None

    def add(self, images: int, seconds: tuple[float, float, float]) -> None:
        self.images, self.batches = self.images + images, self.batches + 1
        self.copy_in, self.compute, self.copy_out = (
            total + s for total, s in zip((self.copy_in, self.compute, self.copy_out), seconds)
        )
        self.finished = time.perf_counter()

    @property
    def seconds(self) -> float:
        return 0.0 if self.started is None else self.finished - self.started

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def idle_share(self) -> float:
        """The share of the time in which the device computed nothing."""
        return max(0.0, 1 - self.compute / self.seconds) if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.images} images in {self.seconds:.2f} s, {self.images_per_second:.2f} images/s; compute"
            f" {self.compute:.2f} s, copies in {self.copy_in:.2f} s and out {self.copy_out:.2f} s; device idle"
            f" {100 * self.idle_share:.0f} %"
        )


@dataclass
class Outcome:
    """What one batch became, in the CPU's memory."""

    images: Tensor
    means: Tensor
    finite: Tensor
    seconds: tuple[float, float, float]
    """Copy in, compute, copy out."""


class HostLane:
    """Batches on the CPU: they are computed where they are launched, and outcomes are ready at once."""

    slots = 1

    def __init__(self, compute: Callable):
        self.compute = compute

    def launch(self, plan: Plan, rows: Sequence[Tensor], seeds: Sequence[int], steps: int) -> "_Done":
        started = time.perf_counter()
        results = self.compute(plan, rows, seeds, steps, lambda results: [t.clone() for t in results])
        return _Done(Outcome(*results, (0.0, time.perf_counter() - started, 0.0)))


@dataclass
class _Done:
    outcome: Outcome

    def ready(self) -> bool:
        return True

    def result(self) -> Outcome:
        return self.outcome


class CudaLane:
    """Batches on a GPU: pinned memory → copy stream → compute stream → copy stream → pinned memory.

    compute(plan, pixels, seeds, steps, keep) is called on the compute stream with device tensors; keep(results) copies
    the bucket's static ones, before another thread may write them.
    """

    slots = 2

    def __init__(self, compute: Callable, device: torch.device):
        self.compute, self.device = compute, device
        with torch.cuda.device(device):
            self.copying_in, self.computing, self.copying_out = (torch.cuda.Stream() for _ in range(3))
        self._free = deque(_Slot() for _ in range(self.slots))

    def launch(self, plan: Plan, rows: Sequence[Tensor], seeds: Sequence[int], steps: int) -> "_Flight":
        slot, count = self._free.popleft(), len(rows)
        try:
            with torch.cuda.device(self.device):
                slot.fit(plan, self.device)
                fill(slot.host_in, rows)
                slot.host_seeds[:count] = torch.tensor(seeds, dtype=torch.int64)
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
                with torch.cuda.stream(self.copying_in):
                    marks[0].record()
                    slot.pixels[:count].copy_(slot.host_in[:count], non_blocking=True)
                    slot.seeds[:count].copy_(slot.host_seeds[:count], non_blocking=True)
                    marks[1].record()
                with torch.cuda.stream(self.computing):
                    self.computing.wait_event(marks[1])
                    marks[2].record()
                    self.compute(plan, slot.pixels[:count], slot.seeds[:count], steps, slot.keep)
                    marks[3].record()
                with torch.cuda.stream(self.copying_out):
                    self.copying_out.wait_event(marks[3])
                    marks[4].record()
                    for host, kept in zip(slot.host_out, slot.results):
                        host[:count].copy_(kept[:count], non_blocking=True)
                    marks[5].record()
        except BaseException:
            torch.cuda.synchronize(self.device)
            self._free.append(slot)
            raise
        return _Flight(slot, count, marks, self._free)


class _Slot:
    """Pinned and device memory of one batch in flight, kept while batches have the same shape."""

    def __init__(self):
        self.shape = None

    def fit(self, plan: Plan, device: torch.device) -> None:
        shape = (plan.batch, plan.height, plan.width, 3)
        if shape == self.shape:
            return

        def tensors(**where):
            pixels = [torch.empty(shape, dtype=torch.uint8, **where).permute(0, 3, 1, 2) for _ in range(3)]
            seeds = torch.empty(plan.batch, dtype=torch.int64, **where)
            return pixels, seeds, torch.empty(plan.batch, dtype=torch.bool, **where)

        (self.host_in, images, means), self.host_seeds, finite = tensors(pin_memory=True)
        self.host_out = (images, means, finite)
        (self.pixels, images, means), self.seeds, finite = tensors(device=device)
        self.results = (images, means, finite)
        # Made on the current stream, used on others: they must be there, and their memory nobody else's.
        torch.cuda.current_stream().synchronize()
        self.shape = shape

    def keep(self, results) -> None:
        for mine, result in zip(self.results, results):
            mine[: len(result)].copy_(result)


@dataclass
class _Flight:
    slot: _Slot
    count: int
    marks: list
    free: deque

    def ready(self) -> bool:
        return self.marks[5].query()

    def result(self) -> Outcome:
        try:
            self.marks[5].synchronize()
            results = (t[: self.count].clone() for t in self.slot.host_out)
            seconds = tuple(a.elapsed_time(b) / 1000 for a, b in zip(self.marks[::2], self.marks[1::2]))
            return Outcome(*results, seconds)
        finally:
            self.free.append(self.slot)


# ---- the queue


class Job:
    """One batch on its way: rows, which are photos or their tiles, and what has become of them.

    cut() → (rows, each a photo (3, h, w) uint8 and its seed; finish): finish makes the result of the rows' (image,
    mean, finite).
    """

    def __init__(self, cut: Callable, steps: int):
        self.cut, self.steps = cut, steps
        self.future = Future()
        self.begin()

    def begin(self) -> None:
        """Cut and start anew."""
        self.rows, self.finish = self.cut()
        self.started, self.done = 0, []

    @property
    def left(self) -> list[tuple[Tensor, int]]:
        return self.rows[self.started :]

    def take(self, count: int) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Photos and seeds of the next rows."""
        return tuple(zip(*self.left[:count]))

    def landed(self, images, means, finite) -> None:
        self.done.extend(zip(images, means, finite))

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.rows)


class Worker:
    """The thread between a bounded queue and the device.

    choose(job) → (plan, count): how many of the rows that are left run together, and as what. retreat(plan, error) is
    asked when that fails: "batch" says that the same rows are worth another try, "tiles" that the job must be cut anew;
    otherwise it raises what the job's future is to raise.
    """

    def __init__(self, lane, choose: Callable, retreat: Callable, waiting: int):
        self.lane, self.choose, self.retreat = lane, choose, retreat
        self.statistics = Statistics()
        self._queue = queue.SimpleQueue()
        self._room = threading.Semaphore(waiting)
        self._closed = False
        self._lock = threading.Lock()
        self._flying: deque[tuple[Job, object]] = deque()
        self._thread = threading.Thread(target=self._work, name="lpmrf-engine", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job; waits while as many as may wait do so, or raises RuntimeError in the worker's own thread."""
        if not self._room.acquire(blocking=not self.here()):
            raise RuntimeError("the queue is full, and a future's callback cannot wait; submit in another thread")
        with self._lock:  # nothing may follow the end mark
            if self._closed:
                self._room.release()
                raise RuntimeError("this engine is closed; make another one")
            self._queue.put(job)

    def here(self) -> bool:
        """Whether the caller is the worker's own thread: a future's callback."""
        return threading.current_thread() is self._thread

    def close(self, cancel: bool = False) -> None:
        """Finish what was submitted, or cancel what has not begun, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                while cancel and not self._queue.empty():
                    self._queue.get().future.cancel()
                    self._room.release()
                self._queue.put(None)
        self._thread.join()

    # ---- in the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.future.set_running_or_notify_cancel():
                while job.left and not job.future.done():
                    self._launch(job)
        while self._flying:
            self._land()

    def _next(self) -> Job | None:
        """The next job, None at the end; lands what is ready while it waits."""
        job = _NOTHING
        while self._flying and job is _NOTHING:
            try:
                job = self._queue.get(timeout=0.0005)
            except queue.Empty:
                if self._flying[0][1].ready():
                    self._land()
        if job is _NOTHING:
            job = self._queue.get()
        if job is not None:
            self._room.release()
        return job

    def _launch(self, job: Job) -> None:
        """Launch the next rows, as soon as there is a slot."""
        if len(self._flying) >= self.lane.slots:
            self._land()
        if self.statistics.started is None:
            self.statistics.started = self.statistics.finished = time.perf_counter()
        plan = None
        try:
            plan, count = self.choose(job)
            flight = self.lane.launch(plan, *job.take(count), job.steps)
        except Exception as error:
            while self._flying:  # their memory may be what was missing
                self._land()
            if job.future.done():
                return
            try:
                if self.retreat(plan, error) == "tiles":
                    job.begin()
            except Exception as final:
                job.future.set_exception(final)
        else:
            job.started += count
            self._flying.append((job, flight))

    def _land(self) -> None:
        """Wait for the oldest batch in flight; with the last of its rows the job is done."""
        job, flight = self._flying.popleft()
        try:
            outcome = flight.result()
            self.statistics.add(len(outcome.finite), outcome.seconds)
            job.landed(outcome.images, outcome.means, outcome.finite)
            if job.complete and not job.future.done():
                job.future.set_result(job.finish(job.done))
        except Exception as error:
            if not job.future.done():
                job.future.set_exception(error)


_NOTHING = object()
