"""The degradations of `degradation` on tensors of any device: the same operations, in torch.

Blur, resize and JPEG agree with OpenCV and Pillow to rounding; noise has the same distribution and another draw.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .degradation import blur_kernel, program, sides

LUMINANCE_TABLE = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMINANCE_TABLE = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
YCC = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]


def degrade(images: Tensor, params: list[dict]) -> Tensor:
    """(B, 3, H, W) uint8 RGB and one drawn degradation each → the same shape, type and device."""
    degraded = torch.empty_like(images)
    for image, out, drawn in zip(images, degraded, params, strict=True):
        operations, x = OnTorch(*image.shape[1:]), image.float()
        for name, *arguments in program(drawn):
            x = getattr(operations, name)(x, *arguments)
        out.copy_(x.round().clamp(0, 255))
    return degraded


class OnTorch:
    """The operations on (3, H, W) float32 of range [0, 255], RGB."""

    def __init__(self, height: int, width: int):
        self.size = height, width

    def blur(self, x: Tensor, kernel: dict) -> Tensor:
        weight = torch.from_numpy(blur_kernel(**kernel)).to(x.device)
        half = weight.shape[0] // 2
        # Mirrored as often as a small picture needs; torch's own padding mirrors once.
        rows, columns = (_mirrored(n, half, x.device) for n in x.shape[1:])
        return F.conv2d(x[:, rows][:, :, columns][:, None], weight[None, None])[:, 0]

    def resize(self, x: Tensor, factor: float, how: str) -> Tensor:
        height, width = sides(*self.size, factor, how)
        if how == "linear":
            return F.interpolate(x[None], (height, width), mode="bilinear", align_corners=False)[0]
        rows, columns = resampling(x.shape[1], height, how), resampling(x.shape[2], width, how)
        return rows.to(x.device) @ x @ columns.to(x.device).T

    def noise(self, x: Tensor, kind: str, amount: float, gray: bool, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        if kind == "gaussian":
            return x + amount * torch.randn((1 if gray else 3, *x.shape[1:]), generator=generator, device=x.device)
        x = x.round().clamp(0, 255)
        mean = torch.einsum("chw,c->hw", x, x.new_tensor(YCC[0])).round()[None] if gray else x
        levels = 2.0 ** math.ceil(math.log2(len(mean.unique())))
        return x + amount * (255 * torch.poisson(mean / 255 * levels, generator=generator) / levels - mean)

    def colour(self, x: Tensor, kind: str, amount) -> Tensor:
        return colour(x, kind, amount)

    def jpeg(self, x: Tensor, quality: int) -> Tensor:
        return jpeg(x, quality)


def gray(x: Tensor) -> Tensor:
    """The luminance of (..., 3, H, W), in all three channels; uint8 is rounded."""
    luminance = torch.einsum("...chw,c->...hw", x.float(), torch.tensor(YCC[0], device=x.device))
    luminance = luminance if x.is_floating_point() else luminance.round()
    return luminance[..., None, :, :].expand(x.shape).to(x.dtype)


def colour(x: Tensor, kind: str, amount) -> Tensor:
    """One change of GFPGAN's to (3, H, W) RGB of range [0, 255].

    gray; shift: `amount` for each channel; brightness, contrast, saturation: the image moved from black, from its mean
    luminance, from its own luminance, by a factor; hue: turned by a part of the circle (of HSV).
    """
    if kind == "gray":
        return gray(x)
    if kind == "shift":
        return (x + x.new_tensor(amount)[:, None, None]).clamp(0, 255)
    if kind == "hue":
        return _turn_hue(x.clamp(0, 255), amount)
    start = {"brightness": lambda: x.new_zeros(()), "contrast": lambda: gray(x).mean(), "saturation": lambda: gray(x)}
    return torch.lerp(start[kind]().expand(x.shape), x, amount).clamp(0, 255)


def _turn_hue(x: Tensor, amount: float) -> Tensor:
    high, low = x.amax(0), x.amin(0)
    spread = (high - low).clamp(min=1e-6)
    r, g, b = x
    sector = torch.where(
        high == r, (g - b) / spread, torch.where(high == g, (b - r) / spread + 2, (r - g) / spread + 4)
    )
    sector = sector + 6 * amount
    # Of HSV, channel by channel: full within one sector to either side of its own, nothing beyond two.
    distance = (sector - x.new_tensor([0.0, 2.0, 4.0])[:, None, None] + 3).remainder(6) - 3
    return low + (high - low) * (2 - distance.abs()).clamp(0, 1)


def _mirrored(n: int, half: int, device) -> Tensor:
    """Indices of -half ... n + half - 1, reflected about the outer pixels (BORDER_REFLECT_101)."""
    if n == 1:
        return torch.zeros(1 + 2 * half, dtype=torch.long, device=device)
    i = torch.arange(-half, n + half, device=device) % (2 * n - 2)
    return torch.where(i < n, i, 2 * n - 2 - i)


def resampling(n: int, out: int, how: str) -> Tensor:
    """The matrix (out, n) of Pillow's resampling along one side: antialiased when shrinking."""
    scale = n / out
    reach = max(scale, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * scale
    support = {"area": 0.5, "bilinear": 1.0, "bicubic": 2.0}[how] * reach
    j = np.arange(n)
    inside = (j >= np.floor(centre - support + 0.5)) & (j < np.floor(centre + support + 0.5))
    d = (j + 0.5 - centre) / reach
    t = np.abs(d)
    if how == "area":
        weight = ((d > -0.5) & (d <= 0.5)).astype(np.float64)
    elif how == "bilinear":
        weight = np.clip(1 - t, 0, None)
    else:  # Keys' cubic with a = -0.5
        weight = np.where(t < 1, (1.5 * t - 2.5) * t * t + 1, np.where(t < 2, ((2.5 - 0.5 * t) * t - 4) * t + 2, 0.0))
    weight = weight * inside
    return torch.from_numpy((weight / weight.sum(1, keepdims=True)).astype(np.float32))


def jpeg(x: Tensor, quality: int) -> Tensor:
    """(3, H, W) RGB of range [0, 255] → what libjpeg makes of it at a quality from 1 to 100, 4:2:0.

    Everything but the entropy coding, which loses nothing: colours, halved chroma, DCT, quantisation, and back.
    """
    height, width = x.shape[1:]
    x = x.round().clamp(0, 255)
    matrix = x.new_tensor(YCC)
    ycc = torch.einsum("dc,chw->dhw", matrix, x) + x.new_tensor([0.0, 128, 128])[:, None, None]
    # Blocks are filled up by repeating the last column, and the last row of what is coded: chroma's is halved by then.
    ycc = F.pad(ycc.round()[None], (0, -width % 16, 0, height % 2), mode="replicate")[0]
    bias = 1 + torch.arange(ycc.shape[2] // 2, device=x.device) % 2  # libjpeg rounds up and down in turn
    halved = ((F.avg_pool2d(ycc[None, 1:], 2)[0] * 4 + bias) / 4).floor()
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    planes = []
    for plane, table in ((ycc[:1], LUMINANCE_TABLE), (halved, CHROMINANCE_TABLE)):
        plane = F.pad(plane[None], (0, 0, 0, -plane.shape[1] % 8), mode="replicate")[0]
        steps = x.new_tensor([int(n) for n in table.split()]).view(8, 8)
        steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
        k = torch.arange(8, device=x.device, dtype=torch.float32)
        dct = torch.cos((k[None] + 0.5) * k[:, None] * math.pi / 8) * 0.5
        dct[0] = dct[0] * 0.5**0.5
        c, h, w = plane.shape
        blocks = plane.view(c, h // 8, 8, w // 8, 8).transpose(2, 3) - 128
        coefficients = (dct @ blocks @ dct.T / steps).round() * steps
        blocks = (dct.T @ coefficients @ dct + 128).round().clamp(0, 255)
        planes.append(blocks.transpose(2, 3).reshape(c, h, w))
    # The decoder's triangle filter; it sees the chroma of the picture, not of the padding.
    chroma = planes[1][:, : (height + 1) // 2, : (width + 1) // 2]
    if chroma.shape[2] > 2:
        chroma = F.interpolate(chroma[None], scale_factor=2.0, mode="bilinear", align_corners=False)[0]
    else:  # libjpeg repeats so few columns
        chroma = chroma.repeat_interleave(2, 1).repeat_interleave(2, 2)
    chroma = chroma[:, :height, :width].round() - 128
    y, (cb, cr) = planes[0][0, :height, :width], chroma
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    return rgb.round().clamp(0, 255)
