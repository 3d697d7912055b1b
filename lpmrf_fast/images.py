"""Files of pictures for datasets and scores: upright RGB of 8 bits, or one line that says why not.

Photos to restore are read by `restore.decode`, which brings back what is dropped here (alpha, colour profiles).
"""

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def open_upright(file) -> Image.Image:
    """A picture turned as its EXIF orientation says; nothing is decoded yet where it says nothing.

    file: a path or a file of bytes. Raises ValueError, one line, for what is no picture.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("cannot be decoded (no picture of a known format)") from None
    except Exception as error:  # a damaged header can raise anything
        raise ValueError(f"cannot be decoded ({_line(error)})") from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside sound pixels, which are taken as they are stored; others fail when read
        return image


def read_rgb(file) -> Image.Image:
    """A picture as 8-bit RGB. Grayscale is repeated, alpha is dropped, 16 bits become 8 and floats in [0, 1] as well.

    file: a path, a file of bytes, or what `open_upright` returned. Raises ValueError, one line, for a damaged picture.
    """
    image = file if isinstance(file, Image.Image) else open_upright(file)
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # Pillow's own conversion to 8 bits cuts off: everything from 255 on would be white.
            values, most = np.asarray(image), 1.0 if image.mode == "F" else 65535
            if not (values.min() >= 0 and values.max() <= most):  # also NaN
                raise ValueError(f"pixels outside [0, {most:g}]")
            image = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f"cannot be decoded ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
