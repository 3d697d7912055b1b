"""upsample_conv: nearest 2x and a 3x3 convolution as one transposed convolution, values and gradients."""

import pytest
import torch
from kernel_cases import LAYOUTS, arrange

from lpmrf_kernels import backends, fold_upsample_weight, reference, upsample_conv

SHAPES = {
    "level": (2, 16, 8, 6, 8),
    "one pixel": (1, 3, 1, 1, 5),
    "prime": (1, 7, 5, 3, 11),
    "no photo": (0, 4, 4, 4, 4),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(shape, dtype=torch.float64, layout="contiguous"):
    B, C, H, W, out_channels = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(s, generator=generator) for s in ((B, C, H, W), (out_channels, C, 3, 3), out_channels)
    )
    return arrange(x.to(dtype), layout), (weight / (9 * C) ** 0.5).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_exact(shape):
    x, weight, bias = make(shape)
    out, expected = upsample_conv(x, weight, bias), reference.upsample_conv(x, weight, bias)
    assert out.shape == expected.shape and torch.allclose(out, expected, rtol=0, atol=1e-13)
    assert torch.equal(out, upsample_conv(x, weight, bias, fold_upsample_weight(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision(dtype, assert_error_within):
    x, weight, bias = make((2, 32, 8, 8, 24), dtype)
    exact = reference.upsample_conv(x.double(), weight.double(), bias.double())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    assert_error_within(upsample_conv(x, weight, bias), exact, reference.upsample_conv(x, weight, bias), floor=rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, weight, bias = make((2, 3, 5, 7, 4), layout=layout)
    assert torch.allclose(upsample_conv(x, weight, bias), reference.upsample_conv(x, weight, bias), rtol=0, atol=1e-13)


def test_channels_last_stays():
    x, weight, bias = make((2, 8, 4, 4, 8), torch.float32, "channels_last")
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert fold_upsample_weight(weight).is_contiguous(memory_format=torch.channels_last)
    assert upsample_conv(x, weight, bias).is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_the_references():
    inputs = [t.requires_grad_() for t in make((2, 3, 4, 5, 4))]
    ours, theirs = upsample_conv(*inputs), reference.upsample_conv(*inputs)
    g = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(upsample_conv, [t.detach()[:1, :2, :2, :2].requires_grad_() for t in inputs[:1]]
                                    + [torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)])  # fmt: skip


def test_autocast():
    x, weight, bias = make((1, 8, 4, 4, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert upsample_conv(x, weight, bias).dtype == torch.bfloat16


def test_compiles_and_exports():
    class Up(torch.nn.Module):
        def forward(self, x, weight, bias):
            return upsample_conv(x, weight, bias)

    inputs = make((2, 3, 4, 4, 4))
    expected = Up()(*inputs)
    assert torch.equal(torch.compile(Up(), fullgraph=True, backend="aot_eager")(*inputs), expected)
    batch = ({0: torch.export.Dim("batch")}, None, None)
    program = torch.export.export(Up(), inputs, dynamic_shapes=batch)
    assert program.module()(inputs[0].repeat(3, 1, 1, 1), *inputs[1:]).shape == (6, 4, 8, 8)


def test_the_report_says_who_computes_it():
    (row, _) = (row for row in backends("cuda") if row.op == "upsample_conv")
    assert row.backend == "torch" and "transposed convolution" in row.why_not["triton"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3, 4, 4), torch.zeros(2, 3, 3, 3)), r"expected x \(B, C, H, W\)"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 4, 3, 3)), r"got \(1, 3, 4, 4\) and \(2, 4, 3, 3\)"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 5, 5)), "weight"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3), None, torch.zeros(2, 3, 4, 4)), "fold_upsample_weight"),
    ],
)
def test_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        upsample_conv(*arguments)
