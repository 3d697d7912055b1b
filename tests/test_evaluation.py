"""PSNR and the sliced Wasserstein distance: known values, and the order in which pictures must come."""

import pytest
import torch
import torch.nn.functional as F

from lpmrf_fast.evaluation import laplacian_pyramid, psnr, sliced_wasserstein


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
