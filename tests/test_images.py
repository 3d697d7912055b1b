"""Every kind of picture becomes upright 8-bit RGB, or one line."""

import io

import numpy as np
import pytest
from PIL import Image

from lpmrf_fast.images import open_upright, read_rgb

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
EIGHT = np.rint(RAMP * 255).astype(np.uint8)


def stored(image: Image.Image, form="PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file


@pytest.mark.parametrize(
    ("image", "form", "tolerance"),
    [
        (Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG", 1),  # Pillow alone makes it white
        (Image.fromarray(np.rint(RAMP * 65535).astype(np.int32)), "TIFF", 1),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF", 1),
        (Image.fromarray(EIGHT), "PNG", 0),
        (Image.fromarray(np.dstack([EIGHT] * 3 + [np.zeros_like(EIGHT)])), "PNG", 0),  # alpha is dropped
        (Image.fromarray(EIGHT).convert("CMYK"), "TIFF", 1),
        (Image.fromarray(EIGHT).convert("RGB"), "BMP", 0),
        (Image.fromarray(EIGHT > 127), "PNG", 128),
    ],
    ids=["gray 16", "gray 32", "float", "gray", "rgba", "cmyk", "bmp", "bits"],
)
def test_kinds(image, form, tolerance):
    found = read_rgb(stored(image, form))
    assert found.mode == "RGB" and found.size == (64, 48)
    difference = np.abs(np.asarray(found).astype(int) - EIGHT[..., None])
    assert difference.max() <= tolerance


def test_exif_orientation_is_applied():
    image = Image.fromarray(EIGHT).convert("RGB")
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees, clockwise
    file = stored(image, exif=image.getexif())
    assert open_upright(file).size == (48, 64)
    assert np.array_equal(np.asarray(read_rgb(file))[..., 0], EIGHT.T[:, ::-1])


def test_what_cannot_be_read_is_one_line():
    whole = stored(Image.effect_noise((64, 64), 50)).getvalue()
    floats = stored(Image.fromarray(np.full((4, 4), 7, np.float32)), "TIFF").getvalue()
    for content, reason in (
        (b"", "no picture of a known format"),
        (b"no picture", "no picture of a known format"),
        (whole[:-500], "truncated"),
        (floats, r"pixels outside \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"cannot be decoded .*{reason}") as error:
            read_rgb(io.BytesIO(content))
        assert "\n" not in str(error.value)
