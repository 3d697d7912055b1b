"""The job: photos through decoding, the engine and encoding, a bad one as a line in the report.

Decoding and encoding run in threads beside the engine, a few photos ahead and behind, so that memory stays bounded
however many there are. All else, the manifest included, happens in the calling thread.
"""

import hashlib
import os
import sys
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..engine import OutOfMemory, Restored
from ..pipeline import Pipeline
from .decode import DEFAULT_MAX_PIXELS, decode
from .encode import encode
from .find import find
from .manifest import Manifest
from .photo import Photo, PhotoError
from .plan import Task, beside, names_a_file, plan

WINDOW = 4
"""Photos of other sizes may wait until this many batches are held; then the fullest batch runs, full or not."""
AHEAD = 2
"""Batches that wait for the engine while it works on one."""


class JobError(RuntimeError):
    """A job that cannot start; one line."""

    exit_status = 2
    """Of the command line: an argument that cannot be used."""


@dataclass(frozen=True)
class Failure:
    """A photo that was not restored, and why."""

    path: str
    error: str

    def __str__(self) -> str:
        return f"{self.path}: {self.error}"


@dataclass
class Report:
    """What a job did."""

    output: Path
    restored: int = 0
    skipped: int = 0
    """Photos whose outputs were there."""
    outdated: int = 0
    """Skipped ones whose outputs were made with other settings, as the manifest says."""
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    """From the first photo to the last, without loading the model."""

    def __str__(self) -> str:
        parts = [f"{self.restored} restored"] if self.restored or not self.skipped else []
        if self.skipped:
            other = f", {self.outdated} of them made with other settings" if self.outdated else ""
            parts.append(f"{self.skipped} skipped (already there{other}; --overwrite makes them again)")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        if self.restored:
            parts.append(f"{self.seconds:.1f} s, {self.restored / self.seconds:.2f} images/s")
        return f"{', '.join(parts)} → {self.output}"


