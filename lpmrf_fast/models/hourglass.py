"""The hourglass transformer that LooUFormer and HDiT both are: down the levels, through the middle, up again.

What depends on no official name is here, once: the blocks' two residual branches, patches, tables for a sampling, and
the way through the levels. Activations are (B, C, H, W), channels-last in memory.
"""

import torch
from torch import Tensor, nn

import lpmrf_kernels as ops

from .layers import AdaRMSNorm2d, axial_positions, coarser_positions, pointwise
from .tables import BlockTables, Tables


def attend(q: Tensor, k: Tensor, v: Tensor, window_size: int | None, scale: float | None = None) -> Tensor:
    """Attention over (B, H, W, heads, D), global or, with a window size, of neighborhoods → (B, heads · D, H, W)."""
    if window_size is not None:
        return as_map(ops.neighborhood_attention_2d(q, k, v, window_size, scale))
    tokens = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    return as_map(ops.attention(*tokens, scale).transpose(1, 2).reshape(q.shape))


def as_map(heads: Tensor) -> Tensor:
    """(B, H, W, heads, D) → (B, heads · D, H, W)."""
    return heads.flatten(3).permute(0, 3, 1, 2)


def add_norm(norm: AdaRMSNorm2d, x: Tensor, branch: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + branch, and its norm; scale (B, C) is the adaptive norm's, None that of the untimed one."""
    if branch is None:
        return x, norm(x, None) if scale is None else ops.ada_rms_norm_2d(x, scale, norm.eps)
    if scale is None:
        x = x + branch
        return x, norm(x, None)
    return ops.ada_rms_norm_2d(x, scale, norm.eps, residual=branch)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + ff(norm2(x)), of the modules that a network's own block names.

    The second branch is handed on unadded: the norm that comes next adds it in its own pass.
    """

    def parts(self) -> tuple[AdaRMSNorm2d, nn.Module, AdaRMSNorm2d, nn.Module]:
        """norm1, attn, norm2, ff: attn has `pos_emb` and is called with (h, cos, sin)."""
        raise NotImplementedError

    def tables(self, pos: Tensor, cond: Tensor | None) -> BlockTables:
        """What this block needs to know of the positions and of the condition (K, width) of K times."""
        norm1, attn, norm2, _ = self.parts()
        scales = () if cond is None else (norm1.linear(cond), norm2.linear(cond))
        return BlockTables(*attn.pos_emb(pos), scales)

    def forward(self, x: Tensor, branch: Tensor | None, tables: BlockTables) -> tuple[Tensor, Tensor]:
        """(x, branch) of the block before, to be added, → (x, branch) of this one."""
        norm1, attn, norm2, ff = self.parts()
        scale1, scale2 = tables.scales or (None, None)
        x, h = add_norm(norm1, x, branch, scale1)
        x, h = add_norm(norm2, x, attn(h, tables.cos, tables.sin), scale2)
        return x, ff(h)


class Level(nn.ModuleList):
    """Blocks at one resolution."""

    def forward(self, x: Tensor, tables: list[BlockTables]) -> Tensor:
        branch = None
        for block, known in zip(self, tables):
            x, branch = block(x, branch, known)
        return x if branch is None else x + branch


class TokenMerge(nn.Module):
    """Patches flattened as (row offset, column offset, channel), then `proj`: a matrix or a 1x1 convolution."""

    def __init__(self, proj: nn.Module, patch=(2, 2)):
        super().__init__()
        self.patch, self.proj = tuple(patch), proj

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        p, q = self.patch
        x = x.permute(0, 2, 3, 1).reshape(B, H // p, p, W // q, q, C).transpose(2, 3)
        return pointwise(self.proj, x.reshape(B, H // p, W // q, p * q * C).permute(0, 3, 1, 2))


class TokenSplit(nn.Module):
    """The inverse of `TokenMerge`."""

    def __init__(self, proj: nn.Module, patch=(2, 2)):
        super().__init__()
        self.patch, self.proj = tuple(patch), proj

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.patch
        x = pointwise(self.proj, x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = x.reshape(B, H, W, p, q, C // (p * q)).transpose(2, 3)
        return x.reshape(B, H * p, W * q, C // (p * q)).permute(0, 3, 1, 2)


class Hourglass(nn.Module):
    """velocity = network(x, sigma), x (B, in_channels, H, W); the network's own class says what sigma means.

    H and W must be multiples of `multiple` and at least `minimum`, else ValueError.

    Sampling. Time embedding, scales of the adaptive norms, positions and rotary tables depend on the times and the size
    alone, so a sampler computes them once, before its loop:

        tables = network.prepare(sigmas, height, width)      # all K times, any batch
        velocity = network(x, tables=tables, step=k)         # in place of network(x, sigmas[k])

    `forward` without tables makes the same ones for its own times; with them it differs by a matrix product's rounding.
    Where `fuses_euler`, network(x, ..., euler=(z, dt)) returns z + dt · velocity, one pass with the last layers.
    """

    in_channels: int
    patch: tuple[int, int]
    multiple: tuple[int, int]
    """Height and width must be multiples of these."""
    minimum: tuple[int, int]
    """Height and width must be at least these, so that each level holds a whole attention window."""

    def stack(self):
        """(into tokens, down levels, downsamplers, middle, up levels, upsamplers, norm, out of tokens).

        Levels are finest first; upsamplers take (x, skip).
        """
        raise NotImplementedError

    def time_condition(self, sigma: Tensor | None) -> Tensor | None:
        """sigma (K,) → the condition (K, width) of every norm; None: that of no time, if there is one."""
        raise NotImplementedError

    @property
    def fuses_euler(self) -> bool:
        """Whether `forward` takes `euler`: the output is a matrix product a token, not a 3x3 convolution."""
        return isinstance(self.stack()[-1], TokenSplit)

    def prepare(self, sigmas: Tensor | list[float] | float | None, height: int, width: int) -> Tables:
        """All that `forward` needs for these times (K,) and inputs of this height and width, whatever they contain.

        sigmas: None for no time. Raises ValueError for sizes that do not fit.
        """
        self._check(height, width)
        into, down, _, middle, up, _, _, _ = self.stack()
        weight = into.proj.weight
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas, device=weight.device).reshape(-1)
        cond = self.time_condition(sigmas)
        # Angles need float32 even where the network runs in half precision.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        positions = [axial_positions(height // self.patch[0], width // self.patch[1], dtype, weight.device)]
        for _ in down:
            positions.append(coarser_positions(positions[-1]))
        levels = [*zip(down, positions), (middle, positions[-1]), *reversed(list(zip(up, positions)))]
        return Tables((height, width), [[block.tables(pos, cond) for block in blocks] for blocks, pos in levels])

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float | None = None,
        *,
        tables: Tables | None = None,
        step: int | Tensor | None = None,
        euler: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: x must be (B, {self.in_channels}, H, W), got the shape {tuple(x.shape)}")
        H, W = x.shape[-2:]
        if tables is None:
            tables = self.prepare(sigma, H, W)
        elif tables.size != (H, W):
            raise ValueError(f"{name}: the tables are for inputs of {tables.size}, got {(H, W)}; prepare others")
        into, down, downsamplers, middle, up, upsamplers, norm, out = self.stack()
        levels = iter(tables.at(step, len(x)))
        x = into(x)
        skips = []
        for blocks, downsample in zip(down, downsamplers):
            x = blocks(x, next(levels))
            skips.append(x)
            x = downsample(x)
        x = middle(x, next(levels))
        for blocks, upsample, skip in reversed(list(zip(up, upsamplers, skips))):
            x = blocks(upsample(x, skip), next(levels))
        if euler is None:
            return out(norm(x))
        return ops.output_euler(x, norm.gain, norm.eps, out.proj.weight, out.proj.bias, *euler, patch=out.patch)

    def _check(self, height: int, width: int) -> None:
        size = (height, width)
        if any(s % m for s, m in zip(size, self.multiple)) or any(s < m for s, m in zip(size, self.minimum)):
            raise ValueError(
                f"{type(self).__name__}: height and width must be multiples of {self.multiple} and at least"
                f" {self.minimum}, got {size}; pad the input"
            )
