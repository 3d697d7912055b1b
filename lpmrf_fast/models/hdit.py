"""HDiT, the velocity network of PMRF (arXiv 2410.00418): k-diffusion's hourglass diffusion transformer in pixels.

Neighborhood attention on the fine levels, global attention on the coarse one, cosine-similarity logits with a learned
scale a head, axial RoPE, gated feed-forward layers; no biases.

`sigma` is the flow's time here: 0 = source, 1 = clean, and v = clean - source.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpmrf_kernels as ops

from . import hourglass
from .config import records_config
from .hourglass import Hourglass, Level, TokenMerge, TokenSplit, as_map, attend
from .layers import AdaRMSNorm2d, AxialRoPE, KeepsFloat32, MappingNetwork, RMSNorm2d, pointwise, zero_


def _preset(widths, depths, mapping_width) -> dict:
    """Neighborhood attention on all levels but the coarsest, 4x4 patches, heads of 64, no dropout."""
    near = {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
    return dict(
        in_channels=3,
        out_channels=3,
        widths=widths,
        depths=depths,
        patch_size=[4, 4],
        self_attns=[near] * (len(widths) - 1) + [{"type": "global", "d_head": 64}],
        mapping_depth=2,
        mapping_width=mapping_width,
        dropout_rate=[0] * len(widths),
        mapping_dropout_rate=0.0,
    )


# The first two carry their official names: blind face restoration at 512, and the controlled experiments at 256.
PRESETS = {
    "hdit-imagenet256sp4": _preset([256, 512, 1024], [2, 2, 8], 768),
    "hdit-xl2": _preset([384, 768], [2, 11], 768),
    "hdit-s": _preset([128, 256, 384], [2, 2, 4], 256),
}

FACTOR = 3
"""Hidden width of the feed-forward layers and of the mapping network, in units of their width."""
KINDS = ("neighborhood", "global", "shifted-window")


def window_attention(q: Tensor, k: Tensor, v: Tensor, size: int, shift: int) -> Tensor:
    """Attention inside windows of size x size after a cyclic shift to the lower right; (B, H, W, heads, D).

    Windows that the shift filled from two sides of the image keep the sides apart.
    """
    B, H, W, NH, D = q.shape
    rows, columns = H // size, W // size

    def windows(x):  # (B, H, W, heads, D) → (B, windows, heads, size², D)
        x = x.roll((shift, shift), (1, 2)).view(B, rows, size, columns, size, NH, D)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, rows * columns, NH, size * size, D)

    def wrapped(n):  # along one axis: which positions came around the edge
        return torch.arange(n, device=q.device) < shift

    side = 2 * wrapped(H)[:, None] + wrapped(W)
    side = side.view(rows, size, columns, size).transpose(1, 2).reshape(rows * columns, 1, size * size)
    mask = side[..., :, None] == side[..., None, :]
    out = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=mask, scale=1.0)
    out = out.view(B, rows, columns, NH, size, size, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, NH, D)
    return out.roll((-shift, -shift), (1, 2))


class FourierFeatures(KeepsFloat32):
    """[cos, sin](2π · x Wᵀ) of x (B, in) with stored random frequencies W (out / 2, in)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x.to(self.weight.dtype) @ self.weight.T
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class SelfAttention(nn.Module):
    """out_proj(attention(h)), h = norm(x). kind: an entry of the constructor's self_attns, index: the block's."""

    def __init__(self, width: int, cond_dim: int, kind: dict, index: int, dropout: float):
        super().__init__()
        self.type, head_dim = kind["type"], kind.get("d_head", 64)
        self.num_heads = width // head_dim
        if self.num_heads * head_dim != width or head_dim % 8:
            raise ValueError(f"HDiT: d_head {head_dim} must divide the width {width} and be a multiple of 8")
        self.kernel_size = kind.get("kernel_size", 7) if self.type == "neighborhood" else None
        self.window_size = kind.get("window_size")
        self.shift = index % 2 * (self.window_size // 2) if self.type == "shifted-window" else 0
        self.norm = AdaRMSNorm2d(width, cond_dim, bias=False)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((self.num_heads,), 10.0))
        self.pos_emb = AxialRoPE(head_dim, self.num_heads)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = zero_(nn.Linear(width, width, bias=False))

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = pointwise(self.qkv_proj, h)
        # Logits are plain products: q and k have the length of the square root of their head's scale.
        q, k, v = ops.dwconv_rope_qkv(qkv, self.num_heads, cos=cos, sin=sin, scale=self.scale)
        if self.type == "shifted-window":
            out = as_map(window_attention(q, k, v, self.window_size, self.shift))
        else:
            out = attend(q, k, v, self.kernel_size, scale=1.0)
        return pointwise(self.out_proj, self.dropout(out))


