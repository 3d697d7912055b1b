"""Photos, differences in 8-bit levels, and stand-ins for a GPU: a tape for CUDA graphs, fake tensors for CUDA's."""

import pytest
import torch
from engine_stand_ins import Tape


@pytest.fixture
def photos():
    """photos((h, w), ...) → uint8 photos (3, h, w), each another smooth picture."""

    def draw(*sizes, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(len(sizes), 3, 6, 6, generator=generator)
        grown = (
            torch.nn.functional.interpolate(x[None], size, mode="bicubic")[0].clamp(0, 1)
            for x, size in zip(coarse, sizes)
        )
        return [(x * 255).round().to(torch.uint8) for x in grown]

    return draw


@pytest.fixture
def levels():
    """levels(a, b) → the largest difference of two uint8 pictures."""
    return lambda a, b: (torch.as_tensor(a).int() - torch.as_tensor(b).int()).abs().max().item()


@pytest.fixture
def tape():
    return Tape()
