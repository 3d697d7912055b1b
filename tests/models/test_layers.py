"""Layers that are computed in more than one way."""

import shutil

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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (0, 3, 4, 4), (2, 8, 1, 7)], ids=str)
def test_nearest_2x_is_interpolate_in_the_compiler_too(shape, memory_format, monkeypatch):
    x = randn(*shape).contiguous(memory_format=memory_format)
    expected = F.interpolate(x, scale_factor=2.0, mode="nearest") if x.numel() else torch.empty(0, 3, 8, 8)
    if x.numel():
        assert torch.equal(layers.nearest_2x(x), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out = layers.nearest_2x(x)
    assert torch.equal(out, expected) and out.shape == expected.shape


class Around(nn.Module):
    """Nearest 2x between convolutions, whose input the compiler of torch 2.13 gives no gradient (F.interpolate)."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.after(layers.nearest_2x(self.before(x))))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_gradients_go_through_nearest_2x():
    torch.manual_seed(0)
    network, x = Around(), randn(2, 3, 16, 16)
    gradients = []
    for forward in (network, torch.compile(network)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(x).float().square().mean()
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    for theirs, ours in zip(*gradients):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("rows", [64, 16384])
def test_layer_norms_gradients_keep_their_sums_in_bfloat16(rows):
    """PyTorch's own has half of the bias's gradient at 16384 rows on CPUs."""
    ours, exact = layers.LayerNorm(24), nn.LayerNorm(24).double()
    exact.load_state_dict(ours.state_dict())
    x, dy = randn(1, rows // 8, 8, 24, dtype=torch.bfloat16), 0.1 * randn(1, rows // 8, 8, 24, seed=1) + 0.02
    x.requires_grad_()
    y = ours(x)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    y.backward(dy.bfloat16())
    exact_x = x.detach().double().requires_grad_()
    exact(exact_x).backward(dy.bfloat16().double())
    for mine, theirs in zip(ours.parameters(), exact.parameters()):
        assert (mine.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm()
    assert (x.grad.double() - exact_x.grad).norm() < 1e-2 * exact_x.grad.norm()
