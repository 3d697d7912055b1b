"""neighborhood_attention_2d: shifted windows on every backend, forward and backward, against float64.

That the reference itself is right is tested one query at a time in tests/models/test_options.py.
"""

import pytest
import torch
from kernel_cases import Spy, mutant, ops_run

from lpmrf_kernels import neighborhood_attention_2d, reference, registry, use_backend

# batch, height, width, heads, channels a head, window
CASES = {
    "two tiles": (1, 9, 10, 1, 16, 5),
    "two heads": (2, 5, 3, 2, 20, 3),
    "the map is the window": (1, 7, 7, 1, 8, 7),
    "wider than a vector": (1, 9, 11, 1, 5, 9),
    "one pixel": (1, 1, 1, 1, 4, 1),
    "no photo": (0, 8, 8, 2, 4, 3),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """qkv (B, H, W, 3, heads, D), the gradient of the result, and the window."""
    B, H, W, heads, D, K = case
    generator = torch.Generator().manual_seed(seed)
    qkv, g = torch.randn(B, H, W, 3, heads, D, generator=generator), torch.randn(B, H, W, heads, D, generator=generator)
    return qkv.to(device, dtype), g.to(device, dtype), K


def differentiated(function, qkv, g, kernel_size, arrange=lambda t: t):
    """Result and the gradients of q, k and v, which are views of one tensor."""
    leaf = qkv.detach().requires_grad_()
    out = function(*(arrange(t) for t in leaf.unbind(3)), kernel_size)
    (gradient,) = torch.autograd.grad(out, leaf, g)
    return out.detach(), *gradient.unbind(3)


def assert_values(assert_error_within, qkv, g, kernel_size, arrange=lambda t: t):
    results = differentiated(neighborhood_attention_2d, qkv, g, kernel_size, arrange)
    exact = differentiated(reference.neighborhood_attention_2d, qkv.double(), g.double(), kernel_size)
    baseline = differentiated(reference.neighborhood_attention_2d, qkv, g, kernel_size)
    for result, right, plain in zip(results, exact, baseline, strict=True):
        assert result.shape == g.shape and result.dtype == g.dtype
        if right.numel():
            # Where one key is seen the gradient of q is 0, and what is left of it is rounding of p · (g · v).
            floor = torch.finfo(g.dtype).eps * max(right.abs().max().item(), g.abs().max().item())
            assert_error_within(result, right, plain, factor=2.0, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(place, case, dtype, assert_error_within, poisoned_memory):
    if place.backend == "cpp" and dtype == torch.float16:
        pytest.skip("float16 is the reference's on a CPU")
    with place:
        assert_values(assert_error_within, *make(case, dtype, place.device))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels first": lambda t: t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    "heads first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(place, layout, assert_error_within, poisoned_memory):
    qkv, g, K = make(CASES["two heads"], device=place.device)
    with place:
        assert_values(assert_error_within, qkv, g, K, layout)
        q, k, v = (layout(t) for t in qkv.unbind(3))
        assert neighborhood_attention_2d(q, k, v, K).stride() == torch.empty_like(q).stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 64, 64, 4, 64, 7), (1, 33, 70, 2, 128, 7), (1, 24, 40, 2, 24, 13)], ids=str)
def test_values_at_real_sizes(case, dtype, assert_error_within):
    with use_backend("triton"):
        assert_values(assert_error_within, *make(case, dtype, "cuda"))


def test_two_runs_give_the_same_bits(place):
    inputs = make(CASES["two heads"], device=place.device)
    with place:
        results = zip(*(differentiated(neighborhood_attention_2d, *inputs) for _ in range(2)))
        assert all(torch.equal(a, b) for a, b in results)


def test_a_nan_reaches_who_sees_it(place):
    if place.backend == "torch":
        pytest.skip("PyTorch's masked attention spreads it along the row")
    qkv, _, K = make(CASES["two tiles"], device=place.device)
    qkv[0, 4, 5, 1] = torch.nan  # a key
    with place:
        out = neighborhood_attention_2d(*qkv.unbind(3), K)
    assert out[0, 2:7, 3:8].isnan().all() and out[0, :, 0].isfinite().all()


def test_memory_is_linear_in_pixels():
    """A map of 128x128 pixels with full scores of one head would take 1 GB."""
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    q, k, v = torch.randn(3, 1, 128, 128, 1, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        neighborhood_attention_2d(q, k, v, 7)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * q.numel() * 4


def test_what_the_kernels_do_not_take_is_the_references():
    qkv, _, K = make(CASES["two heads"], torch.float64)
    before = sum(registry.fallbacks().values())
    expected = reference.neighborhood_attention_2d(*qkv.unbind(3), K)
    assert torch.equal(neighborhood_attention_2d(*qkv.unbind(3), K), expected)
    assert sum(registry.fallbacks().values()) == before + 1
    for case, dtype in (((1, 3, 3, 1, 129, 3), torch.float32), (CASES["two heads"], torch.float64)):
        qkv, _, K = make(case, dtype)
        with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for and cannot serve"):
            neighborhood_attention_2d(*qkv.unbind(3), K)


def test_gradcheck():
    qkv, _, K = make((1, 4, 5, 1, 2, 3))
    inputs = [t.double().requires_grad_() for t in qkv.unbind(3)]
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attention_2d(*t, K, 0.7), inputs)


