"""group_norm_silu: GroupNorm and SiLU in two reads and one write, on every backend, forward and backward.

Values and gradients against float64, within twice the error of PyTorch's own composition plus one rounding.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Spy, arrange, far_apart, guarded_outputs, mutant, ops_run

from lpmrf_kernels import group_norm_silu, reference, registry, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape and groups.
CASES = {
    "vae": ((1, 64, 6, 7), 32),
    "prime": ((2, 21, 5, 3), 7),
    "a channel a group": ((2, 5, 4, 3), 5),
    "one group": ((2, 6, 3, 5), 1),
    "two elements": ((1, 2, 1, 1), 1),
    "one pixel": ((3, 24, 1, 1), 4),
    "column": ((1, 8, 9, 1), 2),
    "row": ((1, 3, 1, 900), 3),
    "wide": ((1, 600, 1, 3), 2),
    "no photo": ((0, 4, 8, 8), 2),
    "no pixel": ((2, 4, 0, 8), 2),
}
KERNELS = (
    "_moments_kernel",
    "_merge_moments_kernel",
    "_group_norm_silu_fwd_kernel",
    "_gradient_sums_kernel",
    "_merge_sums_kernel",
    "_group_norm_silu_bwd_kernel",
)


def make(shape, dtype=torch.float32, device="cpu", layout="contiguous", seed=0, offset=1.0):
    """x, weight, bias: means as far from zero as `offset`, random parameters in float32."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(size, generator=generator).to(device)
    C = shape[1]
    x = (randn(*shape) + offset * (2 * randn(1, C, 1, 1) + 1)).to(dtype)
    return arrange(x, layout), randn(C), randn(C)


def composition(x, groups, weight, bias, eps=1e-6, act="silu"):
    """What the op replaces, in x's dtype."""
    if weight is None:
        weight = x.new_ones(x.shape[1])  # PyTorch's backward has no bias without a weight
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if act == "silu" else y


def widened(tensors):
    return [None if t is None else t.double() for t in tensors]


def check_values(tensors, groups, assert_error_within, act="silu", eps=1e-6):
    x, weight, bias = tensors
    out = group_norm_silu(x, groups, weight, bias, eps, act)
    assert out.dtype == x.dtype and out.shape == x.shape and out.device == x.device
    assert out.stride() == torch.empty_like(x).stride()
    if x.numel():
        x64, w64, b64 = widened(tensors)
        exact = composition(x64, groups, w64, b64, eps, act)
        # One rounding of what goes into the activation, which may be much more than what comes out.
        floor = torch.finfo(x.dtype).eps * composition(x64, groups, w64, b64, eps, "none").abs().max().item()
        assert_error_within(out, exact, composition(x, groups, weight, bias, eps, act), 2.0, floor)


def gradients(function, tensors, groups, g, act, eps):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(leaves[0], groups, *leaves[1:], eps, act)
    return torch.autograd.grad(y, [t for t in leaves if t is not None], g.to(y.dtype))


def check_gradients(tensors, groups, assert_error_within, act="silu", g_layout="contiguous", eps=1e-6):
    x = tensors[0]
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
    g = arrange(g, g_layout)
    actual = gradients(group_norm_silu, tensors, groups, g, act, eps)
    assert actual[0].stride() == torch.empty_like(x).stride()
    exact = baseline = actual
    if x.numel():
        exact = gradients(composition, widened(tensors), groups, g, act, eps)
        baseline = gradients(composition, tensors, groups, g, act, eps)
        rstd = (x.double().reshape(x.shape[0], groups, -1).var(-1, correction=0) + eps).rsqrt()
        weight = 1.0 if tensors[1] is None else tensors[1].abs().max().item()
        terms = g.abs().max().item() * weight * rstd.max().item()
    for t, out, e, base in zip([t for t in tensors if t is not None], actual, exact, baseline, strict=True):
        assert out.dtype == t.dtype and out.shape == t.shape
        if x.numel():
            if t is x:
                # Of the terms that cancel in a group of a few values, where the baseline may be exact by luck.
                size = terms
            else:  # a parameter has few elements, where it may be as well: four roundings, or a term's
                size = max(4 * e.abs().max().item(), g.abs().max().item())
            floor = torch.finfo(out.dtype).eps * size
            assert_error_within(out, e, base, 2.0, floor)
        else:
            assert not out.any()


# ---- values and gradients


