"""Layers that are computed in more than one way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpmrf_fast.models import layers
from lpmrf_fast.models.layers import Linear, linear, pointwise

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float64: 1e-12}
"""Of values of about one: sums of 24 products, rounded once."""


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_linear_with_and_without_gradients(dtype, gelu, with_bias, grad):
    weight, bias = randn(13, 24, dtype=dtype, seed=1) / 5, randn(13, dtype=dtype, seed=2) if with_bias else None
    inputs = {shape: randn(*shape, dtype=dtype) for shape in ((2, 5, 7, 24), (1, 1, 24), (24,), (0, 24), (3, 0, 24))}
    inputs["permuted"] = randn(2, 24, 5, 7, dtype=dtype).permute(0, 2, 3, 1)
    inputs["every second"] = randn(6, 48, dtype=dtype)[::2, ::2]
    for x in inputs.values():
        with torch.set_grad_enabled(grad):
            y = linear(x, weight, bias, gelu)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        exact = F.gelu(exact) if gelu else exact
        assert y.dtype == dtype and y.shape == exact.shape
        torch.testing.assert_close(y.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_linear_that_needs_no_gradient_is_onednns_where_it_has_one(monkeypatch):
    x, weight = randn(3, 24), randn(13, 24)
    called = []
    monkeypatch.setattr(F, "linear", lambda *a: called.append(a) or torch.zeros(()))
    for use, arguments in (
        (not torch.backends.mkldnn.is_available(), (x, weight)),
        (True, (x.double(), weight.double())),
        (True, (x, weight.bfloat16())),
    ):
        called.clear()
        with torch.no_grad():
            linear(*arguments)
        assert bool(called) == use
    called.clear()
    linear(x, weight.requires_grad_())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear(x, weight)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layers._onednn_dtypes.cache_clear()
    with torch.no_grad():
        linear(x, weight)
    layers._onednn_dtypes.cache_clear()
    assert len(called) == 3


def test_nan_stays():
    with torch.no_grad():
        y = linear(torch.tensor([[torch.nan, 1.0], [2.0, 1.0]]), torch.ones(3, 2))
    assert y[0].isnan().all() and (y[1] == 3).all()


def test_shapes_that_do_not_fit_are_refused():
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.ones(2, 5), torch.ones(3, 4))


def test_linear_layer_and_pointwise_convolution():
    layer, conv, x = Linear(24, 13), nn.Conv2d(24, 13, 1), randn(2, 24, 5, 7)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x.movedim(1, -1)), F.linear(x.movedim(1, -1), layer.weight, layer.bias))
            y = pointwise(conv, x)
            torch.testing.assert_close(y, conv(x), atol=1e-5, rtol=1e-5)
            assert y.is_contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    pointwise(conv, x).sum().backward()
    assert x.grad is not None and conv.weight.grad is not None
