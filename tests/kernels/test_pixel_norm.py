"""layer_norm_2d, rms_norm_2d, ada_rms_norm_2d: per-pixel channel norms, optionally of a sum, on every backend.

Values and gradients against float64, within twice the error of the reference at the same dtype plus one rounding.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Spy, arrange, far_apart, guarded_outputs, mutant, ops_run

import lpmrf_kernels as ops
from lpmrf_kernels import pixel_norm, reference, registry, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The networks' layers; then channels that fill no tile, one of everything, more pixels than a tile, more channels.
SHAPES = {
    "channels 128": (1, 128, 6, 7),
    "prime": (2, 13, 5, 3),
    "one": (1, 1, 1, 1),
    "one channel": (2, 1, 3, 2),
    "one pixel": (3, 24, 1, 1),
    "column": (1, 40, 9, 1),
    "row": (1, 3, 1, 300),
    "wide": (2, 1100, 1, 3),
    "no photo": (0, 4, 8, 8),
    "no pixel": (2, 4, 0, 8),
}


def layer_norm(module, x, residual, weight, bias):
    return module.layer_norm_2d(x, weight, bias, 1e-5, residual)


def rms_norm(module, x, residual, weight, bias):
    return module.rms_norm_2d(x, weight, 1e-5, residual)


def ada_rms_norm(module, x, residual, weight, bias):
    return module.ada_rms_norm_2d(x, weight, 1e-5, residual)


NORMS = {"layer_norm_2d": layer_norm, "rms_norm_2d": rms_norm, "ada_rms_norm_2d": ada_rms_norm}
every_norm = pytest.mark.parametrize("name", NORMS)


def make(name, shape, dtype=torch.float32, device="cpu", layout="contiguous", residual=None, seed=0):
    """x, residual, weight, bias: a mean far from zero, random parameters in float32; residual: its layout."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(size, generator=generator).to(device)
    C = shape[1]
    x = arrange((randn(*shape) + 2 * randn(1, C, 1, 1) + 3).to(dtype), layout)
    r = arrange(randn(*shape).to(dtype), residual) if residual else None
    weight = randn(*shape[:2]) if name == "ada_rms_norm_2d" else randn(C)
    return x, r, weight, randn(C) if name == "layer_norm_2d" else None


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def widened(tensors):
    return [None if t is None else t.double() for t in tensors]


def check_values(name, tensors, assert_error_within):
    x = tensors[0]
    actual = outputs(NORMS[name](ops, *tensors))
    exact = outputs(NORMS[name](reference, *widened(tensors)))
    baseline = outputs(NORMS[name](reference, *tensors))
    for out, e, base in zip(actual, exact, baseline, strict=True):
        assert out.dtype == x.dtype and out.shape == x.shape and out.device == x.device
        assert out.stride() == torch.empty_like(x).stride()
        if x.numel():
            assert_error_within(out, e, base, 2.0, torch.finfo(x.dtype).eps * e.abs().max().item())


def gradients(name, module, tensors, seeds):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    results = outputs(NORMS[name](module, *leaves))
    loss_gradients = [g.to(y.dtype) for g, y in zip(seeds, results)]
    return torch.autograd.grad(results, [t for t in leaves if t is not None], loss_gradients)


def check_gradients(name, tensors, assert_error_within, g_layout="contiguous"):
    x = tensors[0]
    generator = torch.Generator().manual_seed(1)
    seeds = [
        arrange(torch.randn(x.shape, generator=generator).to(x.device, x.dtype), g_layout)
        for _ in range(1 if tensors[1] is None else 2)
    ]
    actual = gradients(name, ops, tensors, seeds)
    exact = gradients(name, reference, widened(tensors), seeds)
    baseline = gradients(name, reference, tensors, seeds)
    for t, out, e, base in zip([t for t in tensors if t is not None], actual, exact, baseline, strict=True):
        assert out.dtype == t.dtype and out.shape == t.shape
        if x.numel():
            # A parameter has few elements, where the baseline may be exact by luck, another one with every number of
            # threads: eight roundings, not one.
            floor = torch.finfo(out.dtype).eps * e.abs().max().item() * (1 if t.dim() == 4 else 8)
            if x.shape[1] == 1:  # the exact gradient of one channel is near 0: what is left is rounding / sqrt(eps)
                floor = max(floor, 1e-6)
            assert_error_within(out, e, base, 2.0, floor)
    assert actual[0].stride() == torch.empty_like(x).stride()


# ---- values and gradients


