"""window_attention: SwinIR's shifted windows on every backend, forward and backward, against float64."""

import pytest
import torch
from kernel_cases import Spy, arrange, mutant, ops_run

from lpmrf_kernels import reference, registry, use_backend, window_attention

# batch, height, width, heads, channels a head, window, shift
CASES = {
    "shifted": (2, 4, 8, 2, 6, 4, 2),
    "SwinIR": (1, 16, 8, 1, 30, 8, 4),
    "odd window": (1, 7, 14, 2, 16, 7, 3),
    "one window": (1, 4, 4, 3, 5, 4, 0),
    "one pixel": (1, 1, 1, 1, 3, 1, 0),
    "no photo": (0, 8, 8, 2, 4, 4, 2),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """x, bias, the gradient of the result, window and shift."""
    B, H, W, heads, D, size, shift = case
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, W, 3 * heads * D), (heads, size**2, size**2), (B, H, W, heads * D)
    x, bias, g = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x.to(dtype), bias, g.to(dtype), size, shift


def differentiated(function, x, bias, g, size, shift):
    """Result, gradient of x, gradient of bias."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias, size, shift)
    return y.detach(), *torch.autograd.grad(y, (x, bias), g)


def assert_values(assert_error_within, x, bias, g, size, shift):
    results = differentiated(window_attention, x, bias, g, size, shift)
    exact = differentiated(reference.window_attention, x.double(), bias.double(), g.double(), size, shift)
    baseline = differentiated(reference.window_attention, x, bias, g, size, shift)
    for result, right, plain, like in zip(results, exact, baseline, (g, x, bias), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype and result.is_contiguous()
        if right.numel():
            floor = torch.finfo(x.dtype).eps * right.abs().max().item()
            assert_error_within(result, right, plain, factor=2.0, floor=floor)


def serves(place, dtype):
    if place.backend == "cpp" and dtype == torch.float16:
        pytest.skip("float16 is the reference's on a CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(place, case, dtype, assert_error_within, poisoned_memory):
    serves(place, dtype)
    with place:
        assert_values(assert_error_within, *make(case, dtype, place.device))


@pytest.mark.parametrize("layout", ["reversed", "sliced", "transposed"])
def test_layouts(place, layout, assert_error_within, poisoned_memory):
    x, bias, g, *window = make(CASES["shifted"], device=place.device)
    with place:
        assert_values(assert_error_within, arrange(x, layout), bias, arrange(g, layout), *window)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_real_size(dtype, assert_error_within):
    with use_backend("triton"):
        assert_values(assert_error_within, *make((2, 64, 64, 6, 30, 8, 4), dtype, "cuda"))


def test_two_runs_give_the_same_bits(place):
    inputs = make(CASES["shifted"], device=place.device)
    with place:
        for a, b in zip(differentiated(window_attention, *inputs), differentiated(window_attention, *inputs)):
            assert torch.equal(a, b)


def test_not_finite_stays_in_its_window(place):
    x, bias, _, size, _ = make(CASES["shifted"], device=place.device)
    x[1, 3, 2, 0] = torch.nan
    with place:
        y = window_attention(x, bias, size)
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[1, 3, 2, :6] = True  # a query: its own row, its own head
    assert torch.equal(y.isnan(), wrong)


def test_what_the_kernels_do_not_take_is_the_references():
    x, bias, _, *window = make(CASES["shifted"], torch.float64)
    before = sum(registry.fallbacks().values())
    assert torch.equal(window_attention(x, bias, *window), reference.window_attention(x, bias, *window))
    assert sum(registry.fallbacks().values()) == before + 1
    for x, bias, _, *window in (make((1, 9, 9, 1, 4, 9, 4)), make((1, 2, 2, 1, 65, 2, 0))):
        with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for and cannot serve"):
            window_attention(x, bias, *window)


def test_gradcheck():
    x, bias, _, size, shift = make((1, 4, 4, 2, 2, 2, 1))
    inputs = x.double().requires_grad_(), bias.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: window_attention(x, bias, size, shift, 0.7), inputs)


# ---- as a torch op


def test_opcheck(place):
    x, bias, g, size, shift = make((1, 4, 4, 2, 3, 2, 1), device=place.device)
    with place:
        arguments = x.requires_grad_(), bias.requires_grad_(), size, shift, 0.5
        torch.library.opcheck(torch.ops.lpmrf.window_attention.default, arguments)
        arguments = g, x.detach(), bias.detach(), size, shift, 0.5, place.backend
        torch.library.opcheck(torch.ops.lpmrf.window_attention_backward.default, arguments)


def test_compiles_without_a_break(place):
    x, bias, g, *window = make(CASES["shifted"], device=place.device)
    torch.compiler.reset()  # the backward's backend is that of the place where it was compiled
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    with place:
        for a, b in zip(
            differentiated(compiled, x, bias, g, *window), differentiated(window_attention, x, bias, g, *window)
        ):
            assert torch.equal(a, b)


def test_exports_with_a_dynamic_batch():
    class Network(torch.nn.Module):
        def forward(self, x, bias):
            return window_attention(x, bias, 4, 2)

    x, bias, *_ = make(CASES["shifted"])
    program = torch.export.export(Network(), (x, bias), dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert "lpmrf.window_attention" in str(program.graph)
    more = torch.cat([x, x, x])
    assert torch.equal(program.module()(more, bias), window_attention(more, bias, 4, 2))


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("window_attention")
    spies = [Spy(getattr(module, f"_window_attention_{way}_kernel")) for way in ("fwd", "bwd")]
    for way, spy in zip(("fwd", "bwd"), spies):
        monkeypatch.setattr(module, f"_window_attention_{way}_kernel", spy)
    with interpreted:
        differentiated(window_attention, *make((1, 4, 4, 1, 3, 4, 0)))
    assert [spy.launches for spy in spies] == [1, 1]


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    ran = ops_run(lambda: differentiated(window_attention, *make(CASES["shifted"], torch.bfloat16)))
    assert {"lpmrf_cpp::window_attention", "lpmrf_cpp::window_attention_backward"} <= ran


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("_window_probabilities", "* scale + bias", "* scale"),
        ("_window_probabilities", "-100.0", "0.0"),
        ("_window_tokens", "(y + shift) % height", "(y + height - shift + 1) % height"),
        ("_window_attention_fwd_kernel", "2 * HEADS * DEPTH", "HEADS * DEPTH"),
        ("_window_attention_bwd_kernel", "ds = p * (dp - tl.sum(p * dp, 1)[:, None])", "ds = p * dp"),
        ("_window_attention_bwd_kernel", "dk = tl.dot(tl.trans(ds)", "dk = tl.dot(ds"),
    ],
)
def test_a_wrong_kernel_fails(
    interpreted, module_of, monkeypatch, tmp_path, name, old, new, assert_error_within, poisoned_memory
):
    module = module_of("window_attention")
    inputs = make(CASES["shifted"])
    with interpreted:
        assert_values(assert_error_within, *inputs)
        monkeypatch.setattr(module, name, mutant(getattr(module, name), old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_values(assert_error_within, *inputs)


# ---- errors


@pytest.mark.parametrize(
    ("x", "bias", "arguments", "error", "words"),
    [
        (torch.zeros(1, 4, 4, 6), torch.zeros(2, 16, 16), (4, 4), ValueError, "less than 4, got 4"),
        (torch.zeros(1, 4, 6, 6), torch.zeros(2, 16, 16), (4,), ValueError, "multiples of the window's 4, got 4x6"),
        (torch.zeros(1, 4, 4, 6), torch.zeros(2, 16, 15), (4,), ValueError, r"bias must be \(heads, 16, 16\)"),
        (torch.zeros(1, 4, 4, 8), torch.zeros(2, 16, 16), (4,), ValueError, "got 8 channels"),
        (torch.zeros(4, 4, 6), torch.zeros(2, 16, 16), (4,), ValueError, r"x must be \(B, H, W, 3C\)"),
        (torch.zeros(1, 4, 4, 6), torch.zeros(2, 16, 16).long(), (4,), TypeError, "float dtype"),
        (torch.zeros(1, 4, 4, 6), torch.zeros(2, 16, 16, device="meta"), (4,), ValueError, "one device"),
        (torch.zeros(1, 4, 4, 6), torch.zeros(2, 16, 16), (4, 0, float("inf")), ValueError, "scale must be finite"),
    ],
)
def test_refuses(x, bias, arguments, error, words):
    with pytest.raises(error, match=words):
        window_attention(x, bias, *arguments)
