"""The degradation of blind face restoration: what it must be deterministic in, and what each part of it does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cv2")
from lpmrf_fast.training.degradation import PRESETS, Ranges, degrade, draw, gaussian_kernel

NOTHING = dict(kernel="iso", sigma_x=0.05, sigma_y=0.05, theta=0.0, r=1.0, delta=0.0, q=100, noise_seed=0)
NOTHING |= dict(down="bicubic", up="bicubic")


def smooth_image(height=64, width=96):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 / height, x * 255 / width, (y + x) * 255 / (height + width)], -1).astype(np.uint8)


def noise_image(height=64, width=96, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    preset=st.sampled_from([name for name, r in PRESETS.items() if isinstance(r, Ranges)]),
)
def test_draw_stays_in_its_ranges_and_repeats(seed, preset):
    ranges = PRESETS[preset]
    params = draw(np.random.default_rng(seed), ranges)
    assert params == draw(np.random.default_rng(seed), ranges)
    for key, pair in (
        ("sigma_x", ranges.sigma),
        ("sigma_y", ranges.sigma),
        ("r", ranges.r),
        ("delta", ranges.delta),
        ("q", ranges.q),
    ):
        assert pair[0] <= params[key] <= pair[1]
    assert (params["kernel"] == "iso") == (params["sigma_x"] == params["sigma_y"] and params["theta"] == 0)


def test_draw_reaches_both_ends_of_every_choice():
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(400)]
    assert {p["kernel"] for p in drawn} == {"iso", "aniso"}
    assert {p["down"] for p in drawn} == {p["up"] for p in drawn} == {"bicubic", "bilinear"}
    assert min(p["q"] for p in drawn) < 35 and max(p["q"] for p in drawn) > 95
    assert min(p["r"] for p in drawn) < 3 and max(p["r"] for p in drawn) > 30


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), height=st.sampled_from([1, 7, 33, 64]), width=st.sampled_from([1, 9, 40, 97]))
def test_degrade_keeps_shape_and_is_a_function_of_its_arguments(seed, height, width):
    image = noise_image(height, width)
    before = image.copy()
    params = draw(np.random.default_rng(seed))
    out = degrade(image, params)
    assert out.shape == image.shape and out.dtype == np.uint8
    assert np.array_equal(image, before)
    assert np.array_equal(out, degrade(image, params))


def test_without_degradation_only_jpeg_rounding_remains():
    image = smooth_image()
    error = np.abs(degrade(image, NOTHING).astype(int) - image)
    assert error.mean() < 1 and error.max() <= 6


def test_channels_are_not_swapped():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 200
    mean = degrade(image, NOTHING | {"delta": 5.0}).reshape(-1, 3).mean(0)
    assert mean[0] > 180 and mean[2] < 20


def test_noise_has_the_standard_deviation_asked_for():
    gray = np.full((256, 256, 3), 128, np.uint8)
    noisy = degrade(gray, NOTHING | {"delta": 20.0})
    # JPEG halves the resolution of the chroma; luminance keeps the mean of the three channels' noise.
    luminance = noisy.astype(float) @ [0.299, 0.587, 0.114]
    assert luminance.std() == pytest.approx(20 * np.linalg.norm([0.299, 0.587, 0.114]), rel=0.1)
    assert not np.array_equal(noisy, degrade(gray, NOTHING | {"delta": 20.0, "noise_seed": 1}))


def test_blur_and_reduction_remove_detail():
    image = noise_image(128, 128)
    kept = [degrade(image, NOTHING | change).std() for change in ({}, {"sigma_x": 3.0, "sigma_y": 3.0}, {"r": 8.0})]
    assert kept[1] < 0.2 * kept[0] and kept[2] < 0.4 * kept[0]


def test_kernel_is_normalised_and_turned():
    kernel = gaussian_kernel(41, 8.0, 2.0, np.pi / 2)
    assert kernel.shape == (41, 41) and kernel.sum() == pytest.approx(1, abs=1e-5)
    x, y = kernel.sum(0), kernel.sum(1)
    axis = np.arange(41) - 20
    assert (x * axis**2).sum() == pytest.approx(4, rel=0.02)  # sigma_y lies along x after a quarter turn
    assert (y * axis**2).sum() > 40


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_other_images_are_refused(bad):
    with pytest.raises(ValueError, match="RGB image"):
        degrade(bad, NOTHING)


def test_own_ranges():
    assert draw(np.random.default_rng(0), Ranges(r=(4.0, 4.0), q=(50, 50)))["q"] == 50
