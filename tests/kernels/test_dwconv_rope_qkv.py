"""dwconv_rope_qkv: q, k and v of the qkv projection after depthwise convolution, cosine scaling and rotation."""

from functools import partial

import pytest
import torch
from kernel_cases import LAYOUTS, Spy, mutant, ops_run
from op_cases import assert_as_good_as_pytorch, assert_compiles, assert_exports_with_a_dynamic_batch, randn

from lpmrf_kernels import dwconv_rope_qkv, reference, registry, use_backend

# batch, heads, head size, height, width; which parts
CASES = {
    "LooUFormer": ((1, 2, 64, 3, 3), "conv bias rope"),
    "without a convolution": ((1, 1, 64, 2, 3), "rope"),
    "HDiT": ((2, 2, 64, 2, 3), "rope scale"),
    "everything": ((1, 2, 8, 5, 2), "conv bias rope scale"),
    "one pixel": ((1, 1, 4, 1, 1), "conv bias rope"),
    "convolution only": ((1, 1, 12, 3, 2), "conv"),
    "odd head size": ((2, 3, 20, 2, 3), "conv rope"),
    "past one tile": ((1, 1, 4, 5, 9), "conv bias rope"),
    "heads alone": ((1, 2, 8, 3, 2), ""),
    "no photo": ((0, 2, 8, 3, 3), "conv bias rope scale"),
}
# qkv and parameters; the last is what autocast leaves. Tables are float32.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}


def make(sizes, parts, dtypes="fp32", device="cpu", layout="contiguous"):
    """num_heads, the tables, and qkv, weight, bias and scale, None where they are not among the parts."""
    B, heads, D, H, W = sizes
    C, (dtype, parameters) = 3 * heads * D, DTYPES[dtypes]
    kind = dict(dtype=parameters, device=device)
    qkv = randn(B, C, H, W, dtype=dtype, device=device, layout=layout)
    weight = randn(C, 1, 3, 3, seed=1, **kind) if "conv" in parts else None
    bias = randn(C, seed=2, **kind) if "bias" in parts else None
    scale = (randn(heads, seed=3, grad=False).abs() + 0.5).to(**kind).requires_grad_() if "scale" in parts else None
    angles = randn(H, W, heads, D // 4, device=device, seed=4, grad=False)
    tables = (angles.cos(), angles.sin()) if "rope" in parts else (None, None)
    return heads, tables, [qkv, weight, bias, scale]


def call(function, heads, tables, qkv, weight=None, bias=None, scale=None):
    cos, sin = (t if t is None or qkv.dtype != torch.float64 else t.double() for t in tables)
    return function(qkv, heads, weight, bias, cos, sin, scale)


def check(heads, tables, tensors, backward=True):
    ops = (partial(call, function, heads, tables) for function in (dwconv_rope_qkv, reference.dwconv_rope_qkv))
    outputs, (dx, *_) = assert_as_good_as_pytorch(*ops, tensors, backward)
    B, C, H, W = tensors[0].shape
    for t in outputs:
        assert t.shape == (B, H, W, heads, C // 3 // heads) and t.is_contiguous()
    assert dx.stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.parametrize(("sizes", "parts"), CASES.values(), ids=CASES.keys())
def test_cases(place, sizes, parts, poisoned_memory):
    with place:
        check(*make(sizes, parts, device=place.device, layout="channels_last"))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(place, dtypes, poisoned_memory):
    if place.backend == "cpp" and dtypes == "fp16":
        pytest.skip("the reference's")
    # The interpreter truncates to bfloat16, which the sums of the backward add up.
    backward = not (place.device == "cpu" and place.backend == "triton" and dtypes in ("bf16", "mixed"))
    with place:
        check(*make((1, 2, 8, 3, 2), "conv bias rope", dtypes, place.device, "channels_last"), backward)
        check(*make((1, 2, 16, 2, 2), "rope scale", dtypes, place.device, "channels_last"), backward)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, poisoned_memory):
    with place:
        check(*make((1, 2, 4, 2, 3), "conv bias rope", device=place.device, layout=layout))


def test_gradients_of_other_layouts(place):
    """Global attention may hand back gradients of its own layout."""
    heads, tables, tensors = make((1, 2, 8, 2, 3), "rope", device=place.device)
    with place:
        q, k, v = call(dwconv_rope_qkv, heads, tables, *tensors)
        straight = [randn(*q.shape, device=place.device, seed=s, grad=False) for s in range(3)]
        turned = [g.transpose(1, 3).contiguous().transpose(1, 3) for g in straight]
        (expected,), (actual,) = (torch.autograd.grad((q, k, v), tensors[0], g, True) for g in (straight, turned))
    assert torch.equal(actual, expected)


def test_global_attention_reads_a_view(place):
    heads, tables, tensors = make((2, 3, 8, 2, 3), "rope", device=place.device)
    with place:
        for t in call(dwconv_rope_qkv, heads, tables, *tensors):
            view = t.flatten(1, 2).transpose(1, 2)
            assert view.shape == (2, 3, 6, 8) and view.data_ptr() == t.data_ptr() and view.stride(-1) == 1


def test_float64_is_the_references():
    heads, (cos, sin), tensors = make((1, 2, 8, 2, 2), "conv bias rope scale")
    qkv, weight, bias, scale = (t.detach().double().requires_grad_() for t in tensors)
    tables = cos.double(), sin.double()
    before = sum(registry.fallbacks().values())
    outputs = dwconv_rope_qkv(qkv, heads, weight, bias, *tables, scale)
    assert sum(registry.fallbacks().values()) == before + 1
    for t, expected in zip(outputs, reference.dwconv_rope_qkv(qkv, heads, weight, bias, *tables, scale)):
        assert torch.equal(t, expected)
    assert torch.autograd.gradcheck(partial(call, dwconv_rope_qkv, heads, tables), (qkv, weight, bias, scale))


def test_a_scale_with_an_odd_head_size_is_the_references(interpreted):
    inputs = make((1, 2, 12, 2, 2), "rope scale")
    with interpreted, pytest.raises(RuntimeError, match="a power of two"):
        check(*inputs)


# ---- as a torch op


def test_opcheck(place):
    with place:
        for parts, layout in (("conv bias rope scale", "channels_last"), ("rope", "contiguous")):
            heads, tables, (qkv, weight, bias, scale) = make((1, 1, 4, 1, 2), parts, "fp32", place.device, layout)
            arguments = (qkv, heads, weight, bias, *tables, scale, 1e-6)
            torch.library.opcheck(torch.ops.lpmrf.dwconv_rope_qkv.default, arguments)


def test_compiles_without_a_break(place):
    with place:
        heads, tables, tensors = make((1, 1, 4, 2, 3), "conv bias rope", device=place.device, layout="channels_last")
        assert_compiles(partial(call, dwconv_rope_qkv, heads, tables), tensors)


def test_exports_with_a_dynamic_batch():
    heads, tables, (qkv, weight, bias, _) = make((2, 2, 8, 3, 2), "conv bias rope")
    parameters = [t.detach() for t in (weight, bias)]
    assert_exports_with_a_dynamic_batch(partial(call, dwconv_rope_qkv, heads, tables), qkv.detach(), *parameters)


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("dwconv_rope_qkv")
    spies = {n: Spy(getattr(module, n)) for n in ("_dwconv_rope_qkv_fwd_kernel", "_dwconv_rope_qkv_bwd_kernel")}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name, spy)
    heads, tables, tensors = make((1, 1, 4, 2, 2), "conv bias rope")
    with interpreted:
        outputs = call(dwconv_rope_qkv, heads, tables, *tensors)
    sum(t.sum() for t in outputs).backward()  # outside of the block: on the backend of the forward
    assert [spy.launches for spy in spies.values()] == [1, 1]


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    heads, tables, tensors = make((1, 1, 4, 2, 2), "conv bias rope")

    def both():
        sum(t.sum() for t in call(dwconv_rope_qkv, heads, tables, *tensors)).backward()

    names = {"dwconv_rope_qkv", "dwconv_rope_qkv_backward", "depthwise_backward"}
    assert {f"lpmrf_cpp::{name}" for name in names} <= ops_run(both)
    with use_backend("torch"):
        assert not any("lpmrf_cpp" in name for name in ops_run(both))


