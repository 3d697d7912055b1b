"""Outputs: whole or not at all, in the format of their name, with alpha and profile but no EXIF."""

import os
import stat

import numpy as np
import pytest
from PIL import Image, ImageCms

from lpmrf_fast.restore import encode as module
from lpmrf_fast.restore.encode import encode, write_whole
from lpmrf_fast.restore.photo import Photo, PhotoError


@pytest.fixture
def photo(picture):
    alpha = np.asarray(picture(1, mode="L"))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return Photo(np.asarray(picture()), "0" * 64, alpha, profile)


@pytest.mark.parametrize(
    "name, kind, alpha, exact",
    [
        ("x.png", "PNG", True, True),
        ("x.WEBP", "WEBP", True, False),
        ("x.tiff", "TIFF", True, True),
        ("x.jpg", "JPEG", False, False),
        ("x.jfif", "JPEG", False, False),
        ("x.bmp", "BMP", False, True),
    ],
)
def test_the_suffix_decides_the_format(tmp_path, photo, picture, name, kind, alpha, exact):
    rgb = np.asarray(picture(2))
    encode(rgb, tmp_path / "new" / name, photo)
    with Image.open(tmp_path / "new" / name) as image:
        assert image.format == kind
        assert (image.mode == "RGBA") == alpha
        assert (image.info.get("icc_profile") == photo.icc_profile) == (kind != "BMP")
        assert not image.getexif().get(0x0112)
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - rgb)
        assert difference.max() == 0 if exact else difference.mean() < 3
        if alpha:
            assert np.array_equal(np.asarray(image.getchannel("A")), photo.alpha)
    assert os.listdir(tmp_path / "new") == [name]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def refuse(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.png"]


def test_the_file_has_the_rights_that_others_would_have(tmp_path):
    write_whole(tmp_path / "x.png", b"new")
    (tmp_path / "y.png").write_bytes(b"other")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.png", "y.png")]
    assert rights[0] == rights[1]


def test_very_long_names_can_be_written(tmp_path):
    name = "ä" * 120 + ".png"
    write_whole(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == [name]


def test_an_output_that_cannot_be_written_says_where_and_what_to_do(tmp_path, photo):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PhotoError, match=r"file/x\.png cannot be written .*choose another -o"):
        encode(photo.rgb, tmp_path / "file" / "x.png", photo)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(PhotoError, match=r"x\.png cannot be written .*choose another -o"):
        encode(photo.rgb, tmp_path / "x.png", photo)
    assert sorted(os.listdir(tmp_path)) == ["file", "x.png"]


def test_a_size_that_the_format_does_not_hold(tmp_path, photo):
    photo.alpha = None
    with pytest.raises(PhotoError, match="cannot be stored as WEBP .*--ext png"):
        encode(np.zeros((16, 16384, 3), np.uint8), tmp_path / "x.webp", photo)
    assert os.listdir(tmp_path) == []
