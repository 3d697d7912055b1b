"""SwinIR, the posterior-mean network f(y) = E[x | y] (PMRF's and DifFace's form: pixel-unshuffle in, upsampler out).

Paper: arXiv 2108.10257. Parameter and buffer names are the official ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lpmrf_kernels as ops
from lpmrf_kernels.reference import shift_mask

from .config import records_config
from .layers import LayerNorm, Linear, nearest_2x

RGB_MEAN = (0.4488, 0.4371, 0.4040)


def _pmrf(embed_dim: int, groups: int) -> dict:
    return dict(
        img_size=64,
        patch_size=1,
        in_chans=3,
        num_out_ch=3,
        embed_dim=embed_dim,
        depths=[6] * groups,
        num_heads=[6] * groups,
        window_size=8,
        mlp_ratio=2,
        sf=8,
        img_range=1.0,
        upsampler="nearest+conv",
        resi_connection="1conv",
        unshuffle=True,
        unshuffle_scale=8,
    )


PRESETS = {"swinir-l": _pmrf(180, 8), "swinir-m": _pmrf(120, 5)}


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window_size: int, num_heads: int, qkv_bias: bool, qk_scale: float | None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        n = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(n * n, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        axis = torch.arange(window_size)
        y, x = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
        dy, dx = y[:, None] - y, x[:, None] - x  # query minus key
        self.register_buffer("relative_position_index", (dy + window_size - 1) * n + dx + window_size - 1)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, window_size: int, shift: int) -> Tensor:
        """x (B, H, W, C)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, L, L)
        return self.proj(ops.window_attention(self.qkv(x), bias, window_size, shift, self.scale))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); a shifted block rolls the map by half a window."""

    def __init__(self, dim, resolution, num_heads, window_size, shift, mlp_ratio, qkv_bias, qk_scale):
        super().__init__()
        # As the official code does: a map of one window has nothing to shift.
        self.window_size, self.shift = (
            min(window_size, *resolution),
            shift if min(resolution) > window_size else 0,
        )
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, self.window_size, num_heads, qkv_bias, qk_scale)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        # The official state dict has it; the op computes it, for maps of any size.
        mask = shift_mask(*resolution, self.window_size, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C)."""
        x = x + self.attn(self.norm1(x), self.window_size, self.shift)
        return x + self.mlp(self.norm2(x))


