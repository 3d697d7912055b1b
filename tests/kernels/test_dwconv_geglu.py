"""geglu and dwconv_geglu: gelu(gate) · value of two halves, alone or after a depthwise convolution, any layout."""

from functools import partial

import pytest
import torch
from kernel_cases import LAYOUTS, Spy, far_apart, guarded_outputs, mutant, ops_run
from op_cases import assert_as_good_as_pytorch, assert_compiles, assert_exports_with_a_dynamic_batch, randn

from lpmrf_kernels import dwconv_geglu, geglu, reference, registry, use_backend

SHAPES = {
    "latent": (1, 32, 4, 4),
    "one": (1, 2, 1, 1),
    "prime": (2, 14, 3, 7),
    "past one tile of channels": (1, 130, 2, 2),
    "past one tile of pixels": (1, 4, 5, 9),
    "column": (1, 6, 9, 1),
    "no photo": (0, 4, 8, 8),
}
# x and parameters; the last is what autocast leaves
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}


def make(shape, dtypes="fp32", device="cpu", layout="contiguous", bias=True):
    dtype, parameters = DTYPES[dtypes]
    x = randn(*shape, dtype=dtype, device=device, layout=layout)
    weight, b = randn(shape[1], 1, 3, 3, seed=1), randn(shape[1], seed=2)
    return [x] + [p.detach().to(device, parameters).requires_grad_() for p in (weight, b)[: 2 if bias else 1]]


def supported(place, dtypes):
    if place.backend == "cpp" and dtypes == "fp16":
        pytest.skip("the reference's")


