"""euler_step: z + dt · v in float32, any layout, on every backend; the result has z's shape and memory format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Spy, arrange, far_apart, guarded_outputs, mutant, ops_run

from lpmrf_kernels import euler_step, reference, registry, use_backend

SHAPES = {
    "latent": (2, 16, 8, 8),
    "one": (1, 1, 1, 1),
    "prime": (3, 5, 7, 11),
    "past one tile": (1, 3, 19, 23),
    "row": (1, 1, 1, 1300),
    "no photo": (0, 4, 8, 8),
    "flat": (37,),
    "scalar": (),
}
V_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DT = 0.04


def make(shape, v_dtype=torch.float32, device="cpu", z_layout="contiguous", v_layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return arrange(z.to(device), z_layout), arrange(v.to(device, v_dtype), v_layout)


def assert_value(z, v, dt=DT):
    """Against float64. One multiplication and one addition: two roundings, or one where the GPU fuses them."""
    out = euler_step(z, v, dt)
    exact = z.double() + dt * v.double()
    bound = 2.0**-23 * (z.double().abs() + abs(dt) * v.double().abs() + exact.abs())
    assert out.dtype == torch.float32 and out.shape == z.shape and out.device == z.device
    assert out.stride() == torch.empty_like(z).stride()
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("v_dtype", V_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value(place, shape, v_dtype, poisoned_memory):
    with place:
        assert_value(*make(shape, v_dtype, place.device))


@pytest.mark.parametrize("v_layout", LAYOUTS)
@pytest.mark.parametrize("z_layout", LAYOUTS)
def test_layouts(place, z_layout, v_layout, poisoned_memory):
    with place:
        assert_value(*make((2, 3, 5, 7), torch.bfloat16, place.device, z_layout, v_layout))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=4),
    layouts=st.tuples(*[st.sampled_from(("contiguous", "sliced", "reversed"))] * 2),
    dt=st.floats(-2, 2, width=32),
    v_dtype=st.sampled_from(V_DTYPES),
    backend=st.sampled_from(("triton", "cpp")),
)
def test_random_shapes(shape, layouts, dt, v_dtype, backend):
    z, v = make(shape, v_dtype)
    z, v = (arrange(t, layout) for t, layout in zip((z, v), layouts, strict=True))
    if registry.unavailable(backend, "cpu"):
        backend = "torch"
    with use_backend(backend):
        assert_value(z, v, dt)


def test_writes_its_output_only(place, monkeypatch):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "channels_last"):
        with place, guarded_outputs(monkeypatch):
            assert_value(*make((1, 3, 19, 23), device=place.device, v_layout=layout))


def test_not_finite_stays_where_it_is(place):
    z, v = make((2, 3, 4, 5), device=place.device)
    z[0, 0, 0, 0], z[0, 1, 2, 3], v[1, 2, 3, 4] = torch.nan, torch.inf, torch.nan
    with place:
        out = euler_step(z, v, DT)
    wrong = torch.zeros_like(z, dtype=torch.bool)
    wrong[0, 0, 0, 0] = wrong[0, 1, 2, 3] = wrong[1, 2, 3, 4] = True
    assert torch.equal(~out.isfinite(), wrong)
    assert out[0, 1, 2, 3] == torch.inf and out[1, 2, 3, 4].isnan()


def test_two_runs_give_the_same_bits(place):
    z, v = make((2, 16, 8, 8), torch.bfloat16, place.device)
    with place:
        assert torch.equal(euler_step(z, v, DT), euler_step(z, v, DT))


def test_addresses_past_2_to_the_31(place):
    z = far_apart(place.device)
    z[0], z[1] = 1, 2
    with place:
        out = euler_step(z, z, 0.5)
    assert torch.equal(out, z * 1.5)


def test_k_steps_on_a_straight_path_arrive(place):
    source, clean = make((1, 4, 8, 8), device=place.device)
    with place:
        z = source
        for _ in range(25):
            z = euler_step(z, clean - source, 1 / 25)
    assert (z - clean).abs().max() < 1e-5


# ---- what the kernels do not take


def test_float64_is_the_references():
    z, v = (t.double() for t in make((2, 3, 4, 5)))
    before = sum(registry.fallbacks().values())
    assert torch.equal(euler_step(z, v, DT), reference.euler_step(z, v, DT))
    assert sum(registry.fallbacks().values()) == before + 1


def test_five_dimensions_and_small_floats_are_the_references():
    z = torch.randn(2, 1, 3, 1, 2)
    assert torch.equal(euler_step(z, z, DT), reference.euler_step(z, z, DT))
    v = torch.randn(4, 4).to(torch.float8_e4m3fn)
    z = torch.randn(4, 4)
    assert torch.equal(euler_step(z, v, DT), z + DT * v.float())


# ---- gradients


def test_gradcheck():
    z, v = (t.double().requires_grad_() for t in make((2, 3, 2, 2)))
    assert torch.autograd.gradcheck(lambda z, v: euler_step(z, v, 0.3), (z, v))
    assert torch.autograd.gradgradcheck(lambda z, v: euler_step(z, v, 0.3), (z, v))


@pytest.mark.parametrize("v_dtype", V_DTYPES, ids=str)
def test_gradients(place, v_dtype):
    z, v = make((2, 3, 5, 7), v_dtype, place.device, v_layout="channels_last")
    z.requires_grad_(), v.requires_grad_()
    g = torch.randn(z.shape, device=place.device)
    with place:
        dz, dv = torch.autograd.grad(euler_step(z, v, DT), (z, v), g)
    assert torch.equal(dz, g)
    assert dv.dtype == v_dtype and torch.equal(dv, (DT * g).to(v_dtype))


def test_gradient_of_one_input():
    z, v = make((1, 2, 3, 4))
    v.requires_grad_()
    euler_step(z, v, DT).sum().backward()
    assert torch.equal(v.grad, torch.full_like(v, DT)) and z.grad is None


# ---- as a torch op


def test_opcheck(place):
    op = torch.ops.lpmrf.euler_step.default
    with place:
        z, v = make((2, 3, 4, 5), torch.float16, place.device)
        torch.library.opcheck(op, (z.requires_grad_(), v.requires_grad_(), DT))
        z, v = make((2, 3, 4, 5), torch.float32, place.device, "channels_last", "sliced")
        torch.library.opcheck(op, (z, v, DT))


def test_compiles_without_a_break(place):
    def step(z, v):
        return euler_step(z * 2, v, DT) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z, v = make((2, 3, 4, 5), device=place.device, z_layout="channels_last")
    z.requires_grad_()
    with place:
        out, expected = compiled(z, v), step(z, v)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        (gradient,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(gradient, torch.full_like(z, 2))


def test_exports_with_a_dynamic_batch():
    class Step(torch.nn.Module):
        def forward(self, z, v):
            return euler_step(z, v, DT)

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Step(), make((2, 3, 4, 4)), dynamic_shapes=(batch, batch))
    assert "lpmrf.euler_step" in str(program.graph)
    z, v = make((5, 3, 4, 4))
    assert torch.equal(program.module()(z, v), euler_step(z, v, DT))


def test_autocast_leaves_the_state_alone(place):
    z, v = make((2, 3, 4, 5), torch.bfloat16, place.device)
    with place, torch.autocast(place.device, dtype=torch.bfloat16):
        assert_value(z, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_in_a_cuda_graph():
    z, v = make((2, 16, 64, 64), torch.bfloat16, "cuda")
    with use_backend("triton"):
        euler_step(z, v, DT)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = euler_step(z, v, DT)
    for seed in (1, 2):
        new = make(z.shape, torch.bfloat16, "cuda", seed=seed)
        z.copy_(new[0]), v.copy_(new[1])
        graph.replay()
        assert (out - reference.euler_step(*new, DT)).abs().max() < 1e-6


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    spy = Spy(module_of("euler_step")._euler_step_fwd_kernel)
    monkeypatch.setattr(module_of("euler_step"), "_euler_step_fwd_kernel", spy)
    with interpreted:
        euler_step(*make((1, 2, 3, 4)), DT)
    assert spy.launches == 1


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    inputs = make((1, 2, 3, 4))
    assert "lpmrf_cpp::euler_step" in ops_run(lambda: euler_step(*inputs, DT))
    with use_backend("torch"):
        assert "lpmrf_cpp::euler_step" not in ops_run(lambda: euler_step(*inputs, DT))


WRONG = {
    "backwards in time": ("z + dt * v", "z - dt * v"),
    "no step size": ("z + dt * v", "z + v"),
    "z's strides for v": ("i2 * stride_v2", "i2 * stride_z2"),
    "rows mixed up": ("offs // size3 % size2", "offs // size3 % size1"),
    "the last tile left out": (
        "mask=mask)\n    v = ",
        "mask=mask)\n    mask = offs < numel // BLOCK * BLOCK\n    v = ",
    ),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(interpreted, module_of, monkeypatch, tmp_path, old, new, poisoned_memory):
    module = module_of("euler_step")
    inputs = make((2, 3, 19, 23), v_layout="channels_last")
    right = module._euler_step_fwd_kernel
    with interpreted:
        for same in (right, mutant(right, old, old, tmp_path)):  # so that what fails below is the change
            monkeypatch.setattr(module, "_euler_step_fwd_kernel", same)
            assert_value(*inputs)
        monkeypatch.setattr(module, "_euler_step_fwd_kernel", mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_value(*inputs)


# ---- errors


@pytest.mark.parametrize(
    ("z", "v", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3), ValueError, r"same shape, got \(2, 3\) and \(1, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, "same shape"),
        (torch.zeros(3).bfloat16(), torch.zeros(3), TypeError, "z must be float32 or float64, got torch.bfloat16"),
        (torch.zeros(3), torch.zeros(3).long(), TypeError, "float dtype, got torch.int64"),
        (torch.zeros(3), torch.zeros(3, device="meta"), ValueError, "one device"),
    ],
)
def test_refuses(z, v, error, words):
    with pytest.raises(error, match=words):
        euler_step(z, v, DT)


def test_refuses_a_step_that_is_no_number():
    with pytest.raises(ValueError, match="dt must be finite, got nan"):
        euler_step(torch.zeros(3), torch.zeros(3), float("nan"))
