"""A file → RGB for the networks. Every reason why not is a PhotoError of one line.

The rules:
- The content decides the format, not the name, and only PNG, JPEG, WebP, BMP and TIFF decoders ever run.
- The number of pixels is checked before any of them is decoded.
- A damaged file is an error, never half a picture.
- EXIF orientation is applied. Of an animation or a multi-page file the first picture is taken.
- Alpha is set aside and comes back in the output; the colours under it are restored as they are.
- Grayscale and palettes become RGB. CMYK goes through its colour profile to sRGB where Pillow can, else by its formula.
- 16 bits become 8: v / 257, rounded. Colours need OpenCV for that (the extra `photo`); without it the upper byte is
  taken, which is what Pillow reads: at most one level less. Floats must be in [0, 1].
- An RGB colour profile is not applied: the numbers stay, and the profile goes into the output.
"""

import hashlib
import io
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps

from .find import looks_like_photo
from .photo import FORMATS, Photo, PhotoError

DEFAULT_MAX_PIXELS = 2048 * 2048
"""The whole picture goes through the networks: above this, memory runs out on ordinary machines."""
MIN_SIDE = 16

_pillow_limit = Lock()


def decode(path: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Photo:
    """Read a photo. Raises PhotoError."""
    data = _read(Path(path))
    digest = hashlib.sha256(data).hexdigest()
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoError(
            f"{width}x{height} pixels, over the limit of {max_pixels}; crop it to the face, or raise the limit with"
            " --max-pixels (memory grows with it)"
        )
    if min(width, height) < MIN_SIDE:
        raise PhotoError(f"only {width}x{height} pixels; use a picture of at least {MIN_SIDE} on each side")
    try:
        image.load()
    except MemoryError:
        raise PhotoError(f"not enough memory to decode {width}x{height} pixels; use a smaller picture") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise PhotoError(f"damaged or truncated {image.format} ({_line(error)}); get the file again") from error
    profile = image.info.get("icc_profile")
    rgb, alpha = _to_rgb(_upright(_deep(data, image) or image))
    kept = isinstance(profile, bytes) and profile[16:20] == b"RGB " and image.mode in ("RGB", "RGBA", "P", "RGBX")
    return Photo(rgb, digest, alpha, profile if kept else None)


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise PhotoError("is a folder")
        if path.exists() and not path.is_file():
            raise PhotoError("not a regular file; give an image file")
        with open(path, "rb") as file:
            head = file.read(16)
            if not head:
                raise PhotoError("the file is empty; get it again")
            if not looks_like_photo(head):
                raise PhotoError("not an image that is read here (PNG, JPEG, WebP, BMP, TIFF); convert it first")
            return head + file.read()
    except FileNotFoundError:
        raise PhotoError("no such file; check the path") from None
    except OSError as error:
        raise PhotoError(f"cannot be read ({error.strerror or error}); check the path and its permissions") from error


def _open(data: bytes) -> Image.Image:
    # Pillow's own limit of pixels is a global that --max-pixels could not raise: it is off while a header is parsed,
    # which decodes nothing, and `decode` has its own before anything is decoded.
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=tuple(dict.fromkeys(FORMATS.values())))
        except Exception as error:  # a damaged header can raise anything
            raise PhotoError("damaged or truncated: its header is not readable; get the file again") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _deep(data: bytes, image: Image.Image) -> Image.Image | None:
    """A picture of 16 bits a colour, rounded to 8, which Pillow would cut off; None: not one, or no OpenCV."""
    if image.format == "PNG":
        deep = data[24] == 16 and image.mode in ("RGB", "RGBA")
    else:
        deep = image.format == "TIFF" and len(bits := image.tag_v2.get(258, ())) > 2 and set(bits) == {16}
    try:
        import cv2
    except ImportError:
        return None
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if deep else None
    if values is None or values.dtype != np.uint16 or values.shape[2:] not in ((3,), (4,)):
        return None
    eight = _eight_bits(values)
    rounded = Image.fromarray(np.ascontiguousarray(eight[..., [2, 1, 0, 3][: eight.shape[2]]]))  # OpenCV's are BGR
    rounded.getexif()[0x0112] = image.getexif().get(0x0112, 1)  # the orientation, which OpenCV leaves alone here
    return rounded


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside sound pixels: they are shown as they are stored, as viewers do
        return image


def _to_rgb(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Any mode → (RGB (H, W, 3) uint8, alpha (H, W) uint8 or None)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        gray = _eight_bits(np.asarray(image))
        return np.repeat(gray[..., None], 3, axis=-1), None
    if image.mode == "CMYK":
        image = _from_cmyk(image)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("LA") if image.mode == "La" else image
        rgba = np.array(straight.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
    try:
        return np.array(image.convert("RGB")), None
    except ValueError:
        raise PhotoError(f"the colour mode {image.mode} is not read here; convert it to 8-bit RGB first") from None


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit integers or floats in [0, 1] → uint8."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also NaN
            raise PhotoError("floating-point pixels outside [0, 1]; scale them first")
        return np.rint(values * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise PhotoError("32-bit pixels; convert it to 8 or 16 bits first")
    return np.rint(values / 257).astype(np.uint8)


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            from PIL import ImageCms

            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
        except Exception:  # a profile that LittleCMS refuses, or a Pillow without it: the plain formula
            pass
    return image.convert("RGB")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
