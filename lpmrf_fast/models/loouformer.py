"""LooUFormer, the velocity network of Latent-PMRF: a U-shaped transformer over latents, neighborhood attention on the
fine levels and global attention on the coarse one. Derived from k-diffusion's hourglass transformer.

`sigma` keeps the official meaning here (1 = source, 0 = clean; velocity = source - clean); `lpmrf_fast.flow` and the
pipeline translate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpmrf_kernels as ops

from . import hourglass
from .config import records_config
from .hourglass import Hourglass, Level, TokenMerge, TokenSplit, attend
from .layers import (
    AdaRMSNorm2d,
    AxialRoPE,
    GaussianFourierProjection,
    MappingNetwork,
    RMSNorm2d,
    nearest_2x,
    pointwise,
    zero_,
)


def _preset(dims, layers, types, windows, time_dim, in_channels, patch=1) -> dict:
    return dict(
        in_channels=in_channels,
        out_channels=in_channels,
        patch_size=[patch, patch],
        block_dims=dims,
        block_layers=layers,
        block_types=types,
        window_sizes=windows,
        head_dims=[64] * len(dims),
        dwconv_type="dwconv",
        upsample_method="interpolate",
        downsample_method="conv",
        upsample_kernel_size=3,
        downsample_kernel_size=3,
        patch_embed_type="conv" if patch == 1 else "pixel_shuffle",
        use_bias=True,
        zero_init_last_layer=True,
        time_embed_dim=time_dim,
        time_embed_log_space=False,
        time_embed_freq_scale=1.0,
        mult=3.0,
        mapping_layers=2,
        mapping_mult=3.0,
    )


# The official widths are not published; "loouformer" follows the run names in the official test scripts
# (2 neighborhood, 4 neighborhood and 6 global blocks), its widths are ours.
PRESETS = {
    "loouformer": _preset(
        [256, 512, 768], [2, 4, 6], ["neighborhood", "neighborhood", "global"], [7, 7, 0], 768, in_channels=32
    ),
    "loouformer-s": _preset(
        [128, 256, 384], [2, 2, 4], ["neighborhood", "neighborhood", "global"], [7, 7, 0], 256, in_channels=16
    ),
}


def rounded_width(width: float) -> int:
    """The official rounding of hidden sizes to multiples of 64; a width below 33 gives 0 and is refused."""
    rounded = (int(width) + 31) // 64 * 64
    if rounded == 0:
        raise ValueError(f"LooUFormer: hidden width {width:g} rounds to 0; use wider blocks or a larger mult")
    return rounded


class ConvProject(nn.Module):
    """1x1 convolution, then a depthwise 3x3 one where `dwconv`; only the last of them has a bias."""

    def __init__(self, in_dim: int, out_dim: int, dwconv: bool, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 1, bias=bias and not dwconv)
        self.dwconv = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=bias) if dwconv else None

    @property
    def depthwise(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the depthwise convolution, which the op that follows computes; None without one."""
        return (None, None) if self.dwconv is None else (self.dwconv.weight, self.dwconv.bias)


class Attention(nn.Module):
    """Global attention, or neighborhood attention where `window_size` is given, with axial RoPE on q and k."""

    def __init__(self, dim: int, head_dim: int, window_size: int | None, dwconv: bool, bias: bool):
        super().__init__()
        self.num_heads = dim // head_dim
        if self.num_heads * head_dim != dim or head_dim % 8:
            raise ValueError(f"LooUFormer: head_dim {head_dim} must divide the width {dim} and be a multiple of 8")
        self.window_size = window_size
        self.qkv_proj = ConvProject(dim, 3 * dim, dwconv, bias)
        self.pos_emb = AxialRoPE(head_dim, self.num_heads)
        self.out_proj = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = pointwise(self.qkv_proj.conv, x)
        q, k, v = ops.dwconv_rope_qkv(qkv, self.num_heads, *self.qkv_proj.depthwise, cos, sin)
        return pointwise(self.out_proj, attend(q, k, v, self.window_size))