@pytest.mark.parametrize(("shape", "groups"), CASES.values(), ids=CASES.keys())
def test_shapes(place, shape, groups, assert_error_within, poisoned_memory):
    with place:
        for dtype, layout, act in ((torch.float32, "channels_last", "silu"), (torch.bfloat16, "contiguous", "none")):
            tensors = make(shape, dtype, place.device, layout)
            eps = 1e-2 if shape[-1] * shape[-2] * shape[1] == 2 else 1e-6  # two elements: their difference is eps's
            check_values(tensors, groups, assert_error_within, act, eps)
            check_gradients(tensors, groups, assert_error_within, act, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(place, dtype, layout, assert_error_within, poisoned_memory):
    with place:
        tensors = make((2, 40, 9, 15), dtype, place.device, layout)
        check_values(tensors, 8, assert_error_within)
        check_gradients(tensors, 8, assert_error_within, g_layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, assert_error_within, poisoned_memory):
    with place:
        # No offset: the rounding of a few large means is luck, PyTorch's and ours.
        tensors = make((2, 6, 5, 7), torch.float32, place.device, layout, offset=0.0)
        check_values(tensors, 3, assert_error_within)
        for g_layout in LAYOUTS:
            check_gradients(tensors, 3, assert_error_within, g_layout=g_layout)


@settings(max_examples=15, deadline=None)
@example(sizes=(1, 1, 1, 1), width=5, layout="sliced", act="silu", dtype=torch.float32, backend="cpp")
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 8, 5, 9))),
    width=st.integers(3, 9),
    layout=st.sampled_from(("contiguous", "sliced", "channels_last")),
    act=st.sampled_from(("silu", "none")),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(("triton", "cpp")),
)
def test_random_shapes(sizes, width, layout, act, dtype, backend, assert_error_within):
    if registry.unavailable(backend, "cpu"):
        backend = "torch"
    B, groups, size, height = sizes
    with use_backend(backend):
        # No offset, as above.
        tensors = make((B, groups * size, height, width), dtype, "cpu", layout, offset=0.0)
        # A group of a few near-equal values has an rstd that multiplies any rounding: eps bounds it.
        check_values(tensors, groups, assert_error_within, act, eps=1e-2)
        check_gradients(tensors, groups, assert_error_within, act, eps=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_programs_and_parts(place, layout, module_of, monkeypatch, assert_error_within):
    """Statistics of several chunks, of several tiles each, the last one cut."""
    module = module_of("group_norm_silu")
    monkeypatch.setattr(module, "_tile", lambda x, elements: {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 1})
    monkeypatch.setattr(module, "PROGRAMS", 6)
    shapes = [(1, 20, 13, 17)] if place.backend == "triton" else [(1, 20, 130, 170), (2, 4, 301, 303)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = make(shape, dtype, place.device, layout)
            with place:
                check_values(tensors, 4, assert_error_within)
                check_gradients(tensors, 4, assert_error_within)


def test_parameters_are_optional(place, assert_error_within):
    x, weight, bias = make((2, 12, 3, 4), device=place.device)
    with place:
        for w, b in ((None, None), (weight, None), (None, bias), (weight.half(), bias.bfloat16())):
            check_values((x, w, b), 3, assert_error_within)
            check_gradients((x, w, b), 3, assert_error_within)


def test_a_large_mean_keeps_its_digits(place, assert_error_within):
    x, weight, bias = make((1, 8, 9, 16), device=place.device)
    for layout in ("contiguous", "channels_last"):
        with place:
            check_values((arrange(x + 1e4, layout), weight, bias), 2, assert_error_within)


def test_large_values_of_the_activation(place):
    """SiLU's exponential at both of its ends."""
    weight, bias = torch.full((4,), 300.0, device=place.device), torch.zeros(4, device=place.device)
    x, _, _ = make((1, 4, 8, 8), device=place.device)
    with place:
        out = group_norm_silu(x, 2, weight, bias)
    torch.testing.assert_close(out, reference.group_norm_silu(x, 2, weight, bias), rtol=1e-4, atol=1e-3)


def test_not_finite_stays_in_its_group(place):
    x, weight, bias = make((2, 12, 3, 4), device=place.device)
    x[0, 4, 1, 2], x[1, 0, 0, 0] = torch.nan, torch.inf
    with place:
        wrong = ~group_norm_silu(x, 3, weight, bias).isfinite()
    assert wrong[0, 4:8].all() and wrong[1, 0, 0, 0]
    wrong[0, 4:8] = wrong[1, :4] = False
    assert not wrong.any()


def test_a_gradient_that_is_not_finite_stays_in_its_group(place):
    x, weight, bias = make((2, 12, 3, 4), device=place.device)
    for layout in ("contiguous", "channels_last"):
        g = arrange(torch.ones_like(x), layout).clone()
        g[0, 4, 1, 2] = torch.nan
        with place:
            dx, dweight, dbias = gradients(group_norm_silu, (arrange(x, layout), weight, bias), 3, g, "silu", 1e-6)
        wrong = ~dx.isfinite()
        assert wrong[0, 4:8].all()
        wrong[0, 4:8] = False
        assert not wrong.any()
        for d in (dweight, dbias):
            assert d[4].isnan() and d[:4].isfinite().all() and d[5:].isfinite().all()


def test_an_outlier_in_front_costs_no_digits(place, assert_error_within):
    """C++ and Triton take differences to a first pixel: it may be the one that is far from all others."""
    x, weight, bias = make((1, 8, 70, 90), device=place.device)
    x[:, :, 0, 0] = 1e4
    for layout in ("contiguous", "channels_last"):
        with place:
            check_values((arrange(x, layout), weight, bias), 2, assert_error_within)


def test_writes_its_outputs_only(place, monkeypatch, assert_error_within):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "channels_last"):
        tensors = make((1, 13, 9, 11), torch.bfloat16, place.device, layout)
        with place, guarded_outputs(monkeypatch):
            check_values(tensors, 1, assert_error_within)
            check_gradients(tensors, 1, assert_error_within)


def test_two_runs_give_the_same_bits(place):
    tensors = make((2, 24, 9, 9), torch.bfloat16, place.device)
    g = torch.ones_like(tensors[0])
    with place:
        assert torch.equal(*(group_norm_silu(tensors[0], 4, *tensors[1:]) for _ in range(2)))
        runs = [gradients(group_norm_silu, tensors, 4, g, "silu", 1e-6) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_addresses_past_2_to_the_31(place):
    x = far_apart(place.device)
    x[0], x[1] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    with place:
        y = group_norm_silu(x, 1, None, None)
        torch.testing.assert_close(y, reference.group_norm_silu(x.contiguous(), 1, None, None))


# ---- what the kernels do not take


def test_float64_is_the_references():
    x, weight, bias = widened(make((2, 6, 3, 4)))
    before = sum(registry.fallbacks().values())
    assert torch.equal(group_norm_silu(x, 3, weight, bias), reference.group_norm_silu(x, 3, weight, bias))
    assert sum(registry.fallbacks().values()) == before + 1
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for act in ("silu", "none"):
        assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, 3, w, b, 1e-6, act), leaves)  # noqa: B023


