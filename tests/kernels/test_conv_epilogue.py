"""bias_silu and bias_residual: what follows a convolution that ran without its bias, any layout."""

import pytest
import torch
from kernel_cases import LAYOUTS, Spy, far_apart, guarded_outputs, mutant, ops_run
from op_cases import assert_as_good_as_pytorch, assert_compiles, assert_exports_with_a_dynamic_batch, randn

from lpmrf_kernels import bias_residual, bias_silu, reference, registry

SHAPES = {
    "latent": (2, 32, 5, 6),
    "one": (1, 1, 1, 1),
    "prime": (3, 7, 3, 11),
    "past one tile": (1, 150, 23, 20),
    "no photo": (0, 4, 8, 8),
}
# x and bias; the last is what autocast leaves
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
OPS = {"bias_silu": (bias_silu, reference.bias_silu), "bias_residual": (bias_residual, reference.bias_residual)}
every_op = pytest.mark.parametrize("name", OPS)


def make(name, shape, dtypes="fp32", device="cpu", layout="contiguous", residual_layout=None):
    dtype, parameters = DTYPES[dtypes]
    tensors = [
        randn(*shape, dtype=dtype, device=device, layout=layout),
        randn(shape[1], dtype=parameters, device=device, seed=1),
        randn(*shape, dtype=dtype, device=device, layout=residual_layout or layout, seed=2),
    ]
    return tensors[:2] if name == "bias_silu" else tensors


def check(name, tensors, backward=True):
    (out,), (dx, *_) = assert_as_good_as_pytorch(*OPS[name], tensors, backward)
    assert out.stride() == torch.empty_like(tensors[0]).stride()


@every_op
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(place, name, shape, layout, poisoned_memory):
    with place:
        check(name, make(name, shape, device=place.device, layout=layout))


@every_op
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(place, name, dtypes, poisoned_memory):
    if place.backend == "cpp" and dtypes == "fp16":
        pytest.skip("the reference's")
    # The interpreter truncates to bfloat16, which the sums of the backward add up.
    backward = not (place.device == "cpu" and place.backend == "triton" and dtypes in ("bf16", "mixed"))
    with place:
        check(name, make(name, (2, 18, 5, 4), dtypes, place.device, "channels_last"), backward)


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, name, layout, poisoned_memory):
    with place:
        check(name, make(name, (2, 6, 4, 5), "fp32", place.device, layout, "channels_last"))
        check(name, make(name, (2, 6, 4, 5), "fp32", place.device, "channels_last", layout))


@every_op
def test_writes_its_output_only(place, name, monkeypatch):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "channels_last"):
        with place, guarded_outputs(monkeypatch):
            check(name, make(name, (1, 19, 7, 9), device=place.device, layout=layout))


@every_op
def test_not_finite_stays_where_it_is(place, name):
    tensors = make(name, (2, 3, 4, 5), device=place.device)
    tensors[0].data[0, 1, 2, 3] = torch.nan
    with place:
        out = OPS[name][0](*tensors)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, 1, 2, 3] = True
    assert torch.equal(out.isnan(), wrong)


def test_silu_of_large_values(place):
    x = torch.tensor([-1e4, -200, -90, -20, 20, 90, 1e4], device=place.device)[None, None, None]
    with place:
        out = bias_silu(x, torch.zeros(1, device=place.device))
    torch.testing.assert_close(out, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-33)


def test_two_runs_give_the_same_bits(place):
    def once():
        tensors = make("bias_silu", (2, 34, 19, 9), device=place.device, layout="channels_last")
        return torch.autograd.grad(bias_silu(*tensors).sum(), tensors)

    with place:
        assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@every_op
def test_float64_is_the_references(name):
    tensors = [t.detach().double().requires_grad_() for t in make(name, (1, 3, 2, 2))]
    before = sum(registry.fallbacks().values())
    assert torch.equal(OPS[name][0](*tensors), OPS[name][1](*tensors))
    assert sum(registry.fallbacks().values()) == before + 1
    assert torch.autograd.gradcheck(OPS[name][0], tensors)