class FeedForward(nn.Module):
    """down(GELU(a) · b), (a | b) = project_in(x): the gate comes first here."""

    def __init__(self, dim: int, mult: float, dwconv: bool, bias: bool):
        super().__init__()
        hidden = rounded_width(dim * mult)
        self.project_in = ConvProject(dim, 2 * hidden, dwconv, bias)
        self.down_proj = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.dwconv_geglu(pointwise(self.project_in.conv, x), *self.project_in.depthwise, gate_first=True)
        return pointwise(self.down_proj, h)


class Block(hourglass.Block):
    def __init__(self, dim, head_dim, window_size, mult, cond_dim, dwconv, bias, zero_init):
        super().__init__()
        self.attn = Attention(dim, head_dim, window_size, dwconv, bias)
        self.ff = FeedForward(dim, mult, dwconv, bias)
        self.norm1 = AdaRMSNorm2d(dim, cond_dim, bias=bias)
        self.norm2 = AdaRMSNorm2d(dim, cond_dim, bias=bias)
        if zero_init:
            zero_(self.attn.out_proj)
            zero_(self.ff.down_proj)

    def parts(self):
        return self.norm1, self.attn, self.norm2, self.ff


class PatchEmbed(nn.Module):
    """3x3 convolution at full resolution."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """`conv` (stride 2), `pixel_unshuffle+conv` or `conv+pixel_unshuffle`."""

    def __init__(self, in_channels: int, out_channels: int, method: str, kernel_size: int, bias: bool):
        super().__init__()
        self.method = method
        if method == "conv":
            if kernel_size != 3:
                raise ValueError(f'LooUFormer: downsample_method "conv" needs kernel size 3, got {kernel_size}')
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=bias)
        else:
            widths = (in_channels * 4, out_channels) if method.startswith("pixel") else (in_channels, out_channels // 4)
            self.conv = nn.Conv2d(*widths, kernel_size, padding=(kernel_size - 1) // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.method == "pixel_unshuffle+conv":
            return self.conv(F.pixel_unshuffle(x, 2))
        x = self.conv(x)
        return F.pixel_unshuffle(x, 2) if self.method == "conv+pixel_unshuffle" else x


class Upsample(nn.Module):
    """`interpolate` (nearest 2x, convolution) or `pixel_shuffle`; then skip + fac · (up - skip)."""

    def __init__(self, in_channels: int, out_channels: int, method: str, kernel_size: int, bias: bool):
        super().__init__()
        self.method = method
        out_channels *= 4 if method == "pixel_shuffle" else 1
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=bias)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.method == "interpolate":
            x = self.conv(nearest_2x(x))
        else:
            x = F.pixel_shuffle(self.conv(x), 2)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class LooUFormer(Hourglass):
    """velocity = LooUFormer(x, sigma): x and velocity (B, in/out_channels, H, W), sigma (B,) or scalar in (0, 1].

    Arguments are the official ones. block_types: "neighborhood" (window_sizes, odd) or "global", finest level first;
    dwconv_type "dwconv" or "none"; upsample_method "interpolate" or "pixel_shuffle"; downsample_method "conv",
    "pixel_unshuffle+conv" or "conv+pixel_unshuffle"; patch_embed_type "conv" (patch_size unused) or "pixel_shuffle";
    time_embed_dim None: untimed, sigma must be None. mapping_dropout and scale are recorded and unused.
    Sizes and sampling: see `Hourglass`.
    """

    time_runs_down = True
    """See `lpmrf_fast.flow.velocity`."""

    @records_config
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size,
        block_dims,
        block_layers,
        block_types,
        window_sizes,
        head_dims,
        dwconv_type: str = "dwconv",
        upsample_method: str = "interpolate",
        downsample_method: str = "conv",
        upsample_kernel_size: int = 3,
        downsample_kernel_size: int = 3,
        patch_embed_type: str = "conv",
        use_bias: bool = True,
        zero_init_last_layer: bool = False,
        time_embed_dim: int | None = None,
        time_embed_log_space: bool = False,
        time_embed_freq_scale: float = 1.0,
        mult: float = 3.0,
        mapping_layers: int = 2,
        mapping_mult: float = 3.0,
        mapping_dropout: float = 0.0,
        scale: int = 1,
    ):
        super().__init__()
        for name, value, known in (
            ("dwconv_type", dwconv_type, ("dwconv", "none")),
            ("upsample_method", upsample_method, ("interpolate", "pixel_shuffle")),
            (
                "downsample_method",
                downsample_method,
                ("conv", "pixel_unshuffle+conv", "conv+pixel_unshuffle"),
            ),
            ("patch_embed_type", patch_embed_type, ("conv", "pixel_shuffle")),
            *(("block_types", kind, ("neighborhood", "global")) for kind in block_types),
        ):
            if value not in known:
                raise ValueError(f"LooUFormer: {name} must be one of {', '.join(known)}, got {value!r}")
        lengths = {len(block_dims), len(block_layers), len(block_types), len(window_sizes), len(head_dims)}
        if len(lengths) != 1:
            raise ValueError("LooUFormer: block_dims, _layers, _types, window_sizes and head_dims differ in length")

        self.time_embed_dim = time_embed_dim
        if time_embed_dim is not None:
            self.time_proj = GaussianFourierProjection(time_embed_dim // 2, time_embed_freq_scale, time_embed_log_space)
            self.timestep_embedder = nn.Linear(time_embed_dim, time_embed_dim, bias=False)
            self.mapping = MappingNetwork(mapping_layers, time_embed_dim, rounded_width(time_embed_dim * mapping_mult))

        def level(i):
            window = window_sizes[i] if block_types[i] == "neighborhood" else None
            return Level(
                Block(
                    block_dims[i],
                    head_dims[i],
                    window,
                    mult,
                    time_embed_dim,
                    dwconv_type == "dwconv",
                    use_bias,
                    zero_init_last_layer,
                )
                for _ in range(block_layers[i])
            )

        finer = range(len(block_dims) - 1)
        pairs = list(zip(block_dims[:-1], block_dims[1:]))
        dims, patch = block_dims, (1, 1) if patch_embed_type == "conv" else tuple(patch_size)
        if patch_embed_type == "conv":
            self.proj_in = PatchEmbed(in_channels, dims[0], use_bias)
            self.proj_out = PatchEmbed(dims[0], out_channels, use_bias)
        else:
            area = patch[0] * patch[1]
            self.proj_in = TokenMerge(nn.Conv2d(in_channels * area, dims[0], 1, bias=use_bias), patch)
            # Its convolution always has a bias, as the official one.
            self.proj_out = TokenSplit(nn.Conv2d(dims[0], out_channels * area, 1), patch)
        self.down_blocks = nn.ModuleList(level(i) for i in finer)
        self.up_blocks = nn.ModuleList(level(i) for i in finer)
        self.mid_block = level(-1)
        self.downs = nn.ModuleList(
            Downsample(fine, coarse, downsample_method, downsample_kernel_size, use_bias) for fine, coarse in pairs
        )
        self.ups = nn.ModuleList(
            Upsample(coarse, fine, upsample_method, upsample_kernel_size, use_bias) for fine, coarse in pairs
        )
        self.out_norm = RMSNorm2d(dims[0], eps=torch.finfo(torch.float32).eps)
        if zero_init_last_layer:
            zero_(self.proj_out.proj)

        self.in_channels, self.patch = in_channels, patch
        self.multiple = tuple(p * 2 ** len(finer) for p in patch)
        needed = [w * 2**i for i, (w, kind) in enumerate(zip(window_sizes, block_types)) if kind == "neighborhood"]
        self.minimum = tuple(p * max(needed, default=1) for p in patch)

    def stack(self):
        levels = self.down_blocks, self.downs, self.mid_block, self.up_blocks, self.ups
        return self.proj_in, *levels, self.out_norm, self.proj_out

    def time_condition(self, sigma: Tensor | None) -> Tensor | None:
        if (sigma is None) != (self.time_embed_dim is None):
            raise ValueError(
                "LooUFormer: this network is untimed, call it without sigma"
                if self.time_embed_dim is None
                else "LooUFormer: sigma is missing; pass the time of each batch element"
            )
        if sigma is None:
            return None
        embedding = self.time_proj(sigma).to(self.timestep_embedder.weight.dtype)
        return self.mapping(self.timestep_embedder(embedding))
