"""Strides: reading any layout in place, and keeping the first input's."""

import torch
from torch import Tensor


def memory_order(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Views of all tensors with the dimensions permuted so that `out`, which is dense, becomes contiguous.

    Then an elementwise kernel walks `out` as a flat array and needs strides only for what it reads.
    """
    order = sorted(range(out.dim()), key=out.stride, reverse=True)
    return [t.permute(order) for t in (out, *tensors)]


def laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y with the strides of `torch.empty_like(x)`: y itself where it has them, as PyTorch's own results mostly do."""
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x, dtype=y.dtype).copy_(y)


def evenly_spaced(*images: Tensor | None) -> bool:
    """Whether in each (B, C, H, W) tensor all pixels of a photo are one stride apart: its rows follow each other."""
    return all(
        x is None or x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3) for x in images
    )


def image_strides(x: Tensor | None, flat: bool) -> tuple[int, int, int, int]:
    """Strides (b, c, h, w); if `flat` (`evenly_spaced`), w is the stride from a pixel to the next. Zeros for None."""
    if x is None:
        return 0, 0, 0, 0
    b, c, h, w = x.stride()
    return (b, c, h, h) if flat and x.shape[3] == 1 else (b, c, h, w)