# ---- as a torch op


def test_opcheck(place):
    qkv, g, K = make((1, 4, 5, 1, 3, 3), device=place.device)
    q, k, v = qkv.unbind(3)
    with place:
        op = torch.ops.lpmrf.neighborhood_attention_2d
        torch.library.opcheck(op.default, (*(t.clone().requires_grad_() for t in (q, k, v)), K, 0.5))
        saved = q, k, v, *op(q, k, v, K, 0.5), K, 0.5, place.backend
        torch.library.opcheck(torch.ops.lpmrf.neighborhood_attention_2d_backward.default, (g, *saved))


def test_compiles_without_a_break(place):
    inputs = make((1, 4, 5, 1, 3, 3), device=place.device)
    torch.compiler.reset()  # the backward's backend is that of the place where it was compiled
    compiled = torch.compile(neighborhood_attention_2d, fullgraph=True, backend="aot_eager")
    with place:
        results = zip(*(differentiated(f, *inputs) for f in (compiled, neighborhood_attention_2d)))
        assert all(torch.equal(a, b) for a, b in results)


def test_exports_with_a_dynamic_batch():
    class Network(torch.nn.Module):
        def forward(self, qkv):
            return neighborhood_attention_2d(*qkv.unbind(3), 3)

    qkv, _, _ = make(CASES["two heads"])
    program = torch.export.export(Network(), (qkv,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "lpmrf.neighborhood_attention_2d" in str(program.graph)
    more = torch.cat([qkv, qkv, qkv])
    assert torch.equal(program.module()(more), Network()(more))


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("neighborhood_attention_2d")
    spies = {name: Spy(getattr(module, f"_neighborhood_attention_{name}_kernel")) for name in ("fwd", "dq", "dkdv")}
    for name, spy in spies.items():
        monkeypatch.setattr(module, f"_neighborhood_attention_{name}_kernel", spy)
    with interpreted:
        differentiated(neighborhood_attention_2d, *make((1, 3, 3, 1, 3, 3)))
    assert [spy.launches for spy in spies.values()] == [1, 1, 1]


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    ran = ops_run(lambda: differentiated(neighborhood_attention_2d, *make(CASES["two heads"], torch.bfloat16)))
    assert {"lpmrf_cpp::neighborhood_attention_2d", "lpmrf_cpp::neighborhood_attention_2d_backward"} <= ran


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("_window_start", "length - K", "length"),
        ("_window_start", "i - K // 2", "i - K // 2 + 1"),
        ("_neighborhood_attention_fwd_kernel", "total * shrink", "total"),
        ("_neighborhood_attention_dq_kernel", "- delta[:, None]", ""),
        ("_first_seer", "key - K // 2", "key - K // 2 + 1"),
        ("_last_seer", "length - 1", "key + K // 2"),
    ],
)
def test_a_wrong_kernel_fails(
    interpreted, module_of, monkeypatch, tmp_path, name, old, new, assert_error_within, poisoned_memory
):
    module = module_of("neighborhood_attention_2d")
    inputs = make((1, 9, 10, 1, 4, 3), seed=1)
    with interpreted:
        monkeypatch.setattr(module, name, mutant(getattr(module, name), old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_values(assert_error_within, *inputs)


# ---- errors

Q = torch.zeros(1, 5, 6, 2, 4)


@pytest.mark.parametrize(
    ("tensors", "arguments", "error", "words"),
    [
        ((Q, Q, Q), (4,), ValueError, "odd and positive, got 4"),
        ((Q, Q, Q), (-1,), ValueError, "odd and positive, got -1"),
        ((Q, Q, Q), (7,), ValueError, "kernel_size 7 is larger than the 5x6 map"),
        ((Q, Q[:, :4], Q), (3,), ValueError, "must have one shape"),
        ((Q[0], Q[0], Q[0]), (3,), ValueError, r"q must be \(B, H, W, heads, D\)"),
        ((Q[..., :0], Q[..., :0], Q[..., :0]), (3,), ValueError, r"q must be \(B, H, W, heads, D\)"),
        ((Q, Q.half(), Q), (3,), TypeError, "one float dtype"),
        ((Q, Q.to("meta"), Q), (3,), ValueError, "one device"),
        ((Q, Q, Q), (3, float("nan")), ValueError, "scale must be finite"),
    ],
)
def test_refuses(tensors, arguments, error, words):
    with pytest.raises(error, match=words):
        neighborhood_attention_2d(*tensors, *arguments)