def restore_files(
    sources: Iterable,
    output,
    load_pipeline: Callable[[], Pipeline],
    *,
    num_inference_steps: int = 25,
    seed: int = 0,
    batch_size: int | None = None,
    ext: str = "auto",
    posterior_mean: bool = False,
    overwrite: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_memory: int | str | None = None,
    settings: dict | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Restore files, folders and globs into a folder, or one file into a file.

    load_pipeline: called when there is something to do. seed: of the job; a photo's own follows from it and from the
    bytes of its file (`photo_seed`). batch_size: photos of one padded size that run together; None: by device and
    memory. max_memory: what the networks and their activations may take, such as "8GB"; None: what is free.
    ext: "auto" or "png", "jpg", "webp". posterior_mean: also write the posterior means, into a folder beside it.
    settings: more of what shapes the results (the model's name), for the manifest. log: called with each failure.

    Outputs that exist are skipped unless `overwrite`. Progress goes to stderr where that is a terminal.
    Raises JobError where the job cannot start, and what load_pipeline raises.
    """
    output = Path(output)
    sources = [os.fspath(s) for s in sources]
    means = beside(output) if posterior_mean else None
    single = names_a_file(output)
    found, empty = find(sources, [] if single else [output, *([means] if means else [])])
    if single and len(found) > 1:
        raise JobError(f"{output} is a file name and there are {len(found)} photos; name a folder with -o")
    report = Report(output)

    def fail(path, error: str) -> None:
        report.failures.append(Failure(str(path), error))
        if log is not None:
            log(str(report.failures[-1]))

    for pattern in empty:
        fail(pattern or "''", "0 files matched; PNG, JPEG, WebP, BMP and TIFF files are looked for")
    if not found:
        return report
    settings = {**(settings or {}), "num_inference_steps": num_inference_steps, "seed": seed}
    with _open_manifest(output, single) as manifest:
        todo = []
        for task in plan(found, output, ext, means):
            if task.refused:
                fail(task.path, task.refused)
            elif not overwrite and all(path.exists() for path in task.outputs):
                report.skipped += 1
                report.outdated += manifest.settings.get(str(task.output), settings) != settings
            else:
                todo.append(task)
        if not todo:
            return report
        pipeline = load_pipeline()
        started = time.monotonic()
        works = [Work(task) for task in todo]
        works = restore_photos(works, pipeline, num_inference_steps, seed, batch_size, max_pixels, max_memory)
        bar = tqdm(total=len(todo), unit=" images", dynamic_ncols=True, disable=not sys.stderr.isatty())
        with bar, closing(works), warnings.catch_warnings():
            # What Pillow has to say of odd files is not the user's business: they are read, or their failure is a line.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            for work in works:
                if work.error is None:
                    report.restored += 1
                else:
                    with tqdm.external_write_mode():
                        fail(work.task.path, work.error)
                manifest.write(
                    input=str(work.task.path),
                    input_sha256=work.digest,
                    output=str(work.task.output),
                    posterior_mean=str(work.task.posterior_mean) if work.task.posterior_mean else None,
                    size=work.size,
                    settings=settings,
                    seed=work.seed,
                    seconds=round(work.seconds, 4),
                    error=work.error,
                    device=str(pipeline.device),
                    version=_version(),
                )
                bar.update()
        report.seconds = time.monotonic() - started
    return report


def _open_manifest(output: Path, single: bool) -> Manifest:
    try:
        if single:
            output.parent.mkdir(parents=True, exist_ok=True)
            return Manifest(None)
        return Manifest(output)
    except OSError as error:
        where, reason = error.filename or output, error.strerror or error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file is in the way of this folder"
        raise JobError(f"the output {output} cannot be written ({reason}: {where}); choose another -o") from error


def _version() -> str:
    try:
        return version("lpmrf-fast")
    except PackageNotFoundError:
        return "a checkout"


def photo_seed(seed: int, digest: str) -> int:
    """The seed of a photo: 48 bits of SHA-256 over the job's seed and the digest of its file.

    So a photo gets the same noise in any job, place and company. `pipe(image, seed=photo_seed(...))` repeats it.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:6], "big")


# ---- from works to finished works


