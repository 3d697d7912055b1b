"""RMSNorm over the channels of each pixel, optionally of a sum.

    s = x + residual,    y = s / sqrt(mean over channels of s² + eps) · weight

The kernels, with shapes, dtypes, layouts, traffic and what goes to the reference, are in `pixel_norm.py`.
Source      Zhang & Sennrich 2019; LooUFormer's last norm.
"""

import torch
from torch import Tensor

from . import reference
from .pixel_norm import check, define


def _reference(x, residual, weight, bias, eps):
    return reference.rms_norm_2d(x, weight, eps, residual)


define("rms_norm_2d", _reference, centred=False)


def rms_norm_2d(x: Tensor, weight: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None):
    """RMSNorm over the channels of each pixel; with a residual, of x + residual in the same pass.

    x: (B, C, H, W), any float dtype and memory format. weight: (C,) or one row a photo (B, C), any float dtype, or
    None. residual: shape and dtype of x, any memory format. Nothing is mutated; differentiable in all of them.
    Returns y, or (x + residual, y) with a residual, each with x's shape, dtype and memory format.
    Raises TypeError for dtypes, ValueError for shapes, devices or an eps that do not fit.
    """
    check("rms_norm_2d", x, residual, eps, weight=(weight, {1, 2}))
    outputs = torch.ops.lpmrf.rms_norm_2d(x, residual, weight, None, eps)
    return outputs[0] if residual is None else tuple(outputs)
