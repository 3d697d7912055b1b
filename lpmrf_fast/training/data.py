"""Clean faces of folders and tar shards, degraded on the fly. Sample n is the same in any process, order or restart."""

import io
import os
import signal
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from ..images import SUFFIXES, open_upright, read_rgb
from . import degradation_torch
from .degradation import Ranges, TwoStage, degrade, draw, turned
from .degradation_torch import gray


@dataclass(frozen=True, order=True)
class Member:
    """A file inside a tar shard: read in place, so that a sample's number says where it is, as in a folder."""

    shard: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}!{self.name}"

    def read(self) -> io.BytesIO:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def find_images(source: str | Path) -> list[Path | Member]:
    """All images below a folder and inside its .tar shards, in one shard, or in the files of a pattern; sorted.

    Shards are of the webdataset kind: plain tars of image files; other files in them are passed over.
    Raises FileNotFoundError with the source's name when there is no image, ValueError for a tar that is none.
    """
    source = Path(source)
    if any(c in str(source) for c in "*?["):
        top = Path(source.anchor) if source.is_absolute() else Path(".")
        files = sorted(top.glob(str(source.relative_to(top) if source.is_absolute() else source)))
    else:
        files = sorted(source.rglob("*")) if source.is_dir() else [source] if source.is_file() else []
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    for shard in files:
        if shard.suffix.lower() == ".tar":
            found += members(shard)
    if not found:
        raise FileNotFoundError(
            f"{source}: no {', '.join(SUFFIXES)} file found, nor a .tar with any; set `train` or `val` to faces"
        )
    return found


def members(shard: Path) -> list[Member]:
    """The image files of a tar, by name."""
    try:
        with tarfile.open(shard, "r:") as tar:  # not compressed, or its members could not be read in place
            entries = [e for e in tar if e.isfile() and Path(e.name).suffix.lower() in SUFFIXES]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard}: cannot be read as a plain tar ({error})") from None
    return sorted(Member(str(shard), e.name, e.offset_data, e.size) for e in entries)


def at_once(size: int) -> int:
    """Faces of this size that go through frozen networks together: as many as fill four of 512x512."""
    return max(1, 4 * 512 * 512 // size**2)


class Unusable(ValueError):
    """An image that is left out, and why."""


def read_image(path: Path | Member, size: int, least: int = 1) -> np.ndarray:
    """RGB (size, size, 3) uint8; resized with Lanczos where the file has another size, of no square the middle.

    Raises Unusable for a file that cannot be decoded, or whose shorter side has fewer than `least` pixels.
    """
    try:
        with open_upright(path.read() if isinstance(path, Member) else path) as image:
            side = min(image.size)
            if side < least:
                raise Unusable(f"{image.width}x{image.height} is smaller than the crop, {least}")
            image = read_rgb(image)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, Unusable) else Unusable(str(error)) from None
    if image.size != (size, size):
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return np.asarray(image)


