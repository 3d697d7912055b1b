"""Latents of the flow stage, computed once: sources and targets of several degradations of every face.

The two networks in front of the flow cost more than a step of a small velocity network, and they do not change.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..checkpoint import locate
from .config import TrainConfig
from .data import Faces, at_once, batches


class LatentCache:
    """One file a pass over the faces: `sources` and `targets` in half precision, in the order of the sorted faces.

    Pass 2k holds degradation k, pass 2k + 1 degradation k of the mirror images. A killed run continues with the first
    missing pass. `ends(clean, degraded)` computes (source, target) of a uint8 batch on `device`. The folder remembers
    what it was made from; other networks or settings make it anew, another seed of the run does not.
    """

    def __init__(self, folder: Path, paths: list[Path], config: TrainConfig, ends, device: torch.device):
        self.folder, self.passes, self.device = folder, 2 * config.cache, device
        recipe = {
            "paths": [str(p) for p in paths],
            "size": config.size,
            "ranges": repr(config.ranges),
            "networks": [_digest(f) for f in (config.posterior_mean, config.vae) if f],
        }
        start = config.condition or config.source
        if start != "posterior-mean":
            recipe["start"] = start
        if config.jitter:
            recipe["jitter"] = config.jitter
        folder.mkdir(parents=True, exist_ok=True)
        recipe_file = folder / "recipe.json"
        if not recipe_file.exists() or json.loads(recipe_file.read_text()) != recipe:
            for old in folder.glob("pass-*.pt"):
                old.unlink()
            recipe_file.write_text(json.dumps(recipe))
        missing = [p for p in range(self.passes) if not self._file(p).exists()]
        total = len(missing) * len(paths)
        with tqdm(total=total, desc="latent cache", unit="face", disable=not missing) as bar:
            for p in missing:
                self._compute(p, paths, config, ends, bar)

    def _file(self, p: int) -> Path:
        return self.folder / f"pass-{p:03d}.pt"

    def _compute(self, p, paths, config, ends, bar):
        faces = Faces(
            *(paths, config.size, len(paths), p, config.ranges),
            shuffle=False,
            jitter=config.jitter,
            memory=0,
            unusable=Path(config.out) / "left-out.txt",
        )
        sources, targets = [], []
        for clean, degraded in batches(faces, at_once(config.size), config.workers, keep_rest=True):
            if p % 2:
                clean, degraded = clean.flip(-1), degraded.flip(-1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                source, target = ends(clean.to(self.device), degraded.to(self.device))
            sources.append(source.half().cpu())
            targets.append(target.half().cpu())
            bar.update(len(clean))
        partial = self._file(p).with_suffix(".tmp")
        torch.save({"sources": torch.cat(sources), "targets": torch.cat(targets)}, partial)
        os.replace(partial, self._file(p))

    def dataset(self, samples: int) -> Dataset:
        """Item n is (source, target); each epoch visits every face once, in a random one of its passes."""
        return _Latents([torch.load(self._file(p), mmap=True, weights_only=True) for p in range(self.passes)], samples)


class _Latents(Dataset):
    def __init__(self, passes, samples):
        self.passes, self.samples, self.faces = passes, samples, len(passes[0]["sources"])

    def __len__(self):
        return self.samples

    def __getitem__(self, n):
        epoch, i = divmod(n, self.faces)
        generator = torch.Generator().manual_seed(epoch)
        i = int(torch.randperm(self.faces, generator=generator)[i])
        # A face walks through its passes from epoch to epoch, starting somewhere of its own.
        part = self.passes[(epoch + i) % len(self.passes)]
        return part["sources"][i], part["targets"][i]


def _digest(name: str) -> str:
    path = locate(name)
    h = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            h.update(file.read_bytes())
    return h.hexdigest()
