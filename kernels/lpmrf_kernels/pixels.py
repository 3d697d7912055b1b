"""Tiles of [pixels, channels] over a logical NCHW map, for the ops that work on each element alone.

A map is addressed by its strides. Where the rows of all maps follow each other without a gap, the pixels of a photo are
one axis and no index is divided; the tile is then as wide along memory as a warp's loads.
"""

from torch import Tensor

from ._triton import jit, tl, triton


@jit
def pixel_tile(pid, channels, pixels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch element, pixels [BLOCK_P, 1] and channels [1, BLOCK_C] of a program, all int64; channels run fastest."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_p = tl.cdiv(pixels, BLOCK_P)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rest = pid // blocks_c
    p = (rest % blocks_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    return (rest // blocks_p).to(tl.int64), p, c.to(tl.int64)


def rows_adjoin(*maps: Tensor) -> bool:
    """Whether in each of these (B, C, H, W) maps a row begins where the one before ends."""
    return all(t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3) for t in maps)


TILE = {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4}
"""2048 elements by 4 warps: 16 a thread, in loads of 16 bytes."""


def tile_default(x: Tensor, channels: int) -> dict[str, int]:
    """A tile as large as TILE that is wide along the axis where x is dense."""
    size = TILE["BLOCK_P"] * TILE["BLOCK_C"]
    if x.stride(1) == 1:
        block_c = min(TILE["BLOCK_C"], triton.next_power_of_2(channels))
        return {**TILE, "BLOCK_P": size // block_c, "BLOCK_C": block_c}
    block_p = min(256, triton.next_power_of_2(x.shape[2] * x.shape[3]))
    return {**TILE, "BLOCK_P": block_p, "BLOCK_C": size // block_p}
