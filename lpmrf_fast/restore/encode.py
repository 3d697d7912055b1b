"""A restored picture → a file that appears whole or not at all.

The suffix decides the format: PNG and TIFF lossless, JPEG and WebP at quality 95 (JPEG without chroma subsampling).
PNG, WebP and TIFF take the photo's alpha back, JPEG and BMP drop it. The colour profile is kept. EXIF is not: its
orientation has been applied, and what else it says (camera, place, time) is about the photo, not about this picture.
"""

import io
import os
import secrets
from pathlib import Path

import numpy as np
from PIL import Image

from .photo import FORMATS, Photo, PhotoError

OPTIONS = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "BMP": {},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
WITH_ALPHA = ("PNG", "WEBP", "TIFF")


def encode(rgb: np.ndarray, path: Path, photo: Photo) -> None:
    """Write (H, W, 3) uint8 under `path` with the photo's alpha and profile; makes folders. Raises PhotoError."""
    kind = FORMATS[path.suffix.lower()]
    if photo.alpha is not None and kind in WITH_ALPHA:
        rgb = np.dstack([rgb, photo.alpha])
    options = dict(OPTIONS[kind])
    if photo.icc_profile and kind != "BMP":
        options["icc_profile"] = photo.icc_profile
    file = io.BytesIO()
    try:
        Image.fromarray(rgb).save(file, kind, **options)
    except Exception as error:  # sizes that a format does not hold
        raise PhotoError(f"cannot be stored as {kind} ({' '.join(str(error).split())}); use --ext png") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, file.getbuffer())
    except OSError as error:
        reason = error.strerror or str(error)
        raise PhotoError(f"the output {path} cannot be written ({reason}); choose another -o, or free space") from error


def write_whole(path: Path, data) -> None:
    """Write a file under a temporary name beside it, then rename: readers see the old file, the new one, or none."""
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