@every_norm
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(place, name, shape, assert_error_within, poisoned_memory):
    with place:
        for dtype, layout, residual in (
            (torch.float32, "channels_last", None),
            (torch.bfloat16, "contiguous", "channels_last"),
        ):
            tensors = make(name, shape, dtype, place.device, layout, residual)
            check_values(name, tensors, assert_error_within)
            check_gradients(name, tensors, assert_error_within)


@every_norm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(place, name, dtype, layout, assert_error_within, poisoned_memory):
    with place:
        for residual in (None, layout):
            tensors = make(name, (2, 40, 5, 15), dtype, place.device, layout, residual)
            check_values(name, tensors, assert_error_within)
            check_gradients(name, tensors, assert_error_within)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, assert_error_within, poisoned_memory):
    with place:
        for other in LAYOUTS:
            tensors = make("layer_norm_2d", (2, 6, 5, 7), device=place.device, layout=layout, residual=other)
            check_values("layer_norm_2d", tensors, assert_error_within)
        check_gradients("layer_norm_2d", tensors, assert_error_within, g_layout=layout)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 9, 9))),
    layouts=st.tuples(*[st.sampled_from(("contiguous", "sliced", "channels_last"))] * 2),
    name=st.sampled_from(list(NORMS)),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(("triton", "cpp")),
)
def test_random_shapes(shape, layouts, name, dtype, backend, assert_error_within):
    if registry.unavailable(backend, "cpu"):
        backend = "torch"
    with use_backend(backend):
        tensors = make(name, shape, dtype, "cpu", *layouts)
        check_values(name, tensors, assert_error_within)
        check_gradients(name, tensors, assert_error_within)


def test_parameters_are_optional(place, assert_error_within):
    x, r, weight, bias = make("layer_norm_2d", (2, 12, 3, 4), device=place.device, residual="contiguous")
    with place:
        for w, b in ((None, None), (weight, None), (None, bias)):
            check_values("layer_norm_2d", (x, r, w, b), assert_error_within)
            check_gradients("layer_norm_2d", (x, r, w, b), assert_error_within)
        for w in (None, weight.expand(2, -1), weight.to(torch.float16)):
            check_values("rms_norm_2d", (x, r, w, None), assert_error_within)
            check_gradients("rms_norm_2d", (x, r, w, None), assert_error_within)


@every_norm
def test_only_what_is_asked_for_gets_a_gradient(place, name):
    x, _, weight, bias = make(name, (2, 12, 3, 4), device=place.device)
    with place:
        NORMS[name](ops, x, None, weight.requires_grad_(), bias).sum().backward()
        assert weight.grad is not None and x.grad is None
        NORMS[name](ops, x.requires_grad_(), None, weight.detach(), bias).sum().backward()
        assert x.grad is not None


def test_a_large_mean_keeps_its_digits(place, assert_error_within):
    x, r, weight, bias = make("layer_norm_2d", (1, 64, 3, 4), device=place.device)
    with place:
        check_values("layer_norm_2d", (x + 1e4, r, weight, bias), assert_error_within)


@every_norm
def test_not_finite_stays_in_its_pixel(place, name):
    x, _, weight, bias = make(name, (2, 12, 3, 4), device=place.device)
    x[0, 3, 1, 2], x[1, 0, 0, 0] = torch.nan, torch.inf
    with place:
        wrong = ~NORMS[name](ops, x, None, weight, bias).isfinite()
    assert wrong[0, :, 1, 2].all() and wrong[1, 0, 0, 0]
    wrong[0, :, 1, 2] = wrong[1, :, 0, 0] = False
    assert not wrong.any()


def test_writes_its_outputs_only(place, monkeypatch, assert_error_within):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "channels_last"):
        tensors = make("layer_norm_2d", (1, 13, 9, 11), torch.bfloat16, place.device, layout, layout)
        with place, guarded_outputs(monkeypatch):
            check_values("layer_norm_2d", tensors, assert_error_within)
            check_gradients("layer_norm_2d", tensors, assert_error_within)


def test_two_runs_give_the_same_bits(place):
    tensors = make("layer_norm_2d", (2, 24, 9, 9), torch.bfloat16, place.device, residual="contiguous")
    seeds = [torch.ones_like(tensors[0])] * 2
    with place:
        runs = [gradients("layer_norm_2d", ops, tensors, seeds) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_addresses_past_2_to_the_31(place):
    x = far_apart(place.device)
    x[0], x[1] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])
    x = x.permute(0, 3, 1, 2)  # four channels
    with place:
        y = ops.rms_norm_2d(x, None)
        torch.testing.assert_close(y, reference.rms_norm_2d(x.contiguous(), None))