@dataclass
class Work:
    """A task on its way; with an `error`, the stages that are left let it pass."""

    task: Task
    photo: Photo | None = None
    """Between decoding and writing."""
    digest: str | None = None
    size: tuple[int, int] | None = None
    """(height, width)"""
    seed: int | None = None
    results: list[np.ndarray] = field(default_factory=list)
    """Pictures for `task.outputs`, (H, W, 3) uint8."""
    seconds: float = 0.0
    """Its share of the time in the engine."""
    error: str | None = None

    def attempt(self, stage: Callable[[], None]) -> None:
        """Run a stage; what goes wrong is this photo's error."""
        try:
            stage()
        except PhotoError as error:
            self.error = str(error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {_line(error)}"


def restore_photos(
    works: Sequence[Work],
    pipeline: Pipeline,
    num_inference_steps: int,
    seed: int,
    batch_size: int | None,
    max_pixels: int,
    max_memory: int | str | None = None,
    threads: int = 4,
) -> Iterator[Work]:
    """Decode, restore and write; yields each work once, finished or failed, in the order in which they are done.

    Closing the iterator, or an exception in it (Ctrl-C too), finishes the files that are being written and leaves no
    partial ones.
    """
    runner = Runner(pipeline, num_inference_steps, batch_size, max_memory)

    def read(work: Work) -> Work:
        def stage():
            work.photo = decode(work.task.path, max_pixels)
            work.digest, work.size = work.photo.digest, work.photo.size
            work.seed = photo_seed(seed, work.digest)

        work.attempt(stage)
        return work

    def write(work: Work) -> Work:
        def stage():
            for path, picture in zip(work.task.outputs, work.results):
                encode(picture, path, work.photo)

        if work.error is None:
            work.attempt(stage)
        work.photo, work.results = None, []
        return work

    pool = ThreadPoolExecutor(threads, thread_name_prefix="lpmrf-files")
    running, writing = deque(), deque()

    def collect() -> None:
        """Wait for the oldest batch in the engine, and hand its results to the files' threads."""
        batch, run = running.popleft()
        runner.collect(run)
        writing.extend(pool.submit(write, work) for work in batch)

    try:
        for batch in _batches(_ahead(pool, read, works, threads + (batch_size or 8)), runner):
            running.append((batch, runner.submit([work for work in batch if work.error is None])))
            while len(running) > AHEAD or (running and running[0][1].future.done()):
                collect()
            while len(writing) > threads + len(batch) or (writing and writing[0].done()):
                yield writing.popleft().result()
        while running:
            collect()
        while writing:
            yield writing.popleft().result()
    finally:
        runner.close()
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """map(function, items) in the pool, in order, at most `depth` of them in advance."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(works: Iterable[Work], runner: "Runner") -> Iterator[list[Work]]:
    """Works of one padded size together; failed ones alone."""
    waiting: dict[tuple[int, int], list[Work]] = defaultdict(list)
    held = 0.0
    for work in works:
        if work.error is not None:
            yield [work]
            continue
        size = runner.padded(work)
        waiting[size].append(work)
        held += 1 / runner.limit(size)
        if len(waiting[size]) >= runner.limit(size):
            full = size
        elif held >= WINDOW:
            full = max(waiting, key=lambda size: len(waiting[size]) / runner.limit(size))
        else:
            continue
        batch = waiting.pop(full)
        yield batch
        held = sum(len(group) / runner.limit(size) for size, group in waiting.items())
    yield from waiting.values()


@dataclass
class Run:
    """Works in the engine."""

    works: list[Work]
    future: "Future[Restored]"
    started: float


class Runner:
    """Batches through the pipeline's engine."""

    def __init__(self, pipeline: Pipeline, num_inference_steps: int, batch_size: int | None, max_memory=None):
        self.padded_size = pipeline.padded_size
        self.engine = pipeline.engine(batch_size=batch_size, max_memory=max_memory, waiting=AHEAD + 1)
        self.steps = num_inference_steps
        self.collected = 0.0

    def padded(self, work: Work) -> tuple[int, int]:
        return self.padded_size(*work.size)

    def limit(self, size: tuple[int, int]) -> int:
        """How many photos of a padded size run together."""
        return max(1, self.engine.limit(*size))

    def submit(self, works: list[Work]) -> "Run":
        """Queue works of one padded size."""
        run = Run(works, Future(), time.monotonic())
        if works:
            photos = [torch.from_numpy(np.require(work.photo.rgb, requirements="W")).permute(2, 0, 1) for work in works]
            run.future = self.engine.submit(photos, self.steps, [work.seed for work in works])
        else:
            run.future.set_result(None)
        return run

    def collect(self, run: "Run") -> None:
        """Wait for a batch and fill in the results or errors of its works."""
        try:
            result = run.future.result()
        except Exception as error:
            if len(run.works) > 1:  # which of them it was shows alone
                for work in run.works:
                    self.collect(self.submit([work]))
            else:
                kind = "" if isinstance(error, OutOfMemory) else f"{type(error).__name__}: "
                run.works[0].error = f"{kind}{_line(error)}"
            return
        started, self.collected = max(run.started, self.collected), time.monotonic()
        for i, work in enumerate(run.works):
            work.seconds = (self.collected - started) / len(run.works)
            if result.finite[i]:
                pictures = (result.images[i], result.posterior_means[i])
                work.results = [picture.permute(1, 2, 0).numpy() for picture in pictures]
            else:
                work.error = "its result is not finite (NaN); use --dtype fp32, or check the model"

    def close(self) -> None:
        self.engine.close(cancel=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
