"""Scores that need no network: PSNR and SSIM of each image, and how alike two sets of images or of features are."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(restored: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of each image: (N, C, H, W) in [0, 1] twice → (N,). Equal images give inf."""
    mse = (restored.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * mse.log10()


def laplacian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """(N, C, H, W) → `levels` band-pass images, finest first, and the low-pass rest as the last of them."""
    axis = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    kernel = (axis[:, None] * axis).expand(x.shape[1], 1, 5, 5)

    def blur(t, gain=1.0):
        return F.conv2d(F.pad(t, (2, 2, 2, 2), mode="reflect"), kernel * gain, groups=t.shape[1])

    bands = []
    for _ in range(levels - 1):
        low = blur(x)[..., ::2, ::2]
        up = x.new_zeros(x.shape)
        up[..., ::2, ::2] = low
        bands.append(x - blur(up, 4.0))
        x = low
    return bands + [x]


def ssim(restored: Tensor, reference: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of each image, averaged over channels: (N, C, H, W) in [0, 1] twice → (N,).

    Gaussian windows of 11x11 pixels with deviation 1.5, whole ones only, as its authors, scikit-image and basicsr have
    it; torchmetrics also counts windows over a reflected border, which gives other numbers. Sides of at least 11.
    """
    x, y = (t.double().flatten(0, 1)[:, None] for t in (restored, reference))
    axis = (-(torch.arange(-5.0, 6.0, dtype=x.dtype, device=x.device).square()) / (2 * 1.5**2)).exp()
    axis = axis / axis.sum()

    def mean(t):
        return F.conv2d(F.conv2d(t, axis.view(1, 1, 11, 1)), axis.view(1, 1, 1, 11))

    mx, my = mean(x), mean(y)
    vx, vy, covariance = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similarity = (2 * mx * my + 0.01**2) * (2 * covariance + 0.03**2)
    similarity = similarity / ((mx * mx + my * my + 0.01**2) * (vx + vy + 0.03**2))
    return similarity.mean((1, 2, 3)).view(restored.shape[:2]).mean(1)


def sliced_wasserstein(
    a: Tensor, b: Tensor, patches: int = 128, size: int = 7, directions: int = 512, seed: int = 0
) -> dict[int, float]:
    """Sliced Wasserstein distance between the patches of two sets of images, by level of a Laplacian pyramid.

    a and b: (N, 3, H, W) in [0, 1], N alike. Levels are halved down to 16 pixels, as in Karras et al. 2018
    (arXiv 1710.10196, appendix A.4): `patches` random size x size patches an image and level, each channel of the
    patches normalised by its mean and standard deviation in `b` over the set (so that a set without detail is not
    stretched to look like one with it), projected on random directions. Returns {height of the level: distance · 1000}.
    Raises ValueError for sets of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced_wasserstein: sets must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    distance = SlicedWasserstein(len(a), a.shape[-2:], patches, size, directions, seed)
    for x, y in zip(a, b):
        distance.add(x[None], y[None])
    return distance.result()


class SlicedWasserstein:
    """`sliced_wasserstein` of up to `count` pairs of images, one pair at a time: patches are kept, images are not."""

    def __init__(self, count: int, shape, patches: int = 128, size: int = 7, directions: int = 512, seed: int = 0):
        height, width = shape
        self.levels, self.shape, self.added, self.places, self.slices = [], (height, width), 0, [], []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max(1, int(np.log2(min(height, width) / 16)) + 1)):
            y = torch.randint(height - size + 1, (count, patches), generator=generator)
            x = torch.randint(width - size + 1, (count, patches), generator=generator)
            slices = torch.randn(3 * size * size, directions, generator=generator)
            self.places.append(
                (y[..., None, None] + torch.arange(size)[:, None], x[..., None, None] + torch.arange(size))
            )
            self.slices.append(slices / slices.norm(dim=0))
            self.levels.append((height, torch.empty(2, count * patches, size * size, 3)))
            height, width = (height + 1) // 2, (width + 1) // 2
        self.patches = patches

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next pair, (1, 3, H, W) each."""
        keep = slice(self.added * self.patches, (self.added + 1) * self.patches)
        for side, image in enumerate((x, y)):
            bands = laplacian_pyramid(image.float(), len(self.levels))
            for band, (rows, columns), (_, kept) in zip(bands, self.places, self.levels):
                cut = band[0].permute(1, 2, 0)[rows[self.added], columns[self.added]]
                kept[side, keep] = cut.flatten(1, 2)
        self.added += 1

    def result(self) -> dict[int, float]:
        found = {}
        for (height, kept), slices in zip(self.levels, self.slices):
            kept = kept[:, : self.added * self.patches]
            mean, std = kept[1].mean((0, 1)), kept[1].std((0, 1))
            a, b = (((side - mean) / std).flatten(1) for side in kept)
            # A few directions at a time: sorting needs several times the memory of what it sorts.
            parts = ((a @ s).sort(0).values - (b @ s).sort(0).values for s in slices.split(64, dim=1))
            total = sum(float(p.abs().sum(dtype=torch.float64)) for p in parts)
            found[height] = 1000 * total / (len(a) * slices.shape[1])
        return found


def mmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """Squared maximum mean discrepancy of two sets of features (N, D), (M, D) under a Gaussian kernel, times 1000.

    Features are scaled to length one; the estimator with the diagonal, as CMMD (Jayasumana et al. 2024, arXiv
    2401.09603) has it. 0 for equal sets.
    """
    a, b = (F.normalize(x.double(), dim=1) for x in (a, b))

    def kernel(x, y):
        # Some rows at a time: all pairs of 70000 faces are 39 GB.
        parts = ((-torch.cdist(rows, y).square() / (2 * sigma**2)).exp().sum() for rows in x.split(1024))
        return sum(parts) / (len(x) * len(y))

    return 1000 * float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