WRONG = {
    "turned the other way": ("fwd", "turned1 = h1 * cos - h2 * sin", "turned1 = h1 * cos + h2 * sin"),
    "v rotated too": ("fwd", "(half % 2 == 0) & (part < 2)", "half % 2 == 0"),
    "every half rotated": ("fwd", "(half % 2 == 0) & (part < 2)", "(half >= 0) & (part < 2)"),
    "one table for all heads": ("fwd", "half // 2 * QUARTER + j % QUARTER", "j % QUARTER"),
    "v for k": ("fwd", "if part == 1:", "if part == 3:"),
    "gradient not turned back": ("bwd", "turned2 = g2 * cos - g1 * sin", "turned2 = g2 * cos + g1 * sin"),
    "length kept": ("bwd", "(g1 - h1 * (along * r))", "g1"),
}


@pytest.mark.parametrize(("kind", "old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(
    interpreted, module_of, monkeypatch, tmp_path, kind, old, new, poisoned_memory
):
    module, name = module_of("dwconv_rope_qkv"), f"_dwconv_rope_qkv_{kind}_kernel"
    inputs = make((1, 2, 8, 2, 2), "rope scale")
    right = getattr(module, name)
    with interpreted:
        monkeypatch.setattr(module, name, mutant(right, old, old, tmp_path))  # so that what fails is the change
        check(*inputs)
        monkeypatch.setattr(module, name, mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            check(*inputs)


# ---- errors

QKV, WEIGHT, TABLE = torch.zeros(1, 24, 3, 2), torch.zeros(24, 1, 3, 3), torch.zeros(3, 2, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(qkv=QKV.long()), TypeError, "qkv must have a float dtype"),
        (dict(qkv=QKV[0]), ValueError, r"qkv must be \(B, C, H, W\)"),
        (dict(num_heads=3), ValueError, r"3 · num_heads · D channels, got 24 for 3 heads"),
        (dict(num_heads=4), ValueError, "a multiple of 4, got 2"),
        (dict(weight=WEIGHT[:8]), ValueError, r"weight must have the shape \(24, 1, 3, 3\)"),
        (dict(bias=torch.zeros(24)), ValueError, "a bias but no weight"),
        (dict(cos=TABLE), ValueError, "cos and sin come together"),
        (
            dict(cos=TABLE, sin=TABLE[:2]),
            ValueError,
            r"sin must have the shape \(3, 2, 2, 1\) here, got \(2, 2, 2, 1\)",
        ),
        (dict(scale=torch.zeros(3)), ValueError, r"scale must have the shape \(2,\)"),
        (dict(cos=TABLE.to("meta"), sin=TABLE), ValueError, "cos must be on the device of x"),
        (dict(eps=float("nan")), ValueError, "eps must be finite and not negative, got nan"),
        (dict(eps=-1.0), ValueError, "eps must be finite and not negative"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        dwconv_rope_qkv(**{"qkv": QKV, "num_heads": 2, **arguments})