def test_many_tiles_a_program(interpreted, monkeypatch, assert_error_within):
    """Every program of the backward loops, the last one past the end."""
    monkeypatch.setattr(pixel_norm, "PROGRAMS", 3)
    with interpreted:
        for layout in ("contiguous", "channels_last"):
            tensors = make("layer_norm_2d", (2, 130, 11, 13), torch.float32, layout=layout)
            check_gradients("layer_norm_2d", tensors, assert_error_within)


# ---- what the kernels do not take


@every_norm
def test_float64_is_the_references(name):
    tensors = widened(make(name, (2, 5, 3, 4), residual="contiguous"))
    before = sum(registry.fallbacks().values())
    for a, b in zip(NORMS[name](ops, *tensors), NORMS[name](reference, *tensors), strict=True):
        assert torch.equal(a, b)
    assert sum(registry.fallbacks().values()) == before + 1
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    assert torch.autograd.gradcheck(lambda *t: NORMS[name](ops, *t, *[None] * (4 - len(t))), leaves)


def test_more_channels_than_fit_in_registers(interpreted):
    x = torch.randn(1, pixel_norm.MAX_CHANNELS + 1, 1, 2)
    with interpreted, pytest.raises(RuntimeError, match="cannot serve: the kernel takes up to 4096 channels"):
        ops.rms_norm_2d(x, None)


# ---- as a torch op


@every_norm
def test_opcheck(place, name):
    op = getattr(torch.ops.lpmrf, name).default
    with place:
        for residual in (None, "channels_last"):
            x, r, weight, bias = make(name, (2, 5, 3, 4), torch.float16, place.device, "channels_last", residual)
            leaves = [None if t is None else t.requires_grad_() for t in (x, r, weight, bias)]
            torch.library.opcheck(op, (*leaves, 1e-6))


