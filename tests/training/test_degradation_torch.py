"""The degradations on tensors against those of OpenCV and Pillow: the same picture but for rounding, and the noise."""

import colorsys
import json
import math

import numpy as np
import pytest

pytest.importorskip("cv2")
import torch

from lpmrf_fast.training import degradation, degradation_torch
from lpmrf_fast.training.degradation import PRESETS, OnPillow, draw
from lpmrf_fast.training.degradation_torch import OnTorch


def picture(height=72, width=56, seed=0):
    """(H, W, 3) uint8: smooth colours, an edge and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([120 + 90 * np.sin(x / 9), 2.5 * y, 100 + 80 * np.cos((x + y) / 13)], -1)
    image[height // 3 :, width // 2 :] += 50
    return (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def both(operation, *arguments, image=None):
    """The operation's results on either side, (H, W, 3) RGB."""
    image = picture() if image is None else image
    x = getattr(OnPillow(*image.shape[:2]), operation)(image[..., ::-1].astype(np.float32), *arguments)
    y = getattr(OnTorch(*image.shape[:2]), operation)(torch.from_numpy(image).permute(2, 0, 1).float(), *arguments)
    return x[..., ::-1], y.permute(1, 2, 0).numpy()


KERNELS = [
    {"kind": "gaussian", "size": 41, "sigma_x": 7.0, "sigma_y": 2.0, "theta": 0.7},
    {"kind": "generalized", "size": 15, "sigma_x": 2.0, "beta": 0.6},
    {"kind": "plateau", "size": 21, "sigma_x": 2.0, "sigma_y": 1.0, "theta": 1.0, "beta": 1.5},
    {"kind": "sinc", "size": 13, "cutoff": 1.5},
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k["kind"])
@pytest.mark.parametrize("size", [(72, 56), (7, 3)])
def test_blur(kernel, size):
    a, b = both("blur", kernel, image=picture(*size))
    assert np.abs(a - b).max() < 1e-2


@pytest.mark.parametrize("how", degradation.RESIZE)
@pytest.mark.parametrize("factor", [1 / 7.3, 0.5, 1.0, 1.37])
def test_resize(how, factor):
    a, b = both("resize", factor, how)
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-2


@pytest.mark.parametrize("quality", [5, 30, 49, 75, 100])
@pytest.mark.parametrize("size", [(64, 64), (72, 56), (33, 47), (1, 1)])
def test_jpeg(quality, size):
    a, b = both("jpeg", quality, image=picture(*size))
    error = np.abs(a - b)
    # A coefficient halfway between two steps may fall either way, which shows in its block: 16x16 pixels for chroma.
    assert np.quantile(error, 0.9) <= 2 and error.mean() < (1.5 if quality == 5 else 0.6)


def test_jpeg_of_pictures_that_fill_no_block():
    """libjpeg fills them up, and repeats chroma of two columns where it interpolates others."""
    errors = []
    for height, width in ((2, 2), (3, 4), (4, 9), (6, 5), (10, 12), (17, 8)):
        for seed in range(5):
            a, b = both("jpeg", 75, image=picture(64, 64, seed)[::4, ::4][:height, :width])
            errors.append(np.abs(a - b).mean())
    assert np.median(errors) < 0.7


@pytest.mark.parametrize("kind, amount", [("gaussian", 20.0), ("poisson", 1.5)])
@pytest.mark.parametrize("gray", [False, True])
def test_noise_has_the_same_mean_and_spread(kind, amount, gray):
    flat = np.full((128, 128, 3), 100, np.uint8)
    flat[:, 64:] = 180
    flat[:16] = np.arange(128)[:, None]  # more levels, which Poisson noise depends on
    a, b = both("noise", kind, amount, gray, 5, image=flat)
    for part in (np.s_[16:, :64], np.s_[16:, 64:]):
        assert a[part].mean() == pytest.approx(b[part].mean(), abs=1.0)
        assert a[part].std() == pytest.approx(b[part].std(), rel=0.1)
    assert (np.ptp(b - flat, axis=-1).max() < 1e-3) == gray


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_degradations_without_noise_agree(preset, monkeypatch):
    for operations in (OnPillow, OnTorch):
        monkeypatch.setattr(operations, "noise", lambda self, x, *_: x)
    images = [picture(64, 64, seed) for seed in range(7)]
    drawn = [draw(np.random.default_rng(seed), PRESETS[preset]) for seed in range(7)]
    batch = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in images])
    found = degradation_torch.degrade(batch, drawn)
    assert found.dtype == torch.uint8 and found.shape == batch.shape
    exact = np.stack([degradation.degrade(image, params) for image, params in zip(images, drawn)]).astype(float)
    errors = np.abs(exact - found.permute(0, 2, 3, 1).numpy()).mean((1, 2, 3))
    # One JPEG coefficient that falls the other way is much in a picture of a few blocks: hence not the largest.
    assert np.median(errors) < 1, errors


def test_two_stages_are_drawn_as_json_and_repeat():
    kinds, orders = set(), set()
    for seed in range(300):
        params = draw(np.random.default_rng(seed), PRESETS["real-esrgan"])
        assert params == draw(np.random.default_rng(seed), PRESETS["real-esrgan"]) == json.loads(json.dumps(params))
        names = [operation[0] for operation in params["program"]]
        assert names.count("jpeg") == 2 == names.count("noise") and names[-1] == "resize"
        kinds |= {o[1]["kind"] for o in params["program"] if o[0] == "blur"}
        kinds |= {o[1] for o in params["program"] if o[0] == "noise"}
        orders.add(names[-2])
    assert kinds == {"iso", "aniso", "generalized", "plateau", "sinc", "gaussian", "poisson"}
    assert orders == {"jpeg", "blur", "resize"}


