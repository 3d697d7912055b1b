"""The degradations on tensors against those of OpenCV and Pillow: the same picture but for rounding, and the noise."""

import json

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