# ---- as a torch op


def test_opcheck(place):
    op = torch.ops.lpmrf.group_norm_silu.default
    with place:
        x, weight, bias = make((2, 6, 3, 4), torch.float16, place.device, "channels_last")
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(op, (leaves[0], 3, *leaves[1:], 1e-6, "silu"))
        torch.library.opcheck(op, (x.detach(), 3, None, None, 1e-6, "none"))


def test_compiles_and_exports(place):
    def block(x, weight, bias):
        return group_norm_silu(x * 2, 2, weight, bias) + 1

    leaves = [t.requires_grad_() for t in make((2, 6, 4, 5), device=place.device, layout="channels_last")]
    torch._dynamo.reset()  # what was compiled for another place keeps that place's backward
    with place:
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        out, expected = compiled(*leaves), block(*leaves)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, expected)), strict=True):
            assert torch.equal(a, b)

    class Block(torch.nn.Module):
        def forward(self, x):
            return block(x, None, None)

    program = torch.export.export(Block(), (leaves[0].detach(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "lpmrf.group_norm_silu" in str(program.graph)
    x = torch.randn(5, 6, 4, 5, device=place.device)
    with place:
        assert torch.equal(program.module()(x), block(x, None, None))


def test_autocast_leaves_the_dtype_alone(place, assert_error_within):
    tensors = make((2, 6, 3, 4), torch.float32, place.device)
    with place, torch.autocast(place.device, dtype=torch.bfloat16):
        check_values(tensors, 3, assert_error_within)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(2, 128, 512, 512), (1, 512, 64, 64), (3, 320, 24, 40)], ids=str)
def test_real_shapes_on_cuda(shape, assert_error_within):
    for layout in ("contiguous", "channels_last"):
        tensors = make(shape, torch.bfloat16, "cuda", layout)
        with use_backend("triton"):
            check_values(tensors, 32, assert_error_within)
            check_gradients(tensors, 32, assert_error_within)


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("group_norm_silu")
    spies = [Spy(getattr(module, name)) for name in KERNELS]
    for name, spy in zip(KERNELS, spies, strict=True):
        monkeypatch.setattr(module, name, spy)
    x, weight, bias = make((1, 6, 3, 4))
    with interpreted:
        y = group_norm_silu(x.requires_grad_(), 2, weight, bias)
    assert [spy.launches for spy in spies] == [1, 1, 1, 0, 0, 0]
    y.sum().backward()  # the backend of the forward, although nothing forces it here
    assert [spy.launches for spy in spies] == [1] * 6


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    x, weight, bias = make((1, 6, 3, 4))
    x.requires_grad_()
    ran = ops_run(lambda: group_norm_silu(x, 2, weight, bias).sum().backward())
    assert {"lpmrf_cpp::group_norm_silu", "lpmrf_cpp::group_norm_silu_backward"} <= set(ran)
    assert "aten::native_group_norm" not in ran


WRONG = [
    ("_moments_kernel", "d * (1.0 / (i + 1))", "d * (1.0 / (i + 2))"),
    ("_moments_kernel", "m2 + d * d * count[:, None]", "m2 + 0.0 * d"),
    ("_moments_kernel", "count += mask_p.to(tl.float32)", "count += 1.0"),
    ("_merge_moments_kernel", "m2 + d * d * n[:, None]", "m2"),
    ("_group_norm_silu_fwd_kernel", "c // (channels // groups)", "c % groups"),
    ("_group_norm_silu_fwd_kernel", "tl.exp(-y)", "tl.exp(-x)"),
    ("_gradient_sums_kernel", "dweight += g * x_hat", "dweight += g * x"),
    ("_merge_sums_kernel", "group_gx += photo_dweight * weight", "group_gx += photo_dweight"),
    ("_group_norm_silu_bwd_kernel", "- group_g[None, :]", "- 0.0 * group_g[None, :]"),
    ("_group_norm_silu_bwd_kernel", "x_hat, weight, bias, SILU", "x_hat, weight, 0.0 * bias, SILU"),
]


def test_a_wrong_kernel_fails(interpreted, module_of, monkeypatch, tmp_path, assert_error_within):
    module = module_of("group_norm_silu")
    monkeypatch.setattr(module, "_tile", lambda x, elements: {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 1})
    monkeypatch.setattr(module, "PROGRAMS", 4)
    tensors = make((2, 12, 9, 11), layout="channels_last")

    def check_all():
        check_values(tensors, 3, assert_error_within)
        check_gradients(tensors, 3, assert_error_within)

    with interpreted:
        for name, old, new in WRONG:
            right = getattr(module, name)
            with monkeypatch.context() as patch:
                patch.setattr(module, name, mutant(right, old, new, tmp_path))
                with pytest.raises(AssertionError):
                    check_all()
        patched = mutant(right, "dx_ptr + offs_d", "dx_ptr + offs_d", tmp_path)  # what failed was the change
        monkeypatch.setattr(module, name, patched)
        check_all()


# ---- errors

X = torch.zeros(2, 6, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: group_norm_silu(X[0], 2, None, None), ValueError, r"x must be \(B, C, H, W\)"),
        (lambda: group_norm_silu(X.int(), 2, None, None), TypeError, "float dtype, got torch.int32"),
        (lambda: group_norm_silu(X, 4, None, None), ValueError, "divisor of the 6 channels, got 4"),
        (lambda: group_norm_silu(X, 0, None, None), ValueError, "divisor of the 6 channels, got 0"),
        (lambda: group_norm_silu(X, 2.0, None, None), ValueError, "divisor of the 6 channels, got 2.0"),
        (lambda: group_norm_silu(X, 2, torch.ones(5), None), ValueError, r"weight must be \(6,\), got \(5,\)"),
        (lambda: group_norm_silu(X, 2, None, torch.ones(6, device="meta")), ValueError, "one device"),
        (lambda: group_norm_silu(X, 2, None, None, torch.nan), ValueError, "eps must be finite"),
        (lambda: group_norm_silu(X, 2, None, None, act="gelu"), ValueError, 'must be "silu" or "none", got \'gelu\''),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()
