"""Nearest 2x followed by a 3x3 convolution, with 4/9 of the multiplications: one transposed convolution.

Of nine taps on the enlarged image four fall on distinct pixels of the small one, which four depends on the parity of
the output's row and column. So the convolution is four 2x2 convolutions on the small image, one a parity, and these are
together one transposed convolution with a 4x4 kernel, stride 2 and padding 1 (exact: the sums are only associated
otherwise). Along one axis, with taps w0 w1 w2 of the 3x3 kernel:

    even outputs 2i      w0 · x[i - 1] + (w1 + w2) · x[i]          4x4 kernel (w2, w1 + w2, w0 + w1, w0)
    odd outputs 2i + 1   (w0 + w1) · x[i] + w2 · x[i + 1]

Shapes      x (B, C, H, W), weight (O, C, 3, 3), bias (O,); the result (B, O, 2H, 2W).
Dtypes      any float; taps are added in at least float32 and rounded once to the weight's dtype.
Layouts     that of F.conv_transpose2d: channels-last where x or the folded weight is.
Traffic     the enlarged image (4 · B · C · H · W) is neither written nor read.
Kernels     None of ours, on any device: cuDNN and oneDNN have transposed convolutions. It is plain differentiable
            PyTorch, so autograd, autocast, compile and export see through it, and nothing needs registering.
Source      Identity of sub-pixel and transposed convolution, Shi et al. 2016 (arXiv 1609.07009).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import _upcast
from .reference import upsample_conv as _reference
from .registry import Kernel, Op, register

_NOTE = "it is one transposed convolution of PyTorch (cuDNN, oneDNN)"
register(Op("upsample_conv", {"torch": Kernel(_reference)}, notes={"forward": _NOTE, "backward": _NOTE}))


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """The 4x4 kernel of the transposed convolution: (O, C, 3, 3) → (C, O, 4, 4), same dtype and memory format.

    Fold once where the weight does not change, and hand the result to `upsample_conv`. Differentiable.
    Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"fold_upsample_weight: weight must be (O, C, 3, 3), got the shape {tuple(weight.shape)}")
    w = _upcast(weight).transpose(0, 1)
    for axis in (2, 3):
        w0, w1, w2 = w.unbind(axis)
        w = torch.stack((w2, w1 + w2, w0 + w1, w0), axis)
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return w.to(weight.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, folded: Tensor | None = None) -> Tensor:
    """conv2d(nearest 2x of x, weight, bias, padding=1) with 4/9 of the multiplications.

    x: (B, C, H, W). weight: (O, C, 3, 3), bias: (O,). folded: `fold_upsample_weight(weight)`; made here where it is not
    given, else gradients go to it and not to the weight. Returns (B, O, 2H, 2W). Differentiable.
    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"upsample_conv: expected x (B, C, H, W) and weight (O, C, 3, 3), got {tuple(x.shape)} and"
            f" {tuple(weight.shape)}"
        )
    if folded is None:
        folded = fold_upsample_weight(weight)
    elif folded.shape != (weight.shape[1], weight.shape[0], 4, 4):
        raise ValueError(
            f"upsample_conv: folded must be {(weight.shape[1], weight.shape[0], 4, 4)}, got {tuple(folded.shape)};"
            " use fold_upsample_weight(weight)"
        )
    return F.conv_transpose2d(x, folded, bias, stride=2, padding=1)
