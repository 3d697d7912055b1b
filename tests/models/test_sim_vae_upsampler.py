"""Sim-VAE's upsampler: one transposed convolution at inference, whose folded weight follows the convolution's."""

import copy

import pytest
import torch

from lpmrf_fast.models.sim_vae import Upsampler


@pytest.fixture
def upsampler():
    torch.manual_seed(0)
    return Upsampler(4, 6, "interpolate").double().eval()


X = torch.randn(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same(upsampler, x=X):
    """Inference gives what training gives."""
    expected = upsampler(x)
    with torch.no_grad():
        assert torch.allclose(upsampler(x), expected, rtol=0, atol=1e-12 if x.dtype == torch.float64 else 1e-5)


def test_inference_is_training(upsampler):
    assert_same(upsampler)
    assert list(upsampler.state_dict()) == ["conv.weight", "conv.bias"]


def test_the_folded_weight_is_made_once(upsampler):
    with torch.no_grad():
        upsampler(X)
        assert upsampler.folded() is upsampler.folded()


@pytest.mark.parametrize("change", ["step", "load", "replace", "assign", "dtype", "copy"])
def test_a_changed_weight_is_folded_again(upsampler, change):
    assert_same(upsampler)
    x, weight = X, upsampler.conv.weight
    if change == "step":
        upsampler(x).sum().backward()
        torch.optim.SGD(upsampler.parameters(), 0.1).step()
    elif change == "load":
        upsampler.load_state_dict({name: 2 * p for name, p in upsampler.state_dict().items()})
    elif change == "replace":
        upsampler.conv.weight = torch.nn.Parameter(2 * weight.detach())
    elif change == "assign":
        weight.data = 2 * weight.data
    elif change == "dtype":
        upsampler, x = upsampler.float(), X.float()
    elif change == "copy":
        upsampler = copy.deepcopy(upsampler)
        with torch.no_grad():
            upsampler.conv.weight.mul_(2)
    assert_same(upsampler, x)


def test_compiled_and_in_inference_mode(upsampler):
    expected = upsampler(X).detach()
    with torch.no_grad():
        compiled = torch.compile(upsampler, fullgraph=True, backend="aot_eager")(X)
    with torch.inference_mode():
        out = upsampler(X)
        copied = copy.deepcopy(upsampler)(X)
    for result in (compiled, out, copied):
        assert torch.allclose(result, expected, rtol=0, atol=1e-12)
