"""Photos to restore: smooth random pictures, the same for the same seed."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture():
    """picture(seed, size=(width, height), mode="RGB") → a PIL image."""

    def draw(seed: int = 0, size=(64, 64), mode: str = "RGB") -> Image.Image:
        channels = len(Image.new(mode, (1, 1)).getbands())
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, channels), dtype=np.uint8)
        planes = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(channels)]
        return Image.merge(mode, planes) if channels > 1 else planes[0]

    return draw