def check(tensors, gate_first=True, backward=True):
    x = tensors[0]
    (out,), (dx, *_) = assert_as_good_as_pytorch(
        lambda *t: dwconv_geglu(*t, gate_first=gate_first),
        lambda *t: reference.dwconv_geglu(*t, gate_first=gate_first),
        tensors,
        backward,
    )
    assert out.stride() == torch.empty_like(x[:, : x.shape[1] // 2]).stride()
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(place, shape, poisoned_memory):
    with place:
        check(make(shape, device=place.device, layout="channels_last"))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(place, dtypes, poisoned_memory):
    supported(place, dtypes)
    # The interpreter truncates to bfloat16, which the sums of the backward add up.
    backward = not (place.device == "cpu" and place.backend == "triton" and dtypes in ("bf16", "mixed"))
    with place:
        check(make((1, 6, 5, 4), dtypes, place.device, "channels_last"), False, backward)
        check(make((1, 6, 5, 4), dtypes, place.device, bias=False), True, backward)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, poisoned_memory):
    with place:
        check(make((2, 6, 4, 3), device=place.device, layout=layout))


@pytest.mark.parametrize("layout", ("contiguous", "sliced", "reversed"))
@pytest.mark.parametrize("shape", [(6,), (0, 4), (3, 10), (2, 3, 4, 70), (1, 2, 1, 3, 6)], ids=str)
def test_geglu_of_the_last_dimension(place, shape, layout, poisoned_memory):
    with place:
        x = randn(*shape, device=place.device, layout=layout)
        (out,), _ = assert_as_good_as_pytorch(geglu, reference.geglu, [x])
        assert not out.numel() or len(shape) > 4 or out.stride() == torch.empty_like(x[..., : shape[-1] // 2]).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_geglu_of_channels(place, layout, poisoned_memory):
    with place:
        x = randn(2, 6, 4, 5, device=place.device, layout=layout)
        for gate_first in (True, False):
            op, oracle = (partial(f, dim=1, gate_first=gate_first) for f in (geglu, reference.geglu))
            assert_as_good_as_pytorch(op, oracle, [x])
        assert torch.equal(dwconv_geglu(x), geglu(x, 1, True))


def test_gelu_is_exact_everywhere(place):
    """x · Φ(x) within three roundings from the far tail to where it is x; beyond, exactly 0 and x."""
    gate = torch.cat([torch.linspace(-6, 6, 4001), torch.tensor([-100.0, -20.0, 20.0, 100.0])]).to(place.device)
    with place:
        out = geglu(torch.stack([torch.ones_like(gate), gate], dim=-1))[:, 0].double()
    exact = torch.nn.functional.gelu(gate.double())
    assert ((out - exact).abs() <= 3 * 2.0**-24 * gate.abs().clamp(min=1)).all()
    assert out[-4:].tolist() == [0, 0, 20, 100]


def test_writes_its_output_only(place, monkeypatch):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    with place, guarded_outputs(monkeypatch):
        check(make((1, 6, 5, 9), device=place.device, layout="channels_last"))


def test_not_finite_stays_where_it_is(place):
    x, weight, bias = make((1, 4, 7, 7), device=place.device)
    x.data[0, 1, 3, 3] = torch.nan
    with place:
        out, alone = dwconv_geglu(x, weight, bias), geglu(x, 1, True)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, 1, 3, 3] = True
    assert torch.equal(alone.isnan(), wrong)
    wrong[0, 1, 2:5, 2:5] = True
    assert torch.equal(out.isnan(), wrong)


def test_two_runs_give_the_same_bits(place):
    with place:
        first, second = ([*check_bits(make((1, 34, 3, 3), device=place.device))] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def check_bits(tensors):
    out = dwconv_geglu(*tensors)
    return out, *torch.autograd.grad(out.sum(), tensors)


def test_addresses_past_2_to_the_31(place):
    x = far_apart(place.device).transpose(1, 3)  # (2, 4, 1, 1)
    x[0], x[1] = 1, 2
    weight = torch.zeros(4, 1, 3, 3, device=place.device)
    weight[:, :, 1, 1] = 1
    with place:
        for out in (dwconv_geglu(x, weight), geglu(x, 1)):
            torch.testing.assert_close(out, reference.geglu(x, 1))


def test_float64_and_small_floats_are_the_references():
    tensors = [t.detach().double() for t in make((1, 4, 3, 3))]
    before = sum(registry.fallbacks().values())
    assert torch.equal(dwconv_geglu(*tensors), reference.dwconv_geglu(*tensors))
    assert sum(registry.fallbacks().values()) == before + 1
    with use_backend("cpp"), pytest.raises(RuntimeError, match="asked for and cannot serve"):
        dwconv_geglu(*tensors)


def test_gradcheck():
    tensors = [t.detach().double().requires_grad_() for t in make((1, 4, 3, 2))]
    assert torch.autograd.gradcheck(dwconv_geglu, tensors)
    assert torch.autograd.gradcheck(geglu, tensors[0].detach().requires_grad_())


# ---- as torch ops


def test_opcheck(place):
    with place:
        tensors = make((2, 4, 2, 2), "fp32", place.device, "channels_last")
        torch.library.opcheck(torch.ops.lpmrf.dwconv_geglu.default, (*tensors, True))
        tensors = make((1, 4, 1, 2), "fp32", place.device)
        torch.library.opcheck(torch.ops.lpmrf.dwconv_geglu.default, (*tensors[:2], None, False))
        torch.library.opcheck(torch.ops.lpmrf.geglu.default, (tensors[0], False))


def test_compiles_without_a_break(place):
    with place:
        assert_compiles(dwconv_geglu, make((1, 4, 2, 3), device=place.device, layout="channels_last"))


def test_exports_with_a_dynamic_batch():
    x, *parameters = (t.detach() for t in make((2, 6, 3, 4)))
    assert_exports_with_a_dynamic_batch(dwconv_geglu, x, *parameters)
    assert_exports_with_a_dynamic_batch(geglu, x)


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("dwconv_geglu")
    kernels = ("_dwconv_geglu_fwd_kernel", "_dwconv_geglu_bwd_kernel", "_geglu_fwd_kernel", "_geglu_bwd_kernel")
    spies = {name: Spy(getattr(module, name)) for name in kernels}
    for name, spy in spies.items():
        monkeypatch.setattr(module, name, spy)
    depthwise = Spy(module_of("depthwise")._depthwise_bwd_kernel)
    monkeypatch.setattr(module_of("depthwise"), "_depthwise_bwd_kernel", depthwise)
    tensors = make((1, 4, 2, 2))
    with interpreted:
        out, alone = dwconv_geglu(*tensors), geglu(tensors[0], 1)
    (out.sum() + alone.sum()).backward()  # outside of the block: on the backend of the forward
    assert [spy.launches for spy in (*spies.values(), depthwise)] == [1] * 5


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    tensors = make((1, 4, 2, 2))

    def both():
        (dwconv_geglu(*tensors).sum() + geglu(tensors[0], 1).sum()).backward()

    names = {"dwconv_geglu", "dwconv_geglu_backward", "depthwise_backward", "geglu", "geglu_backward"}
    assert {f"lpmrf_cpp::{name}" for name in names} <= ops_run(both)
    with use_backend("torch"):
        assert not any("lpmrf_cpp" in name for name in ops_run(both))


WRONG = {
    "the other gate": ("_gated(h1, h2) if", "_gated(h2, h1) if"),
    "no bias": ("bias2 = tl.load(bias_ptr + c + hidden", "bias2 = tl.load(bias_ptr + c"),
    "taps of the first half": ("load_taps(weight_ptr, c + hidden, mask_c)", "load_taps(weight_ptr, c, mask_c)"),
    "a row too far": ("y = y0 + i - 1", "y = y0 + i"),
}
WRONG_BACKWARD = {
    "padding counted twice": ("own = mask & (i < ROWS)", "own = mask & (i <= ROWS)"),
    "taps not turned": ("turned = (w[8], w[7]", "turned = (w[0], w[1]"),
    "left for right": ("s3 += here * right", "s3 += here * left"),
}


@pytest.mark.parametrize(
    ("name", "kernel", "old", "new"),
    [("dwconv_geglu", "_dwconv_geglu_fwd_kernel", *change) for change in WRONG.values()]
    + [("depthwise", "_depthwise_bwd_kernel", *change) for change in WRONG_BACKWARD.values()],
    ids=[*WRONG, *WRONG_BACKWARD],
)
def test_a_wrong_kernel_fails_the_value_check(
    interpreted, module_of, monkeypatch, tmp_path, name, kernel, old, new, poisoned_memory
):
    shape = (1, 4, 3, 3) if name == "dwconv_geglu" else (1, 2, 18, 2)
    module, tensors = module_of(name), make(shape, layout="channels_last")
    right = getattr(module, kernel)
    with interpreted:
        monkeypatch.setattr(module, kernel, mutant(right, old, old, tmp_path))  # so that what fails is the change
        check(tensors)
        monkeypatch.setattr(module, kernel, mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            check(tensors)


# ---- errors

X, WEIGHT, BIAS = torch.zeros(1, 4, 3, 3), torch.zeros(4, 1, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((X.long(), WEIGHT), TypeError, "x must have a float dtype, got torch.int64"),
        ((X[0], WEIGHT), ValueError, r"x must be \(B, C, H, W\), got the shape \(4, 3, 3\)"),
        ((X[:, :3], WEIGHT[:3]), ValueError, "their number must be even, got 3"),
        ((X, WEIGHT[:2]), ValueError, r"weight must have the shape \(4, 1, 3, 3\) here, got \(2, 1, 3, 3\)"),
        ((X, WEIGHT, BIAS[:3]), ValueError, r"bias must have the shape \(4,\)"),
        ((X, WEIGHT.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
        ((X, WEIGHT.int()), TypeError, "weight must be a tensor of a float dtype, got torch.int32"),
        ((X, None, BIAS), ValueError, "a bias but no weight"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        dwconv_geglu(*arguments)


def test_geglu_refuses():
    with pytest.raises(ValueError, match="dim must be the last one"):
        geglu(torch.zeros(4, 6, 8), 0)
    with pytest.raises(ValueError, match="must be even, got 3"):
        geglu(torch.zeros(2, 3))
