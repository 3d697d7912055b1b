"""Scores of tensors: known values, independent implementations, and the order in which pictures must come."""

import math

import pytest
import torch
import torch.nn.functional as F

from lpmrf_fast.evaluation.metrics import laplacian_pyramid, mmd, psnr, sliced_wasserstein, ssim
from lpmrf_fast.evaluation.scores import InceptionDistances


def pictures(n=6, size=64, seed=0):
    """Random pictures with energy at every scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, size, size)
    for cells in (4, 16, size):
        x += F.interpolate(torch.rand(n, 3, cells, cells, generator=generator), size=(size, size), mode="bilinear")
    return x / 3


def test_psnr_of_a_known_error():
    x = pictures()
    assert torch.allclose(psnr(x + 0.1, x), torch.full((6,), 20.0, dtype=torch.float64), atol=1e-5)
    assert torch.isinf(psnr(x, x)).all()


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 1, 33, 47), (2, 3, 16, 16)])
def test_bands_add_up_to_the_picture(shape):
    x = torch.rand(shape)
    bands = laplacian_pyramid(x, 1)
    assert len(bands) == 1 and torch.equal(bands[0], x)
    fine, coarse = laplacian_pyramid(x, 2)
    assert fine.shape == x.shape and coarse.shape[-1] == (shape[-1] + 1) // 2
    assert fine.mean().abs() < 0.02  # a band has no mean of its own


def test_distance_of_a_set_to_itself_is_zero_and_levels_are_halved_to_16():
    x = pictures()
    assert sliced_wasserstein(x, x) == {64: 0.0, 32: 0.0, 16: 0.0}


def test_the_same_numbers_every_time_and_symmetric_in_the_order_of_pictures():
    a, b = pictures(), pictures(seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)


def test_blur_is_far_on_the_fine_level_and_near_on_the_coarse():
    x = pictures()
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    distance = sliced_wasserstein(blurred, x)
    # Another sample of the same pictures' distribution is what "alike" means.
    alike = sliced_wasserstein(pictures(seed=1), x)
    assert distance[64] > 5 * alike[64] and distance[64] > 2 * distance[16]


def test_noise_is_far_as_well():
    x = pictures()
    assert sliced_wasserstein(x + 0.2 * torch.randn_like(x), x)[64] > 100


def test_sets_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        sliced_wasserstein(pictures(n=2), pictures(n=3))


# ---- against independent implementations


def test_psnr_and_ssim_are_scikit_images():
    skimage = pytest.importorskip("skimage.metrics")
    x = pictures(3, 40)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for i, (p, s) in enumerate(zip(psnr(y, x), ssim(y, x))):
        a, b = (t[i].double().numpy() for t in (x, y))
        assert float(p) == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=1), abs=1e-6)
        options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
        assert float(s) == pytest.approx(skimage.structural_similarity(a, b, **options), abs=1e-5)


def test_fid_of_known_covariances():
    pytest.importorskip("torchmetrics")
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(6.0, dtype=torch.float64)
    assert InceptionDistances.distances(x + shift, x)["FID"] == pytest.approx(float(shift.square().sum()), abs=1e-6)
    # N(m, C) and N(2m, 4C): |m|² + tr(C + 4C - 2·2C).
    expected = x.mean(0).square().sum() + x.var(0).sum()
    assert InceptionDistances.distances(2 * x, x)["FID"] == pytest.approx(float(expected), rel=1e-6)


def test_kid_is_the_unbiased_cubic_mmd():
    pytest.importorskip("torchmetrics")
    x, y = (torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def k(a, b):
        return ((a @ b.T) / 5 + 1) ** 3

    inner = sum((k(z, z).sum() - k(z, z).trace()) / (12 * 11) for z in (x, y))
    expected = float(inner - 2 * k(x, y).mean())
    assert InceptionDistances.distances(x, y)["KID x1000"] == pytest.approx(1000 * expected, rel=1e-5)


def test_mmd_by_hand():
    a, b = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def k(x, y):
        x, y = x / x.norm(), y / y.norm()
        return math.exp(-float((x - y) @ (x - y)) / (2 * 0.5**2))

    def mean(x, y):
        return sum(k(u, v) for u in x for v in y) / (len(x) * len(y))

    assert mmd(a, b, sigma=0.5) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert mmd(a, a) == 0
