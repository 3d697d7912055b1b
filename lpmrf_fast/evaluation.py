"""How good restored faces are: PSNR against the originals, and how alike the two sets of images look."""

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
    levels = max(1, int(np.log2(min(a.shape[-2:]) / 16)) + 1)
    generator = torch.Generator().manual_seed(seed)
    result = {}

    def cut(band, rows, columns):  # → (patches of all images, pixels of a patch, channels)
        image = torch.arange(len(band))[:, None, None, None]
        return band.permute(0, 2, 3, 1)[image, rows, columns].flatten(0, 1).flatten(1, 2)

    for band_a, band_b in zip(laplacian_pyramid(a.float(), levels), laplacian_pyramid(b.float(), levels)):
        n, _, h, w = band_a.shape
        y = torch.randint(h - size + 1, (n, patches), generator=generator)
        x = torch.randint(w - size + 1, (n, patches), generator=generator)
        rows = y[..., None, None] + torch.arange(size)[:, None]
        columns = x[..., None, None] + torch.arange(size)
        pa, pb = cut(band_a, rows, columns), cut(band_b, rows, columns)
        mean, std = pb.mean((0, 1)), pb.std((0, 1))
        pa, pb = (((p - mean) / std).flatten(1) for p in (pa, pb))
        slices = torch.randn(pa.shape[1], directions, generator=generator)
        slices /= slices.norm(dim=0)
        distance = ((pa @ slices).sort(0).values - (pb @ slices).sort(0).values).abs().mean()
        result[h] = 1000 * float(distance)
    return result
