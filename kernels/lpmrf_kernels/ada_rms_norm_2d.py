"""RMSNorm over the channels of each pixel times (1 + scale), optionally of a sum: the transformers' norm.

    s = x + residual,    y = s / sqrt(mean over channels of s² + eps) · (1 + scale)

The kernels, with shapes, dtypes, layouts, traffic and what goes to the reference, are in `pixel_norm.py`.
Source      HDiT (Crowson et al. 2024, k-diffusion's AdaRMSNorm); LooUFormer of Latent-PMRF (arXiv 2507.00447).
"""

import torch
from torch import Tensor

from . import reference
from .pixel_norm import check, define


def _reference(x, residual, scale, bias, eps):
    return reference.ada_rms_norm_2d(x, scale, eps, residual)


define("ada_rms_norm_2d", _reference, centred=False, plus_one=True)


def ada_rms_norm_2d(x: Tensor, scale: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    """RMSNorm over the channels of each pixel times (1 + scale); with a residual, of x + residual in the same pass.

    x: (B, C, H, W), any float dtype and memory format. scale: (B, C), one row a photo, any float dtype; it may be
    expanded. residual: shape and dtype of x, any memory format. Nothing is mutated; differentiable in all of them.
    Returns y, or (x + residual, y) with a residual, each with x's shape, dtype and memory format.
    Raises TypeError for dtypes, ValueError for shapes, devices or an eps that do not fit.
    """
    check("ada_rms_norm_2d", x, residual, eps, scale=(scale, {2}))
    outputs = torch.ops.lpmrf.ada_rms_norm_2d(x, residual, scale, None, eps)
    return outputs[0] if residual is None else tuple(outputs)
