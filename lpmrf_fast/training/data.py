"""A folder of clean faces, degraded on the fly. Sample number n is the same in any process, order or restart."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .degradation import Ranges, degrade, draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_images(folder: str | Path) -> list[Path]:
    """All images below `folder`, sorted. Raises FileNotFoundError with the folder's name when there are none."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no {', '.join(SUFFIXES)} file found; set `train` or `val` to a folder of faces"
        )
    return paths


def read_image(path: Path, size: int) -> np.ndarray:
    """RGB (size, size, 3) uint8; resized with Lanczos where the file has another size."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image)


class Faces(Dataset):
    """Item n is a pair (clean, degraded) of (3, s, s) uint8 tensors, or clean alone where `ranges` is None.

    Epochs are passes over a permutation; permutation, crop, flip and degradation follow from (seed, n) alone. Every
    worker keeps the decoded files it has seen, as far as `memory` bytes reach.
    """

    def __init__(
        self,
        paths: list[Path],
        size: int,
        samples: int,
        seed: int,
        ranges: Ranges | None = None,
        crop: int | None = None,
        flip: bool = False,
        shuffle: bool = True,
        memory: float = 1e9,
    ):
        self.paths, self.size, self.samples, self.seed = paths, size, samples, seed
        self.ranges, self.crop, self.flip, self.shuffle = ranges, crop, flip, shuffle
        self.kept, self.keep = {}, int(memory / (size * size * 3))

    def __len__(self) -> int:
        return self.samples

    def _image(self, i: int) -> np.ndarray:
        if i in self.kept:
            return self.kept[i]
        image = read_image(self.paths[i], self.size)
        if len(self.kept) < self.keep:
            self.kept[i] = image
        return image

    def __getitem__(self, n: int):
        epoch, i = divmod(n, len(self.paths))
        if self.shuffle:
            i = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))[i])
        rng = np.random.default_rng([self.seed, epoch, i])
        clean = self._image(i)
        if self.flip and rng.random() < 0.5:
            clean = clean[:, ::-1]
        pair = [clean] if self.ranges is None else [clean, degrade(np.ascontiguousarray(clean), draw(rng, self.ranges))]
        if self.crop is not None and self.crop < self.size:
            y, x = rng.integers(0, self.size - self.crop + 1, 2)
            pair = [p[y : y + self.crop, x : x + self.crop] for p in pair]
        pair = [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pair]
        return pair[0] if self.ranges is None else tuple(pair)


def batches(dataset: Dataset, batch_size: int, workers: int, first: int = 0, keep_rest: bool = False) -> DataLoader:
    """Batches in sample order, starting at batch `first`: a resumed run continues where it stopped.

    An incomplete last batch is dropped unless `keep_rest`.
    """
    end = len(dataset) if keep_rest else len(dataset) // batch_size * batch_size
    order = range(first * batch_size, end)
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_one_thread,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )


def _one_thread(_):
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)
