"""A decoded photo, and the file formats that are read and written."""

from dataclasses import dataclass

import numpy as np

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""File name suffix → format. Reading goes by content, writing by suffix."""


class PhotoError(ValueError):
    """One photo that cannot be read, restored or written. One line: what is wrong and what to do, without the path."""


@dataclass
class Photo:
    """A picture as the networks take it, and what goes back into the restored file."""

    rgb: np.ndarray
    """(H, W, 3) uint8, upright."""
    digest: str
    """SHA-256 of the file's bytes, hexadecimal."""
    alpha: np.ndarray | None = None
    """(H, W) uint8, upright; None for opaque photos."""
    icc_profile: bytes | None = None
    """Colour profile of `rgb`; None: sRGB is assumed."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.rgb.shape[:2]