@every_norm
def test_compiles_and_exports(place, name):
    def block(x, r, weight, bias):
        s, y = NORMS[name](ops, x * 2, r, weight, bias)
        return s + y

    tensors = make(name, (2, 6, 4, 5), device=place.device, layout="channels_last", residual="channels_last")
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    torch._dynamo.reset()  # what was compiled for another place keeps that place's backward
    with place:
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        out, expected = compiled(*leaves), block(*leaves)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        inputs = [t for t in leaves if t is not None]
        for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (out, expected)), strict=True):
            assert torch.equal(a, b)

    scale = tensors[2].detach()[:1]

    class Block(torch.nn.Module):
        def forward(self, x):
            return block(x, x, scale.expand(x.shape[0], -1) if name[0] == "a" else None, None)

    program = torch.export.export(Block(), (tensors[0].detach(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert f"lpmrf.{name}" in str(program.graph)
    x = torch.randn(5, *tensors[0].shape[1:], device=place.device)
    assert program.module()(x).shape == x.shape


@every_norm
def test_autocast_leaves_the_dtype_alone(place, name, assert_error_within):
    tensors = make(name, (2, 5, 3, 4), torch.float32, place.device)
    with place, torch.autocast(place.device, dtype=torch.bfloat16):
        check_values(name, tensors, assert_error_within)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_norm
@pytest.mark.parametrize("shape", [(2, 128, 256, 256), (1, 512, 64, 64), (3, 4096, 16, 16)], ids=str)
def test_real_shapes_on_cuda(name, shape, assert_error_within):
    for layout in ("contiguous", "channels_last"):
        tensors = make(name, shape, torch.bfloat16, "cuda", layout, layout)
        with use_backend("triton"):
            check_values(name, tensors, assert_error_within)
            check_gradients(name, tensors, assert_error_within)


# ---- that it was the kernel


@every_norm
def test_triton_really_runs(interpreted, name, monkeypatch):
    spies = [Spy(pixel_norm._pixel_norm_fwd_kernel), Spy(pixel_norm._pixel_norm_bwd_kernel)]
    for spy in spies:
        monkeypatch.setattr(pixel_norm, spy.kernel.fn.__name__, spy)
    x, _, weight, bias = make(name, (1, 5, 3, 4))
    with interpreted:
        y = NORMS[name](ops, x.requires_grad_(), None, weight, bias)
    assert [spy.launches for spy in spies] == [1, 0]
    y.sum().backward()  # the backend of the forward, although nothing forces it here
    assert [spy.launches for spy in spies] == [1, 1]


@every_norm
def test_cpp_really_runs(name):
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    x, _, weight, bias = make(name, (1, 5, 3, 4))
    x.requires_grad_()
    ran = ops_run(lambda: NORMS[name](ops, x, None, weight, bias).sum().backward())
    assert {"lpmrf_cpp::pixel_norm", "lpmrf_cpp::pixel_norm_backward"} <= ran


FORWARD = {
    "no eps": ("/ channels + eps)", "/ channels + 0.01 * eps)"),
    "mean of the padded row": ("mean = tl.sum(x, 1) / channels", "mean = tl.sum(x, 1) / BLOCK_C"),
    "padding in the variance": ("x - mean[:, None], 0.0)", "x - mean[:, None], -mean[:, None])"),
    "the first photo's weight": ("weight_ptr + b * stride_weight_b", "weight_ptr + 0 * stride_weight_b"),
    "the residual's strides": ("stride_rc, stride_rh, stride_rw", "stride_xc, stride_xh, stride_xw"),
}
BACKWARD = {
    "weight left out": ("g *= weight[None, :]", "g *= 1.0"),
    "no projection": ("dx = g - x_hat * (tl.sum(g * x_hat, 1) / channels)[:, None]", "dx = g"),
    "no mean of the gradient": ("dx -= (tl.sum(g, 1)", "dx -= (0.0 * tl.sum(g, 1)"),
    "tiles overlap": ("        p += BLOCK_P", "        p += BLOCK_P // 2"),
    "the sum's gradient left out": ("dx += tl.load(g_sum_ptr + offs_s, mask=mask, other=0.0)", "dx += 0.0 * dx"),
}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_wrong_kernel_fails(interpreted, way, monkeypatch, tmp_path, assert_error_within):
    right, check, changes = {
        "forward": (pixel_norm._pixel_norm_fwd_kernel, check_values, FORWARD),
        "backward": (pixel_norm._pixel_norm_bwd_kernel, check_gradients, BACKWARD),
    }[way]
    monkeypatch.setattr(pixel_norm, "PROGRAMS", 2)
    cases = [
        (name, (x * 0.01, r, weight, bias))  # so small that eps counts
        for name in ("layer_norm_2d", "ada_rms_norm_2d")
        for x, r, weight, bias in [make(name, (2, 45, 9, 11), layout="channels_last", residual="contiguous")]
    ]
    cases = [(name, (x, r * 0.01, weight, bias)) for name, (x, r, weight, bias) in cases]

    def check_all():
        for name, tensors in cases:
            check(name, tensors, assert_error_within)

    with interpreted:
        old = next(iter(changes.values()))[0]
        monkeypatch.setattr(pixel_norm, right.fn.__name__, mutant(right, old, old, tmp_path))
        check_all()
        for old, new in changes.values():
            monkeypatch.setattr(pixel_norm, right.fn.__name__, mutant(right, old, new, tmp_path))
            with pytest.raises(AssertionError):
                check_all()


# ---- errors

X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: ops.layer_norm_2d(X[0], None, None),
            ValueError,
            r"x must be \(B, C, H, W\), got the shape \(3, 4, 5\)",
        ),
        (lambda: ops.layer_norm_2d(X.int(), None, None), TypeError, "float dtype, got torch.int32"),
        (lambda: ops.layer_norm_2d(X, X[0, 0, 0], None), ValueError, r"weight must be \(3,\), got \(5,\)"),
        (lambda: ops.layer_norm_2d(X, None, torch.ones(3).int()), TypeError, "bias must have a float dtype"),
        (
            lambda: ops.layer_norm_2d(X, None, None, torch.inf),
            ValueError,
            "eps must be finite and not negative, got inf",
        ),
        (lambda: ops.rms_norm_2d(X, None, -1.0), ValueError, "eps must be finite"),
        (lambda: ops.rms_norm_2d(X, torch.ones(3, 3)), ValueError, r"weight must be \(3,\) or \(2, 3\), got \(3, 3\)"),
        (lambda: ops.ada_rms_norm_2d(X, torch.ones(3)), ValueError, r"scale must be \(2, 3\), got \(3,\)"),
        (lambda: ops.ada_rms_norm_2d(X, torch.ones(2, 3, device="meta")), ValueError, "one device, got cpu and meta"),
        (lambda: ops.rms_norm_2d(X, None, residual=X[:1]), ValueError, "residual must have the shape of x"),
        (
            lambda: ops.rms_norm_2d(X, None, residual=X.half()),
            TypeError,
            r"got torch.float16; use residual.to\(x.dtype\)",
        ),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()
