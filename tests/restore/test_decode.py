"""Every kind of file: read rightly, or refused in one line."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lpmrf_fast.restore.decode import decode
from lpmrf_fast.restore.photo import PhotoError


def error(path, **options) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PhotoError) as caught:
            decode(path, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and has none."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    return start + struct.pack(">I", 100) + b"IDAT" + b"\0" * 10


# ---- what is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_files_come_back_exactly(tmp_path, picture, suffix):
    image = picture(size=(40, 33))
    image.save(tmp_path / f"x.{suffix}")
    photo = decode(tmp_path / f"x.{suffix}")
    assert np.array_equal(photo.rgb, np.asarray(image)) and photo.size == (33, 40)
    assert photo.alpha is None


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_lossy_files_are_read_by_content_not_name(tmp_path, picture, suffix):
    image = picture(size=(40, 33))
    image.save(tmp_path / f"x.{suffix}", quality=95)
    (tmp_path / f"x.{suffix}").rename(tmp_path / "x.png")
    difference = np.abs(decode(tmp_path / "x.png").rgb.astype(int) - np.asarray(image)).mean()
    assert difference < 3


def test_the_digest_is_that_of_the_bytes(tmp_path, picture):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture(2).save(tmp_path / "c.png")
    a, b, c = (decode(tmp_path / f"{name}.png").digest for name in "abc")
    assert a == b != c and len(a) == 64


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, picture, orientation):
    upright = picture(size=(48, 32))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores it so (Image.Transpose)
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "x.png").rgb, np.asarray(upright))


def test_alpha_is_set_aside_and_turned_with_the_picture(tmp_path, picture):
    image = picture(size=(48, 32), mode="RGBA")
    exif = Image.Exif()
    exif[0x0112] = 3
    image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "x.png", exif=exif)
    photo = decode(tmp_path / "x.png")
    assert np.array_equal(np.dstack([photo.rgb, photo.alpha]), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_few_colours_become_rgb(tmp_path, picture, mode):
    image = picture(mode="LA") if mode == "LA" else picture().convert(mode)
    image.save(tmp_path / "x.png")
    photo = decode(tmp_path / "x.png")
    assert np.array_equal(photo.rgb, np.asarray(image.convert("RGB")))
    assert (photo.alpha is not None) == (mode == "LA")


def test_a_transparent_palette_colour_is_alpha(tmp_path, picture):
    image = picture().quantize(8)
    image.save(tmp_path / "x.png", transparency=3)
    photo = decode(tmp_path / "x.png")
    assert np.array_equal(photo.alpha, np.where(np.asarray(image) == 3, 0, 255))
    assert np.array_equal(photo.rgb, np.asarray(image.convert("RGB")))


def test_16_bit_grayscale_is_rounded_to_8(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for suffix in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"x.{suffix}")
        photo = decode(tmp_path / f"x.{suffix}")
        assert np.array_equal(photo.rgb[..., 1], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_are_rounded_to_8(tmp_path, suffix, channels, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (32, 40, channels), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"x.{suffix}"), values[..., [2, 1, 0, 3][:channels]])
    photo = decode(tmp_path / f"x.{suffix}")
    exact = np.rint(values / 257)
    assert np.array_equal(photo.rgb, exact[..., :3])
    assert channels == 3 or np.array_equal(photo.alpha, exact[..., 3])
    monkeypatch.setitem(sys.modules, "cv2", None)  # without the extra: the upper byte
    assert np.abs(decode(tmp_path / f"x.{suffix}").rgb - exact[..., :3]).max() <= 1


def test_16_bit_colours_are_turned_upright(tmp_path):
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (32, 40, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), values[..., ::-1])
    data = (tmp_path / "x.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "x.png").write_bytes(data[:33] + chunk + data[33:])
    assert np.array_equal(decode(tmp_path / "x.png").rgb, np.rot90(np.rint(values / 257), -1))


def test_float_pictures_must_be_in_the_unit_interval(tmp_path):
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(decode(tmp_path / "x.tif").rgb[..., 0], np.rint(values * 255))
    for wrong in (2.0, -1.0, np.nan):
        Image.fromarray(np.where(values == 1, np.float32(wrong), values)).save(tmp_path / "y.tif")
        assert "floating-point pixels outside [0, 1]" in error(tmp_path / "y.tif")


def test_32_bit_integers_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), 70_000, np.int32)).save(tmp_path / "x.tif")
    assert "32-bit pixels" in error(tmp_path / "x.tif")


def test_cmyk_becomes_rgb(tmp_path, picture):
    rgb = picture()
    rgb.convert("CMYK").save(tmp_path / "x.tif")
    assert np.abs(decode(tmp_path / "x.tif").rgb.astype(int) - np.asarray(rgb)).max() <= 2
    rgb.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(decode(tmp_path / "x.jpg").rgb.astype(int) - np.asarray(rgb)).mean() < 8


def test_the_profile_is_kept_where_it_still_describes_the_pixels(tmp_path, picture):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "rgb.png", icc_profile=profile)
    assert decode(tmp_path / "rgb.png").icc_profile == profile
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg", icc_profile=profile)  # not one of CMYK: the formula serves
    photo = decode(tmp_path / "cmyk.jpg")
    assert photo.icc_profile is None and photo.rgb.shape == (64, 64, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_beside_sound_pixels_does_no_harm(tmp_path, picture):
    picture().save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert np.array_equal(decode(tmp_path / "x.png").rgb, np.asarray(picture()))


# ---- what is refused


def test_a_missing_file_and_a_folder(tmp_path):
    assert "no such file" in error(tmp_path / "x.png")
    assert "is a folder" in error(tmp_path)


def test_an_empty_file(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    assert "empty" in error(tmp_path / "x.png")


@pytest.mark.parametrize(
    "content",
    [b"hello, I am a text file", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7", b"<svg/>", b"GIF89a" + b"\0" * 20],
)
def test_other_files_whatever_they_are_called(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert "not an image that is read here" in error(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_never_half_a_picture(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: max(17, int(path.stat().st_size * share))])
    assert "get the file again" in error(path)


def test_flipped_bits_in_a_png_are_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.png").write_bytes(data)
    assert "get the file again" in error(tmp_path / "x.png")


@pytest.mark.parametrize("side", [2049, 10_000, 30_000, 2_000_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, side):
    (tmp_path / "x.png").write_bytes(png_header(side, side))
    message = error(tmp_path / "x.png")
    assert f"{side}x{side} pixels, over the limit of 4194304" in message and "--max-pixels" in message


def test_the_limit_can_be_raised_and_is_inclusive(tmp_path, picture):
    picture(size=(100, 50)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", max_pixels=5000).size == (50, 100)
    assert "100x50 pixels, over the limit of 4999" in error(tmp_path / "x.png", max_pixels=4999)
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "y.png").write_bytes(png_header(20_000, 20_000))  # above Pillow's own limit
    assert "damaged or truncated" in error(tmp_path / "y.png", max_pixels=10**9)
    assert Image.MAX_IMAGE_PIXELS == before


def test_a_picture_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png")
    assert "only 1x1 pixels" in error(tmp_path / "x.png")
