"""attention: our flash kernels against float64, who is chosen to attend, and what is said about the others."""

import json

import pytest
import torch
from kernel_cases import Spy, mutant, ops_run

from lpmrf_kernels import attention, backends, launch, reference, registry, use_attention, use_backend

# batch, heads, queries, keys, channels of a head
CASES = {
    "cross, two tiles": (1, 2, 70, 37, 24),
    "self": (2, 1, 33, 33, 40),
    "long keys": (1, 1, 5, 130, 64),
    "one token": (1, 1, 1, 1, 3),
    "no photo": (0, 2, 4, 4, 8),
    "no query": (1, 2, 0, 4, 8),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["interpreted", "cuda"])
def device(request, interpreted):
    """Where our Triton kernels run."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda" if request.param == "cuda" else "cpu"


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v and the gradient of the result; keys and values have a mean, so that forgetting a key shows."""
    B, heads, Lq, Lk, D = case
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, heads, Lq, D), (B, heads, Lk, D), (B, heads, Lk, D), (B, heads, Lq, D)
    return [(torch.randn(shape, generator=generator) + 0.3).to(device, dtype) for shape in shapes]


def naive(q, k, v, scale=None):
    """Out of plain PyTorch operations, each rounding as it goes."""
    return torch.softmax((q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1) @ v


def differentiated(function, q, k, v, g, **arguments):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def assert_values(assert_error_within, q, k, v, g):
    with use_attention("triton"):
        results = differentiated(attention, q, k, v, g)
    exact = differentiated(naive, *(t.double() for t in (q, k, v, g)))
    baseline = differentiated(naive, q, k, v, g)
    for result, right, plain, like in zip(results, exact, baseline, (q, q, k, v), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype
        assert result.stride() == torch.empty_like(like).stride()
        if right.numel():
            # One token: p is 1 up to a rounding, and the gradient of q is what rounding leaves of 0.
            largest = max(t.abs().max().item() for t in (*exact, g) if t.numel())
            floor = torch.finfo(q.dtype).eps * largest
            assert_error_within(result, right, plain, factor=2.0, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(device, case, dtype, assert_error_within, poisoned_memory):
    assert_values(assert_error_within, *make(case, dtype, device))


def test_strided_views(device, assert_error_within, poisoned_memory):
    """As models have them: heads behind tokens, q, k and v in one tensor."""
    q, k, v, g = make((2, 2, 17, 17, 16), device=device)
    qkv = torch.stack([q, k, v], dim=2).permute(0, 3, 2, 1, 4).contiguous()
    q, k, v = qkv.unbind(2)
    assert_values(assert_error_within, *(t.transpose(1, 2) for t in (q, k, v)), g.transpose(2, 3).clone().mT)


@pytest.fixture
def cpp():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)


CPP_CASES = {
    **CASES,
    "many tiles and blocks": (2, 3, 200, 150, 64),
    "wide heads": (1, 2, 50, 65, 100),
    "far from zero": (1, 1, 60, 70, 16),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", CPP_CASES)
def test_values_in_cpp(cpp, name, dtype, assert_error_within, poisoned_memory):
    q, k, v, _ = make(CPP_CASES[name], dtype)
    if name == "far from zero":  # exp must not overflow, nor a padded key's score of zero outweigh all others
        q, k = 30 * q.abs(), -30 * k.abs()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    with use_attention("cpp"):
        out, from_views = attention(q, k, v), attention(*views)
        assert torch.equal(attention(*views), from_views) and torch.equal(out, from_views)
    assert out.dtype == dtype and out.stride() == torch.empty_like(q).stride()
    assert from_views.stride() == torch.empty_like(views[0]).stride()
    if out.numel():
        exact = naive(*(t.double() for t in (q, k, v)))
        floor = torch.finfo(dtype).eps * v.abs().max().item()
        assert_error_within(out, exact, naive(q, k, v), factor=2.0, floor=floor)
    for t in (q, k, v):  # any strides, channels apart too
        t.data = t.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    with use_attention("cpp"):
        assert torch.equal(attention(q, k, v), out)


def test_a_nan_reaches_its_query_and_an_infinite_value_its_channel_in_cpp(cpp):
    q, k, v, _ = make((1, 1, 60, 70, 16))
    q[0, 0, 7, 3], v[0, 0, 5, 2] = torch.nan, torch.inf
    with use_attention("cpp"):
        out = attention(q, k, v)
    assert out[0, 0, 7].isnan().all() and out[0, 0, :, 2].isinf().sum() == 59
    out[0, 0, 7], out[0, 0, :, 2] = 0, 0
    assert out.isfinite().all()


def test_opcheck_in_cpp(cpp):
    for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v, _ = map(layout, make((1, 2, 5, 3, 4)))
        torch.library.opcheck(torch.ops.lpmrf.attention.default, (q, k, v, 0.5, "cpp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(2, 12, 256, 256, 64), (32, 12, 1024, 1024, 64), (1, 3, 500, 77, 128)], ids=str)
def test_values_at_real_sizes(case, dtype, assert_error_within):
    assert_values(assert_error_within, *make(case, dtype, "cuda"))


def test_two_runs_give_the_same_bits(device):
    inputs = make(CASES["self"], device=device)
    with use_attention("triton"):
        results = zip(*(differentiated(attention, *inputs) for _ in range(2)))
        assert all(torch.equal(a, b) for a, b in results)


def test_a_nan_reaches_its_query_or_its_head(device):
    q, k, v, _ = make((1, 2, 5, 7, 4), device=device)
    q[0, 0, 3, 1], v[0, 1, 2, 0] = torch.nan, torch.nan
    with use_attention("triton"):
        out = attention(q, k, v)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, 0, 3], wrong[0, 1, :, 0] = True, True
    assert torch.equal(out.isnan(), wrong)


def test_rope_rotates_queries_and_keys():
    q, k, v, g = make((2, 2, 6, 6, 16))
    angles = torch.randn(6, 2, 4)
    cos, sin = angles.cos(), angles.sin()
    by_hand = [reference.rope(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k)]
    torch.testing.assert_close(attention(q, k, v, cos=cos, sin=sin), naive(*by_hand, v))
    assert differentiated(attention, q, k, v, g, cos=cos, sin=sin)[1].isfinite().all()


# ---- as a torch op


def test_opcheck(device):
    q, k, v, g = make((1, 2, 5, 3, 4), device=device)
    op = torch.ops.lpmrf.attention
    torch.library.opcheck(op.default, (*(t.clone().requires_grad_() for t in (q, k, v)), 0.5))
    torch.library.opcheck(torch.ops.lpmrf.attention_backward.default, (g, q, k, v, *op(q, k, v, 0.5), 0.5))


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_compiles_without_a_break(interpreted, name):
    inputs = make((1, 2, 5, 3, 4))
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with use_attention(name):
        results = zip(*(differentiated(f, *inputs) for f in (compiled, attention)))
        assert all(torch.equal(a, b) for a, b in results)


@pytest.mark.parametrize("name", ["triton", "sdpa", "cpp"])
def test_exports_with_a_dynamic_batch(interpreted, name, cpp):
    class Network(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    q, k, v, _ = make((2, 2, 5, 3, 4))
    with use_attention(name):
        program = torch.export.export(Network(), (q, k, v), dynamic_shapes=[{0: torch.export.Dim("batch")}] * 3)
    assert ("lpmrf.attention" in str(program.graph)) == (name != "sdpa")
    q, k, v = (torch.cat([t, t]) for t in (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), naive(q, k, v))


# ---- who attends


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("attention")
    spies = {name: Spy(getattr(module, f"_attention_{name}_kernel")) for name in ("fwd", "dq", "dkdv")}
    for name, spy in spies.items():
        monkeypatch.setattr(module, f"_attention_{name}_kernel", spy)
    inputs = make((1, 1, 3, 3, 3))
    for context in (use_attention("triton"), use_backend("triton")):
        with context:
            differentiated(attention, *inputs)
    differentiated(attention, *inputs)
    assert [spy.launches for spy in spies.values()] == [2, 2, 2]


def test_the_choice(module_of, monkeypatch):
    """Context before environment before backend before the table before sdpa."""
    module = module_of("attention")
    for backend, provider in (("torch", "sdpa"), ("cpp", None), ("triton", "triton")):
        with use_backend(backend):
            assert module._forced() == provider
            monkeypatch.setenv("LPMRF_ATTENTION", "flash_attn")
            assert module._forced() == "flash_attn"
            with use_attention("xformers"):
                assert module._forced() == "xformers"
            monkeypatch.delenv("LPMRF_ATTENTION")
    with use_attention("auto"):
        assert module._forced() is None


def test_the_choice_on_a_cpu(cpp, module_of, monkeypatch):
    """C++ where vectors are wide and there are no tiles for bfloat16; for gradients and other dtypes always sdpa."""
    module = module_of("attention")
    machine = {"capability": "AVX512", "tiles": False}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: machine["capability"])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: machine["tiles"])
    q, k, v, _ = make((1, 1, 3, 3, 64))

    def choice(dtype):
        return module._choose(*(t.to(dtype) for t in (q, k, v)))

    assert choice(torch.float32) == choice(torch.bfloat16) == "cpp"
    assert choice(torch.float16) == choice(torch.float64) == "sdpa"
    assert module._choose(q, k, v.clone().requires_grad_()) == "sdpa"
    with torch.no_grad():
        assert module._choose(q, k, v.clone().requires_grad_()) == "cpp"
    machine["tiles"] = True
    assert (choice(torch.float32), choice(torch.bfloat16)) == ("cpp", "sdpa")
    machine["capability"] = "AVX2"
    assert choice(torch.float32) == "sdpa"
    with use_backend("cpp"):
        assert choice(torch.float32) == "cpp" and choice(torch.float64) == "sdpa"
    with use_attention("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for .* it has no backward"):
        attention(q.requires_grad_(), k, v)


def test_cpp_really_runs(cpp):
    with use_attention("cpp"):
        assert "lpmrf_cpp::attention" in ops_run(lambda: attention(*make((1, 1, 3, 3, 4))[:3]))


def test_the_table_chooses_the_fastest_that_serves(module_of, monkeypatch, tmp_path):
    rows = [
        {"depth": 64, "queries": 256, "keys": 256, "flash_attn": 1, "triton": 3, "sdpa": 4},
        {"depth": 64, "queries": 4096, "keys": 4096, "triton": 9, "sdpa": 8, "unheard of": 1},
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU of this test")
    launch.user_folder().mkdir(parents=True)
    (launch.user_folder() / launch.table_name("A GPU of this test")).write_text(
        json.dumps({"attention_providers": rows})
    )
    module = module_of("attention")
    monkeypatch.setattr(module, "_import_error", lambda name: f"{name} cannot be imported")
    fastest = lambda dtype, length: module._fastest(torch.device("cuda"), dtype, 64, length, length)
    assert fastest(torch.bfloat16, 300) == ("sdpa" if module.unavailable("triton", "cuda") else "triton")
    assert fastest(torch.float64, 300) == "sdpa"
    assert fastest(torch.bfloat16, 3000) == "sdpa"
    monkeypatch.setattr(module, "_import_error", lambda name: None)
    assert fastest(torch.bfloat16, 300) == "flash_attn"


def test_who_cannot_serve_is_refused_with_the_reason(interpreted):
    q, k, v, _ = make((1, 1, 3, 3, 4))
    with use_attention("sdpa_cudnn"), pytest.raises(RuntimeError, match="'sdpa_cudnn' was asked for .*not cpu"):
        attention(q, k, v)
    with use_attention("triton"):
        with pytest.raises(RuntimeError, match="'triton' was asked for .*not torch.float64"):
            attention(q.double(), k.double(), v.double())
        with pytest.raises(RuntimeError, match="up to 128 channels"):
            attention(*make((1, 1, 2, 2, 129))[:3])


def test_backends_names_every_provider_and_its_reason(module_of):
    providers = set(module_of("attention").PROVIDERS)
    for row in (r for device in ("cpu", "cuda") for r in backends(device) if r.op == "attention"):
        first = module_of("attention")._fastest_on_cpu(torch.bfloat16, 64)
        expected = first if (row.device, row.direction) == ("cpu", "forward") else "sdpa"
        assert row.backend == expected and set(row.why_not) == providers - {expected} and all(row.why_not.values())
    with use_attention("sdpa_flash"):
        row = next(r for r in backends("cuda") if r.op == "attention")
        assert row.backend == "sdpa_flash" and row.why_not["sdpa"] == "sdpa_flash was asked for"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_provider_agrees_on_cuda(module_of):
    module = module_of("attention")
    q, k, v, g = make((2, 4, 256, 256, 64), torch.bfloat16, "cuda")
    exact = differentiated(naive, *(t.double() for t in (q, k, v, g)))
    for name in module.PROVIDERS:
        if module._refusal(name, "cuda", q.dtype, 64) is None:
            with use_attention(name):
                for a, b in zip(differentiated(attention, q, k, v, g), exact):
                    assert (a.double() - b).abs().max() < 0.02 * b.abs().max(), name


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("_attention_fwd_kernel", 's = tl.where((j < keys)[None, :], s, -float("inf"))', "s += 0"),
        ("_attention_fwd_kernel", "total * shrink", "total"),
        ("_attention_dq_kernel", "- delta[:, None]", ""),
        ("_attention_dkdv_kernel", "p = tl.where((i < queries)[None, :], tl.exp2(s - lse[None, :]), 0.0)", "p = s"),
        ("_attention_dkdv_kernel", "dk * scale", "dk"),
    ],
)
def test_a_wrong_kernel_fails(interpreted, module_of, monkeypatch, tmp_path, name, old, new, assert_error_within):
    module = module_of("attention")
    monkeypatch.setattr(module, name, mutant(getattr(module, name), old, new, tmp_path))
    with pytest.raises(AssertionError):
        assert_values(assert_error_within, *make(CASES["cross, two tiles"]))


# ---- errors

Q = torch.zeros(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("tensors", "arguments", "error", "words"),
    [
        ((Q, Q[:, :1], Q[:, :1]), {}, ValueError, r"expected q \(B, heads, Lq, D\)"),
        ((Q, Q, Q[:, :, :4]), {}, ValueError, "expected q"),
        ((Q[0], Q[0], Q[0]), {}, ValueError, "expected q"),
        ((Q, Q[:, :, :0], Q[:, :, :0]), {}, ValueError, "a key and a channel at least"),
        ((Q[..., :0], Q[..., :0], Q[..., :0]), {}, ValueError, "a key and a channel at least"),
        ((Q, Q.half(), Q), {}, TypeError, "one float dtype"),
        ((Q, Q.to("meta"), Q), {}, ValueError, "one device"),
        ((Q, Q, Q), {"scale": float("nan")}, ValueError, "scale must be finite"),
        ((Q, Q, Q), {"cos": torch.ones(5, 2, 1)}, ValueError, r"cos and sin must be \(5, 2, at most 2\), got None"),
        ((Q, Q, Q), {"cos": torch.ones(5, 2, 3), "sin": torch.ones(5, 2, 3)}, ValueError, r"got \(5, 2, 3\)"),
    ],
)
def test_refuses(tensors, arguments, error, words):
    with pytest.raises(error, match=words):
        attention(*tensors, **arguments)


def test_an_unknown_provider_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no attention is called 'fast'; there are triton, cpp, sdpa"):
        use_attention("fast").__enter__()
    monkeypatch.setenv("LPMRF_ATTENTION", "fast")
    with pytest.raises(ValueError, match="LPMRF_ATTENTION: no attention is called 'fast'"):
        attention(Q, Q, Q)
