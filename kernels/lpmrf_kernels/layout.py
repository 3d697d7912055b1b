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