def test_two_stages_degrade_any_size():
    for seed, size in enumerate([(1, 9), (40, 33), (64, 64)]):
        params = draw(np.random.default_rng(seed), PRESETS["real-esrgan"])
        image = picture(*size)
        out = degradation.degrade(image, params)
        assert (
            out.shape == image.shape
            and out.dtype == np.uint8
            and np.array_equal(out, degradation.degrade(image, params))
        )


@pytest.mark.parametrize("factor", [0.3, 1 / 7.9, 1.0, 1.25, 1 / 400])
def test_linear_resize_is_opencvs_on_either_side(factor):
    import cv2

    a, b = both("resize", factor, "linear")
    side = [max(1, math.floor(n * factor)) for n in (72, 56)]
    exact = cv2.resize(picture().astype(np.float32), side[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(a, exact, atol=1e-3)
    np.testing.assert_allclose(b, exact, atol=0.05)


def test_published_settings_follow_the_published_steps(monkeypatch):
    """PMRF's create_degradation.py and GFPGAN's dataset, without noise: filter2D, resize, JPEG, resize."""
    import cv2

    monkeypatch.setattr(OnPillow, "noise", lambda self, x, *_: x)
    image = picture(96, 80)
    for preset in ("pmrf", "difface", "gfpgan"):
        for seed in range(5):
            drawn = draw(np.random.default_rng(seed), PRESETS[preset])
            drawn.pop("colours", None)
            x = np.arange(41) - 20.0
            u, v = np.meshgrid(x, x)
            c, s = np.cos(drawn["theta"]), np.sin(drawn["theta"])
            kernel = np.exp(
                -(((c * u + s * v) / drawn["sigma_x"]) ** 2 + ((c * v - s * u) / drawn["sigma_y"]) ** 2) / 2
            )
            y = cv2.filter2D(image[..., ::-1].astype(np.float32), -1, kernel / kernel.sum())
            small = int(80 // drawn["r"]), int(96 // drawn["r"])
            y = cv2.resize(y, small, interpolation=cv2.INTER_LINEAR)
            _, code = cv2.imencode(".jpg", y, [cv2.IMWRITE_JPEG_QUALITY, drawn["q"]])
            y = cv2.resize(cv2.imdecode(code, 1).astype(np.float32), (80, 96), interpolation=cv2.INTER_LINEAR)
            ours = degradation.degrade(image, drawn).astype(float)
            assert np.abs(ours - y[..., ::-1].round().clip(0, 255)).mean() < 0.1, (preset, seed)


@pytest.mark.parametrize("amount", [-0.1, 0.03, 0.1, 0.5, 1.0])
def test_hue_is_turned_as_in_hsv(amount):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.float32)
    rgb[0, 0], rgb[0, 1], rgb[0, 2] = (9, 9, 9), (0, 0, 0), (255, 255, 255)
    found = degradation_torch.colour(torch.from_numpy(rgb).permute(2, 0, 1), "hue", amount).permute(1, 2, 0)
    for place in np.ndindex(6, 7):
        h, s, v = colorsys.rgb_to_hsv(*(rgb[place] / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb((h + amount) % 1, s, v))
        np.testing.assert_allclose(found[place], expected, atol=0.01)


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0, 1.5])
def test_brightness_contrast_and_saturation_are_pillows(amount):
    from PIL import Image, ImageEnhance

    image = picture()
    x = torch.from_numpy(image).permute(2, 0, 1).float()
    for kind, enhance in (
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ):
        expected = np.asarray(enhance(Image.fromarray(image)).enhance(amount)).astype(float)
        found = degradation_torch.colour(x, kind, amount).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() < 2, kind
    shifted = degradation_torch.colour(x, "shift", [-300.0, 0.0, 10.0])
    assert shifted[0].max() == 0 and torch.equal(shifted[1], x[1]) and shifted.max() <= 255
    gray = degradation_torch.colour(x, "gray", None).permute(1, 2, 0).numpy()
    assert np.ptp(gray, axis=-1).max() == 0
    assert np.abs(gray[..., 0] - np.asarray(Image.fromarray(image).convert("L"))).max() <= 1


def test_colours_are_changed_as_often_as_asked_and_alike_on_either_side():
    drawn = [draw(np.random.default_rng(seed), PRESETS["gfpgan"]) for seed in range(600)]
    kinds = [[kind for kind, _ in d.get("colours", ())] for d in drawn]
    assert 0.25 < np.mean(["shift" in k for k in kinds]) < 0.35 and 0.25 < np.mean(["hue" in k for k in kinds]) < 0.35
    assert 0 < np.mean(["gray" in k for k in kinds]) < 0.03 and not any(d.get("gray_original") for d in drawn)
    assert all("colours" not in draw(np.random.default_rng(seed)) for seed in range(50))
    assert json.loads(json.dumps(drawn)) == drawn
    for change in (["gray", None], ["hue", 0.07], ["shift", [5.0, -9.0, 0.0]], ["contrast", 0.6]):
        a, b = both("colour", *change)
        np.testing.assert_allclose(a, b, atol=1e-3)
