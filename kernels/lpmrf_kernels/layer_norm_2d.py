"""LayerNorm over the channels of each pixel, optionally of a sum: Sim-VAE's norm.

    s = x + residual,    y = (s - mean) / sqrt(var + eps) · weight + bias,    mean and var over the channels of a pixel

The kernels, with shapes, dtypes, layouts, traffic and what goes to the reference, are in `pixel_norm.py`.
Source      Ba et al. 2016; the 2-D form of Latent-PMRF's Sim-VAE (arXiv 2507.00447).
"""

import torch
from torch import Tensor

from . import reference
from .pixel_norm import check, define


def _reference(x, residual, weight, bias, eps):
    return reference.layer_norm_2d(x, weight, bias, eps, residual)


define("layer_norm_2d", _reference, centred=True)


def layer_norm_2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None
):
    """LayerNorm over the channels of each pixel; with a residual, of x + residual in the same pass.

    x: (B, C, H, W), any float dtype and memory format. weight, bias: (C,) in any float dtype, or None. residual: shape
    and dtype of x, any memory format. Nothing is mutated; differentiable in all of them.
    Returns y, or (x + residual, y) with a residual, each with x's shape, dtype and memory format.
    Raises TypeError for dtypes, ValueError for shapes, devices or an eps that do not fit.
    """
    check("layer_norm_2d", x, residual, eps, weight=(weight, {1}), bias=(bias, {1}))
    outputs = torch.ops.lpmrf.layer_norm_2d(x, residual, weight, bias, eps)
    return outputs[0] if residual is None else tuple(outputs)