def test_addresses_past_2_to_the_31(place):
    x = far_apart(place.device)
    x[0], x[1] = 1, 2
    zero = torch.zeros(1, device=place.device)
    with place:
        assert torch.equal(bias_residual(x, zero, x), 2 * x)


# ---- as torch ops


@every_op
def test_opcheck(place, name):
    with place:
        for layout in ("channels_last", "contiguous"):
            tensors = make(name, (2, 6, 3, 4), "fp32", place.device, layout)
            torch.library.opcheck(getattr(torch.ops.lpmrf, name).default, tensors)


@every_op
def test_compiles_and_exports(place, name):
    with place:
        tensors = make(name, (2, 6, 3, 4), "fp32", place.device, "channels_last")
        assert_compiles(OPS[name][0], tensors)
    if name == "bias_silu":
        assert_exports_with_a_dynamic_batch(bias_silu, *(t.detach() for t in tensors))


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("conv_epilogue")
    spies = {name: Spy(getattr(module, name)) for name in ("_conv_epilogue_fwd_kernel", "_bias_silu_bwd_kernel")}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name, spy)
    x, bias, residual = make("bias_residual", (1, 4, 2, 2))
    with interpreted:
        out = bias_silu(bias_residual(x, bias, residual), bias)
    out.sum().backward()  # outside of the block: on the backend of the forward
    assert [spy.launches for spy in spies.values()] == [2, 1]


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    x, bias, residual = make("bias_residual", (1, 4, 2, 2))
    names = {"bias_silu", "bias_silu_backward", "bias_residual"}
    ran = ops_run(lambda: bias_silu(bias_residual(x, bias, residual), bias).sum().backward())
    assert {f"lpmrf_cpp::{name}" for name in names} <= ran


WRONG = {
    "residual for bias": ("_conv_epilogue_fwd_kernel", "out = h + tl.load", "out = h - bias + tl.load"),
    "the next channel's bias": ("_conv_epilogue_fwd_kernel", "tl.load(bias_ptr + c,", "tl.load(bias_ptr + c // 2,"),
    "no product rule": ("_bias_silu_bwd_kernel", "g * (s + h * s * (1.0 - s))", "g * s"),
    "the last block left out": ("_bias_silu_bwd_kernel", "range(BLOCKS)", "range(BLOCKS - 1)"),
}


@pytest.mark.parametrize(("kernel", "old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(
    interpreted, module_of, monkeypatch, tmp_path, kernel, old, new, poisoned_memory
):
    module = module_of("conv_epilogue")
    name = "bias_residual" if kernel.startswith("_conv") else "bias_silu"
    tensors = make(name, (1, 4, 64, 64), layout="contiguous")
    right = getattr(module, kernel)
    with interpreted:
        monkeypatch.setattr(module, kernel, mutant(right, old, old, tmp_path))  # so that what fails is the change
        check(name, tensors)
        monkeypatch.setattr(module, kernel, mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            check(name, tensors)


# ---- errors

X, BIAS = torch.zeros(1, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X.long(), BIAS, X), TypeError, "x must have a float dtype, got torch.int64"),
        ((X[0], BIAS, X), ValueError, r"x must be \(B, C, H, W\), got the shape \(4, 3, 3\)"),
        ((X, BIAS[:3], X), ValueError, r"bias must have the shape \(4,\) here, got \(3,\)"),
        ((X, BIAS, X[:, :1]), ValueError, r"residual must have the shape \(1, 4, 3, 3\)"),
        ((X, BIAS, X.half()), TypeError, "residual must have x's dtype, torch.float32, got torch.float16"),
        ((X, BIAS.to("meta"), X), ValueError, "bias must be on the device of x"),
        ((X, None, X), TypeError, "bias must be a tensor of a float dtype, got None"),
        ((X, BIAS, None), TypeError, "residual must be a tensor of a float dtype, got None"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        bias_residual(*arguments)
    if "residual" not in words:
        with pytest.raises(error, match=words):
            bias_silu(*arguments[:2])