class Faces(Dataset):
    """Item n is a pair (clean, degraded) of (3, s, s) uint8 tensors, or clean alone where `ranges` is None.

    Epochs are passes over a permutation; it, crop, flip, jitter and degradation follow from (seed, n) alone. Every
    worker keeps the decoded files it has seen, where `memory` bytes are enough for all (a part of them would rarely be
    met again). An image that cannot be used is replaced by the next one that can, and named on stderr and in
    `unusable`, a file. Not `applied`, the degradation comes as it was drawn, with the place of the crop, in place of
    the degraded image; the clean one is whole (`degraded_crops`).
    """

    def __init__(
        self,
        paths: list[Path | Member],
        size: int,
        samples: int,
        seed: int,
        ranges: Ranges | TwoStage | None = None,
        crop: int | None = None,
        flip: bool = False,
        shuffle: bool = True,
        jitter: float = 0.0,
        memory: float = 1e9,
        applied: bool = True,
        unusable: Path | None = None,
    ):
        self.paths, self.size, self.samples, self.seed = paths, size, samples, seed
        self.ranges, self.crop, self.flip, self.shuffle, self.applied = ranges, crop, flip, shuffle, applied
        self.jitter = jitter
        self.kept, self.keep = {}, len(paths) * size * size * 3 <= memory
        self.unusable, self.left_out = unusable, set()

    def __len__(self) -> int:
        return self.samples

    def _image(self, i: int) -> np.ndarray:
        for _ in range(len(self.paths)):
            if i in self.kept:
                return self.kept[i]
            if i not in self.left_out:
                try:
                    image = read_image(self.paths[i], self.size, self.crop or 1)
                    if self.keep:
                        self.kept[i] = image
                    return image
                except Unusable as reason:
                    self.left_out.add(i)
                    self._leave_out(f"{self.paths[i]}: {reason}")
            i = (i + 1) % len(self.paths)
        raise ValueError(f"none of {len(self.paths)} images can be used; the reasons are above, as for {self.paths[0]}")

    def _leave_out(self, line: str) -> None:
        if self.unusable is None:
            print(f"left out {line}", file=sys.stderr)
        elif not self.unusable.exists() or line not in self.unusable.read_text().splitlines():
            print(f"left out {line}", file=sys.stderr)
            with open(self.unusable, "a") as file:
                file.write(line + "\n")

    def __getitem__(self, n: int):
        epoch, i = divmod(n, len(self.paths))
        if self.shuffle:
            i = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))[i])
        rng = np.random.default_rng([self.seed, epoch, i])
        clean = self._image(i)
        if self.flip and rng.random() < 0.5:
            clean = clean[:, ::-1]
        if self.jitter:
            clean = turned(clean, *(rng.uniform(-1, 1, 4) * self.jitter))
        drawn = None if self.ranges is None else draw(rng, self.ranges)
        pair = [clean] if drawn is None or not self.applied else [clean, degrade(np.ascontiguousarray(clean), drawn)]
        y, x, side = 0, 0, self.crop or self.size
        if side < self.size:
            y, x = (int(n) for n in rng.integers(0, self.size - side + 1, 2))
        if drawn is not None and not self.applied:
            return _tensor(clean), drawn | {"crop": (y, x, side)}
        pair = [_tensor(p[y : y + side, x : x + side]) for p in pair]
        if drawn and drawn.get("gray_original"):
            pair[0] = gray(pair[0])
        return pair[0] if drawn is None else tuple(pair)


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def degraded_crops(clean: torch.Tensor, drawn: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Faces` does where it applies degradations, for a batch on any device."""
    degraded = degradation_torch.degrade(clean, drawn)
    if any(d.get("gray_original") for d in drawn):
        clean = torch.stack([gray(c) if d.get("gray_original") else c for c, d in zip(clean, drawn)])
    places = [d["crop"] for d in drawn]
    return tuple(
        torch.stack([i[:, y : y + s, x : x + s] for i, (y, x, s) in zip(t, places)]) for t in (clean, degraded)
    )


class Order:
    """Numbers of the samples of each batch from `first` on, for one process: `share` is (rank, processes, parts).

    A step's samples are the same however they are shared: part p of rank r takes the (p · processes + r)-th piece.
    """

    def __init__(self, end: int, batch_size: int, first: int, share: tuple[int, int, int]):
        self.end, self.batch_size, self.first, self.share = end, batch_size, first, share
        self.batches = -(-end // batch_size)

    def __len__(self):
        return max(0, self.batches - self.first) * self.share[2]

    def __iter__(self):
        rank, processes, parts = self.share
        size = self.batch_size // (processes * parts)
        for batch in range(self.first, self.batches):
            for part in range(parts):
                start = batch * self.batch_size + (part * processes + rank) * size
                yield range(start, min(start + size, self.end))


def batches(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    first: int = 0,
    keep_rest: bool = False,
    share: tuple[int, int, int] = (0, 1, 1),
    pin_memory: bool = False,
) -> DataLoader:
    """Batches in sample order, starting at batch `first`: a resumed run continues where it stopped.

    An incomplete last batch is dropped unless `keep_rest`. share: see Order.
    """
    end = len(dataset) if keep_rest else len(dataset) // batch_size * batch_size
    if workers:
        import cv2

        # Here and not in the workers: a forked process waits for ever for threads that its parent's OpenCV had.
        cv2.setNumThreads(1)
    return DataLoader(
        dataset,
        batch_sampler=Order(end, batch_size, first, share),
        num_workers=workers,
        worker_init_fn=_start_worker,
        collate_fn=_collate,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )


def _collate(items: list):
    """Drawn degradations stay a list; everything else is stacked."""
    if isinstance(items[0], tuple) and isinstance(items[0][1], dict):
        return torch.stack([clean for clean, _ in items]), [drawn for _, drawn in items]
    return default_collate(items)


def _start_worker(_):
    # Out of the trainer's process group: a SIGTERM to that must not end the workers before the trainer has saved.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's own handler would keep a worker alive
    torch.set_num_threads(1)