class FeedForward(nn.Module):
    """down(value · GELU(gate)), (value | gate) = up(h), h = norm(x): the gate comes last here."""

    def __init__(self, width: int, cond_dim: int, dropout: float):
        super().__init__()
        self.norm = AdaRMSNorm2d(width, cond_dim, bias=False)
        self.up_proj = nn.Linear(width, 2 * FACTOR * width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zero_(nn.Linear(FACTOR * width, width, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return pointwise(self.down_proj, self.dropout(ops.geglu(pointwise(self.up_proj, h), dim=1)))


class Block(hourglass.Block):
    def __init__(self, width: int, cond_dim: int, kind: dict, index: int, dropout: float):
        super().__init__()
        self.self_attn = SelfAttention(width, cond_dim, kind, index, dropout)
        self.ff = FeedForward(width, cond_dim, dropout)

    def parts(self):
        return self.self_attn.norm, self.self_attn, self.ff.norm, self.ff


class SkipSplit(TokenSplit):
    """To the finer level, and skip + fac · (split - skip) of what the way down left."""

    def __init__(self, proj: nn.Linear):
        super().__init__(proj)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.lerp(skip, super().forward(x), self.fac.to(x.dtype))


class HDiT(Hourglass):
    """velocity = HDiT(x, sigma): x (B, in_channels, H, W), velocity (B, out_channels, H, W), sigma (B,) or scalar.

    Pixels in [0, 1]; x may carry condition channels after its image (in_channels 6). sigma None is the official
    untimed form: a constant in place of the time embedding. Arguments are the official ones (PMRF's
    create_hdit_model). self_attns, one a level, finest first: {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
    {"type": "global", "d_head": 64} or {"type": "shifted-window", "d_head": 64, "window_size": 8}.
    Sizes and sampling: see `Hourglass`.
    """

    time_runs_down = False
    """See `lpmrf_fast.flow.velocity`."""

    @records_config
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths,
        depths,
        patch_size,
        self_attns,
        mapping_depth: int,
        mapping_width: int,
        dropout_rate,
        mapping_dropout_rate: float,
    ):
        super().__init__()
        if len({len(widths), len(depths), len(self_attns), len(dropout_rate)}) != 1:
            raise ValueError("HDiT: widths, depths, self_attns and dropout_rate differ in length")
        for kind in self_attns:
            _check_attention(kind)
        if mapping_width % 2:
            raise ValueError(f"HDiT: mapping_width must be even, got {mapping_width}")
        patch = tuple(patch_size)
        # Modules are made in the official order: published training checkpoints list EMA weights by it.
        area = patch[0] * patch[1]
        self.patch_in = TokenMerge(nn.Linear(in_channels * area, widths[0], bias=False), patch)
        self.time_emb = FourierFeatures(1, mapping_width)
        self.time_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.aug_emb = FourierFeatures(9, mapping_width)
        self.aug_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.mapping = MappingNetwork(mapping_depth, mapping_width, FACTOR * mapping_width, mapping_dropout_rate)

        def level(i, first):
            return Level(
                Block(widths[i], mapping_width, self_attns[i], j, dropout_rate[i])
                for j in range(first, first + depths[i])
            )

        finer, pairs = range(len(widths) - 1), list(zip(widths[:-1], widths[1:]))
        self.down_levels = nn.ModuleList(level(i, 0) for i in finer)
        self.up_levels = nn.ModuleList(level(i, depths[i]) for i in finer)
        self.mid_level = level(-1, 0)
        self.merges = nn.ModuleList(TokenMerge(nn.Linear(4 * fine, coarse, bias=False)) for fine, coarse in pairs)
        self.splits = nn.ModuleList(SkipSplit(nn.Linear(coarse, 4 * fine, bias=False)) for fine, coarse in pairs)
        self.out_norm = RMSNorm2d(widths[0], eps=1e-6, name="scale")
        self.patch_out = TokenSplit(zero_(nn.Linear(widths[0], out_channels * area, bias=False)), patch)

        self.in_channels, self.patch = in_channels, patch
        cells = [2**i * (kind["window_size"] if kind["type"] == KINDS[2] else 1) for i, kind in enumerate(self_attns)]
        self.multiple = tuple(p * math.lcm(*cells) for p in patch)
        needed = [2**i * kind.get("kernel_size", 7) for i, kind in enumerate(self_attns) if kind["type"] == KINDS[0]]
        self.minimum = tuple(p * max(needed, default=1) for p in patch)

    def stack(self):
        levels = self.down_levels, self.merges, self.mid_level, self.up_levels, self.splits
        return self.patch_in, *levels, self.out_norm, self.patch_out

    def time_condition(self, sigma: Tensor | None) -> Tensor:
        """sigma (K,) → the condition (K, mapping_width) of every norm; None: (1, mapping_width)."""
        weight = self.time_in_proj.weight
        if sigma is None:
            time = weight.new_ones(1, weight.shape[1])
        else:
            time = self.time_emb(sigma[:, None]).to(weight.dtype)
        # PMRF never sets k-diffusion's nine augmentation parameters; their embedding of zero is a learned constant.
        augmentation = self.aug_emb(self.aug_emb.weight.new_zeros(1, 9)).to(weight.dtype)
        return self.mapping(self.time_in_proj(time) + self.aug_in_proj(augmentation))


def _check_attention(kind) -> None:
    if not isinstance(kind, dict) or kind.get("type") not in KINDS:
        got = kind.get("type") if isinstance(kind, dict) else kind
        raise ValueError(f"HDiT: the type of self_attns must be one of {', '.join(KINDS)}, got {got!r}")
    size = {"neighborhood": "kernel_size", "shifted-window": "window_size"}.get(kind["type"])
    for key in kind:
        if key not in ("type", "d_head", size):
            raise ValueError(
                f"HDiT: {kind['type']} attention has no {key!r}; it has d_head{f', {size}' if size else ''}"
            )
    if size == "window_size" and kind.get(size, 0) < 1:
        raise ValueError(f"HDiT: shifted-window attention needs a window_size of at least 1, got {kind.get(size)}")
    if size == "kernel_size" and kind.get(size, 7) % 2 == 0:
        raise ValueError(f"HDiT: kernel_size must be odd, got {kind[size]}")