def residual_convolution(dim: int, kind: str) -> nn.Module:
    """The convolution in front of a residual connection: "1conv", or "3conv" with a bottleneck."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    if kind != "3conv":
        raise ValueError(f'SwinIR: resi_connection must be "1conv" or "3conv", got {kind!r}')
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


class BasicLayer(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResidualGroup(nn.Module):
    """Blocks, a convolution, and the group's input (official name RSTB)."""

    def __init__(self, blocks, dim: int, kind: str):
        super().__init__()
        self.residual_group = BasicLayer(blocks)
        self.conv = residual_convolution(dim, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual_group(x)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Holds the norm in front of the groups; tokens here are pixels, so there is nothing to embed."""

    def __init__(self, dim: int, norm: bool):
        super().__init__()
        self.norm = LayerNorm(dim) if norm else None


class SwinIR(nn.Module):
    """Images in [0, 1] → their posterior mean, about [0, 1] and unclipped: (B, 3, H, W) → (B, 3, H, W) when
    unshuffle_scale equals sf, else enlarged by sf / unshuffle_scale.

    Arguments are the official ones; drop rates, hq_key, lq_key, learning_rate, weight_decay and use_checkpoint are
    recorded and unused. upsampler: "nearest+conv" (sf 2, 4 or 8), "pixelshuffle", "pixelshuffledirect" or "" (no
    enlargement; the output is added to the input). H and W must be multiples of `multiple`, else ValueError.
    """

    @records_config
    def __init__(
        self,
        img_size=64,
        patch_size: int = 1,
        in_chans: int = 3,
        num_out_ch: int = 3,
        embed_dim: int = 96,
        depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        sf: int = 4,
        img_range: float = 1.0,
        upsampler: str | None = "",
        resi_connection: str = "1conv",
        unshuffle: bool = False,
        unshuffle_scale: int | None = None,
        hq_key: str = "jpg",
        lq_key: str = "hint",
        learning_rate: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"SwinIR: {len(depths)} depths but {len(num_heads)} num_heads")
        if unshuffle and unshuffle_scale != sf:
            # The official constructor unshuffles by sf and counts channels by unshuffle_scale: it needs them equal.
            raise ValueError(f"SwinIR: unshuffle_scale {unshuffle_scale} must equal sf {sf}")
        if patch_size != 1:
            raise ValueError(f"SwinIR: patch_size must be 1, got {patch_size}")
        self.img_range, self.sf, self.upsampler = img_range, sf, upsampler or ""
        self.window_size = window_size
        self.unshuffle_scale = unshuffle_scale if unshuffle else 1
        self.multiple = self.unshuffle_scale * window_size
        """Height and width of an image must be multiples of this."""
        mean = torch.tensor(RGB_MEAN if in_chans == 3 else (0.0,)).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)

        conv = nn.Conv2d(in_chans * self.unshuffle_scale**2, embed_dim, 3, padding=1)
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(sf), conv) if unshuffle else conv

        resolution = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_embed = PatchEmbed(embed_dim, patch_norm)
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, math.prod(resolution), embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.ape, self.resolution = ape, resolution
        self.layers = nn.ModuleList(
            ResidualGroup(
                [
                    Block(
                        embed_dim,
                        resolution,
                        heads,
                        window_size,
                        (j % 2) * (window_size // 2),
                        mlp_ratio,
                        qkv_bias,
                        qk_scale,
                    )
                    for j in range(depth)
                ],
                embed_dim,
                resi_connection,
            )
            for depth, heads in zip(depths, num_heads)
        )
        self.norm = LayerNorm(embed_dim)
        self.conv_after_body = residual_convolution(embed_dim, resi_connection)

        width = 64
        if self.upsampler in ("nearest+conv", "pixelshuffle"):
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, width, 3, padding=1), nn.LeakyReLU(0.01))
        if self.upsampler == "nearest+conv":
            if sf not in (2, 4, 8):
                raise ValueError(f'SwinIR: "nearest+conv" enlarges by 2, 4 or 8, got sf {sf}')
            for i in range(int(math.log2(sf))):
                setattr(self, f"conv_up{i + 1}", nn.Conv2d(width, width, 3, padding=1))
            self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        elif self.upsampler == "pixelshuffle":
            factors = [3] if sf == 3 else [2] * int(math.log2(sf))
            if math.prod(factors) != sf:
                raise ValueError(f'SwinIR: "pixelshuffle" enlarges by 3 or a power of 2, got sf {sf}')
            self.upsample = nn.Sequential(
                *(m for f in factors for m in (nn.Conv2d(width, f * f * width, 3, padding=1), nn.PixelShuffle(f)))
            )
        elif self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(nn.Conv2d(embed_dim, sf * sf * num_out_ch, 3, padding=1), nn.PixelShuffle(sf))
        elif self.upsampler:
            raise ValueError(
                'SwinIR: upsampler must be "nearest+conv", "pixelshuffle", "pixelshuffledirect" or "",'
                f" got {upsampler!r}"
            )
        if self.upsampler != "pixelshuffledirect":
            self.conv_last = nn.Conv2d(width if self.upsampler else embed_dim, num_out_ch, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def body(self, x: Tensor) -> Tensor:
        """(B, C, H, W) features in and out: norm, groups, norm."""
        x = x.permute(0, 2, 3, 1)
        if self.patch_embed.norm is not None:
            x = self.patch_embed.norm(x)
        if self.ape:
            x = x + self._position_embedding(*x.shape[1:3]).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def _position_embedding(self, H: int, W: int) -> Tensor:
        """(1, H, W, C); stretched to maps of another size than img_size, which the official code cannot take."""
        table = self.absolute_pos_embed.view(1, *self.resolution, -1)
        if (H, W) != self.resolution:
            table = F.interpolate(table.permute(0, 3, 1, 2), (H, W), mode="bilinear").permute(0, 2, 3, 1)
        return table

    def forward(self, y: Tensor) -> Tensor:
        if y.shape[-2] % self.multiple or y.shape[-1] % self.multiple:
            raise ValueError(
                f"SwinIR: height and width must be multiples of {self.multiple},"
                f" got {y.shape[-2]}x{y.shape[-1]}; pad the image"
            )
        mean = self.mean.to(y.dtype)
        y = (y - mean) * self.img_range
        first = self.conv_first(y)
        x = self.conv_after_body(self.body(first)) + first
        if self.upsampler == "":
            x = y + self.conv_last(x)
        elif self.upsampler == "pixelshuffledirect":
            x = self.upsample(x)
        elif self.upsampler == "pixelshuffle":
            x = self.conv_last(self.upsample(self.conv_before_upsample(x)))
        else:
            x = self.conv_before_upsample(x)
            for i in range(int(math.log2(self.sf))):
                x = nearest_2x(x)
                x = F.leaky_relu(getattr(self, f"conv_up{i + 1}")(x), 0.2)
            x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return x / self.img_range + mean
