"""Layers that more than one network uses. A layer owns parameters and their official names; arithmetic is an op's."""

import math
from functools import cache

import torch
from torch import Tensor, nn

import lpmrf_kernels as ops


def zero_(layer: nn.Module) -> nn.Module:
    """Set weight and bias to zero, so that the branch that ends here starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def nearest_2x(x: Tensor) -> Tensor:
    """Every pixel of (B, C, H, W) twice along both sides: (B, C, 2H, 2W)."""
    if not torch.compiler.is_compiling():
        return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    # Between two convolutions the compiler of torch 2.13 gives interpolate's input no gradient on CPUs, and takes three
    # times as long.
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    return rows.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def pointwise(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, C, H, W) as a matrix product over rows of channels, its bias added in the product.

    The result is channels-last. On a CPU faster than the convolution, 1.1 to 2 times at the sizes of these networks.
    """
    rows = x.permute(0, 2, 3, 1)
    # Flat rows are one product whatever their strides, never one of each photo and row.
    out = linear(rows.flatten(0, 2), layer.weight.flatten(1), layer.bias)
    return out.unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x @ weightᵀ + bias over the last dimension; gelu: its GELU, the exact one.

    On a CPU, for inference, it is oneDNN's product, which PyTorch has for its compiler: bias and GELU cost no pass of
    their own, and in float32 it is about twice as fast as the one behind F.linear on AMD's CPUs.
    """
    if _onednn_takes(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    y = nn.functional.linear(x, weight, bias)
    return nn.functional.gelu(y) if gelu else y


def _onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Eager inference on a CPU: oneDNN's product has no gradient and no autocast rule."""
    return (
        not torch.compiler.is_compiling()  # first: what follows cannot be traced
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in _onednn_dtypes()
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype)
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Those of which this machine's oneDNN has a product."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


class Linear(nn.Linear):
    """nn.Linear whose product is `linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


# On CUDA a convolution's bias is a pass of its own, so it goes into the pass that follows. On a CPU oneDNN adds it in
# the convolution for 1 to 3 % of its time, and the pass that follows is no faster for having it. There that pass writes
# over what it reads: memory that is new to the process costs more than SiLU.


def conv_silu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """SiLU(conv(x))."""
    if not x.is_cuda:
        return nn.functional.silu(conv(x), inplace=not torch.is_grad_enabled())
    return ops.bias_silu(without_bias(conv, x), conv.bias)


def conv_residual(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """conv(x) + residual."""
    if not x.is_cuda:
        y = conv(x)
        return y.add_(residual) if y.dtype == residual.dtype else y + residual
    y = without_bias(conv, x)
    return ops.bias_residual(y, conv.bias, residual.to(y.dtype))


class KeepsFloat32(nn.Module):
    """A module whose buffers stay at least float32 when the model is cast: frequencies multiply large numbers."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device)
        return self


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension of (B, H, W, C), of the names of PyTorch's.

    PyTorch's own adds up the gradients of weight and bias in the input's precision on CPUs: in bfloat16 and for an
    image of 16384 pixels the bias keeps half of its gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_2d(x.permute(0, 3, 1, 2), self.weight, self.bias, self.eps).permute(0, 2, 3, 1)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_2d(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.Module):
    """GroupNorm of (B, C, H, W), optionally followed by SiLU in the same pass (`act`)."""

    def __init__(self, num_groups: int, channels: int, eps: float = 1e-6, act: str = "none"):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"GroupNorm: {num_groups} groups do not divide {channels} channels")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.num_groups, self.eps, self.act = num_groups, eps, act

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, self.act)


class RMSNorm2d(nn.Module):
    """RMSNorm over the channels of each pixel of (B, C, H, W), with a learned gain of the official name `name`."""

    def __init__(self, channels: int, eps: float, name: str = "weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(channels)))
        self.name, self.eps = name, eps

    @property
    def gain(self) -> Tensor:
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm_2d(x, self.gain, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension with a learned `scale`: the mapping network's norm."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), self.eps)


class AdaRMSNorm2d(nn.Module):
    """RMSNorm over channels times (1 + linear(cond)); without a condition width, times a plain weight."""

    def __init__(self, channels: int, cond_dim: int | None, eps: float = 1e-6, bias: bool = True):
        super().__init__()
        self.eps = eps
        if cond_dim is None:
            self.norm = RMSNorm2d(channels, eps)
        else:
            self.linear = zero_(nn.Linear(cond_dim, channels, bias=bias))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            return self.norm(x)
        return ops.ada_rms_norm_2d(x, self.linear(cond).expand(x.shape[0], -1), self.eps)


class GaussianFourierProjection(KeepsFloat32):
    """[cos, sin](2π · s · W) of s (B,) with stored random frequencies W; `log` takes log(s) in place of s."""

    def __init__(self, size: int, scale: float = 1.0, log: bool = False):
        super().__init__()
        self.register_buffer("weight", torch.randn(size) * scale)
        self.log = log

    def forward(self, s: Tensor) -> Tensor:
        s = s.to(self.weight.dtype)
        phase = 2 * math.pi * (s.log() if self.log else s)[:, None] * self.weight
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class MappingBlock(nn.Module):
    """x + down(value · GELU(gate)), where (value | gate) = up(RMSNorm(x))."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zero_(nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.dropout(ops.geglu(self.up_proj(self.norm(x)))))


class MappingNetwork(nn.Module):
    """RMSNorm, `layers` gated residual blocks, RMSNorm: turns a time embedding into the networks' condition."""

    def __init__(self, layers: int, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.in_norm = RMSNorm(dim)
        self.blocks = nn.ModuleList(MappingBlock(dim, hidden, dropout) for _ in range(layers))
        self.out_norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class AxialRoPE(KeepsFloat32):
    """Angles of a two-axis rotary embedding. `freqs` (heads, m): m = head_dim / 8 frequencies a head and axis."""

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        m = head_dim // 8
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), num_heads * m + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(m, num_heads).T.contiguous())

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos (H, W, 2) as (row, column) → cos and sin, each (H, W, heads, head_dim / 4)."""
        theta = (pos[:, :, None, :, None] * self.freqs[:, None]).flatten(-2)
        return theta.cos(), theta.sin()


def axial_positions(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cell centres (H, W, 2) of square cells whose longer side spans [-1, 1], as (row, column)."""
    longer = max(height, width)

    def centres(n):
        return (2 * torch.arange(n, dtype=dtype, device=device) + 1 - n) / longer

    return torch.stack(torch.meshgrid(centres(height), centres(width), indexing="ij"), dim=-1)


def coarser_positions(pos: Tensor) -> Tensor:
    """(H, W, 2) → (H/2, W/2, 2): each coarse cell sits at the mean of its four children."""
    h, w, _ = pos.shape
    return pos.view(h // 2, 2, w // 2, 2, 2).mean(dim=(1, 3))
