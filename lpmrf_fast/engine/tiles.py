"""Photos of any size as rows of a bucket, and back: padding by reflection, tiles with blended seams.

Photos are (3, h, w) uint8 tensors in any memory format.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def reflected(length: int, padded: int, device) -> Tensor:
    """Indices (padded,) that continue an axis by reflection about its last element, as often as it takes."""
    period = max(1, 2 * (length - 1))
    i = torch.arange(padded, device=device) % period
    return torch.minimum(i, period - i) if length > 1 else i


def fill(pixels: Tensor, rows: Sequence[Tensor]) -> None:
    """Write photos into the first rows of pixels (B, 3, H, W), each padded on its lower and right side."""
    H, W = pixels.shape[-2:]
    for place, row in zip(pixels, rows):
        h, w = row.shape[-2:]
        place[:, :h, :w].copy_(row)
        if w < W:
            place[:, :h, w:] = place[:, :h].index_select(2, reflected(w, W, place.device)[w:])
        if h < H:
            place[:, h:] = place.index_select(1, reflected(h, H, place.device)[h:])


class Box(NamedTuple):
    """A part of a photo."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part of (..., H, W), a view."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


def boxes(height: int, width: int, tile: tuple[int, int] | None) -> list[Box]:
    """Tiles of one size that cover a photo, in rows, or the whole one; neighbours overlap by an eighth or more."""
    h, w = (min(size, part) for size, part in zip((height, width), tile or (height, width)))
    return [Box(top, left, h, w) for top in _starts(height, h) for left in _starts(width, w)]


def _starts(length: int, tile: int) -> list[int]:
    if tile == length:
        return [0]
    count = math.ceil((length - tile) / (tile - tile // 8)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blended(tiles: Sequence[Tensor], places: Sequence[Box], height: int, width: int) -> Tensor:
    """Tiles (3, h, w) uint8 → the photo (3, height, width): a mean whose weights fall towards a tile's borders.

    Tiles may be padded. One tile is the photo itself, bit for bit.
    """
    tiles = [tile[:, : box.height, : box.width] for tile, box in zip(tiles, places)]
    if len(tiles) == 1:
        return tiles[0]
    total = torch.zeros(3, height, width, device=tiles[0].device)
    weights = torch.zeros(height, width, device=tiles[0].device)
    for tile, box in zip(tiles, places):
        down, across = (_ramp(n, tile.device) for n in tile.shape[-2:])
        weight = down[:, None] * across
        box.of(total).add_(tile * weight)
        box.of(weights).add_(weight)
    return (total / weights).round().to(torch.uint8)


def _ramp(length: int, device) -> Tensor:
    """Weights along a tile's axis: they climb over an eighth of it from either end."""
    i = torch.arange(length, device=device)
    return torch.minimum(i + 1, length - i).clamp(max=max(1, length // 8)).float()


def tile_seed(seed: int, index: int) -> int:
    """The seed of a photo's tile: its own for the first, so that tiles do not repeat one pattern of noise."""
    mixed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed
