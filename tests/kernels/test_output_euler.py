"""output_euler: RMSNorm, projection and Euler update in one, against the composition in float64, on every backend."""

import pytest
import torch
from kernel_cases import LAYOUTS, Spy, arrange, guarded_outputs, mutant, ops_run

from lpmrf_kernels import euler_step, output_euler, reference, registry, use_backend

SHAPES = {  # B, C, H, W, outputs
    "network": (2, 80, 6, 6, 16),
    "one": (1, 1, 1, 1, 1),
    "prime": (1, 37, 5, 7, 3),
    "past one tile": (1, 70, 5, 9, 19),
    "no photo": (0, 8, 4, 4, 4),
    "no pixel": (2, 8, 0, 4, 4),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS, DT = torch.finfo(torch.float32).eps, -0.04


def make(shape, dtype=torch.float32, device="cpu", layout="contiguous", z_layout="contiguous", bias=True, patch=(1, 1)):
    B, C, H, W, outputs = shape
    p, q = patch
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, z = 3 * normal(B, C, H, W), arrange(normal(B, outputs // (p * q), H * p, W * q), z_layout)
    norm_weight, weight, shift = 1 + 0.3 * normal(C), normal(outputs, C) / C**0.5, normal(outputs)
    x, norm_weight, weight, shift = (t.to(dtype) for t in (arrange(x, layout), norm_weight, weight, shift))
    arguments = x, norm_weight, EPS, weight, shift if bias else None, z, DT, patch
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


def assert_value(arguments):
    """At most twice the error of PyTorch's composition at x's dtype, plus one rounding of the float32 state."""
    out, z = output_euler(*arguments), arguments[5]
    exact = reference.output_euler(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    plain = reference.output_euler(*arguments)
    assert out.dtype == torch.float32 and out.shape == z.shape and out.device == z.device
    assert out.stride() == torch.empty_like(z).stride()
    if out.numel():
        error, allowed = ((t.double() - exact).abs().max() for t in (out, plain))
        assert error <= 2 * allowed + 2.0**-23 * exact.abs().max(), f"error {error:.3g}, composition {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value(place, shape, dtype, poisoned_memory):
    with place:
        assert_value(make(shape, dtype, place.device))


@pytest.mark.parametrize("z_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, z_layout, poisoned_memory):
    with place:
        assert_value(make((2, 9, 3, 5, 4), torch.bfloat16, place.device, layout, z_layout))


@pytest.mark.parametrize("z_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("patch", [(4, 4), (2, 3), (1, 5)])
def test_patches(place, patch, z_layout, poisoned_memory):
    """Outputs ordered (row, column, channel), as the networks split their tokens; written out here once."""
    p, q = patch
    arguments = make((2, 9, 3, 5, 3 * p * q), torch.bfloat16, place.device, "channels_last", z_layout, patch=patch)
    x, norm_weight, eps, weight, bias, z, dt, _ = arguments
    with place:
        assert_value(arguments)
        pixels = output_euler(*arguments)
        tokens = output_euler(x, norm_weight, eps, weight, bias, x.new_zeros(2, 3 * p * q, 3, 5).float(), dt)
    for row in range(p):
        for column in range(q):
            for channel in range(3):
                step = (pixels - z)[:, channel, row::p, column::q]
                expected = tokens[:, (row * q + column) * 3 + channel]
                torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5)


def test_without_bias_and_with_a_convolutions_weight(place):
    x, norm_weight, eps, weight, _, z, dt, _ = make((1, 20, 3, 4, 4), device=place.device, bias=False)
    with place:
        assert_value((x, norm_weight, eps, weight, None, z, dt))
        as_convolution = output_euler(x, norm_weight, eps, weight[:, :, None, None], None, z, dt)
        assert torch.equal(as_convolution, output_euler(x, norm_weight, eps, weight, None, z, dt))


def test_mixed_dtypes(place):
    x, norm_weight, eps, weight, bias, z, dt, _ = make((1, 20, 3, 4, 4), device=place.device)
    with place:
        assert_value((x.bfloat16(), norm_weight, eps, weight.half(), bias, z, dt))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_at_the_pipelines_shape_on_cuda(dtype):
    with use_backend("triton"):
        assert_value(make((8, 256, 64, 64, 16), dtype, "cuda", "channels_last", "channels_last"))


def test_a_nan_stays_in_its_pixel(place):
    arguments = make((1, 20, 3, 4, 4), device=place.device)
    arguments[0][0, 7, 1, 2] = torch.nan
    with place:
        wrong = output_euler(*arguments).isnan()
    assert wrong[:, :, 1, 2].all() and wrong.sum() == 4


def test_a_black_pixel_is_finite(place):
    arguments = make((1, 20, 3, 4, 4), device=place.device)
    arguments[0].zero_()
    with place:
        assert output_euler(*arguments).isfinite().all()


def test_two_runs_give_the_same_bits_and_write_their_output_only(place, monkeypatch):
    arguments = make((1, 70, 5, 9, 3), torch.bfloat16, place.device, "channels_last")
    with place:
        first = output_euler(*arguments)
        if place.backend == "torch":
            return
        with guarded_outputs(monkeypatch):
            assert torch.equal(output_euler(*arguments), first)


def test_other_dtypes_are_the_references():
    before = sum(registry.fallbacks().values())
    arguments = [a.double() if isinstance(a, torch.Tensor) else a for a in make((1, 20, 3, 4, 4))]
    assert torch.equal(output_euler(*arguments), reference.output_euler(*arguments))
    assert sum(registry.fallbacks().values()) == before + 1


def test_many_outputs_are_not_for_triton(interpreted):
    with interpreted, pytest.raises(RuntimeError, match="up to 128 outputs"):
        output_euler(*make((1, 4, 2, 2, 130)))


def test_opcheck(place):
    with place:
        arguments = make((2, 9, 3, 4, 4), torch.float16, place.device, "channels_last")
        torch.library.opcheck(torch.ops.lpmrf.output_euler.default, arguments)
        arguments = make((2, 9, 3, 4, 8), device=place.device, z_layout="channels_last", bias=False, patch=(2, 2))
        torch.library.opcheck(torch.ops.lpmrf.output_euler.default, arguments)


def test_compiles_and_exports():
    class Step(torch.nn.Module):
        def forward(self, x, norm_weight, weight, z):
            return euler_step(output_euler(x, norm_weight, EPS, weight, None, z, DT), z, 1.0)

    x, norm_weight, _, weight, _, z, *_ = make((2, 9, 3, 4, 4), z_layout="channels_last")
    inputs = x, norm_weight, weight[:, :, None, None], z
    expected = Step()(*inputs)
    out = torch.compile(Step(), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    batch = torch.export.Dim("batch")
    program = torch.export.export(Step(), inputs, dynamic_shapes=({0: batch}, None, None, {0: batch}))
    more = (x.repeat(2, 1, 1, 1), *inputs[1:3], z.repeat(2, 1, 1, 1))
    assert torch.equal(program.module()(*more), Step()(*more))


def test_autocast_leaves_the_state_alone(place):
    arguments = make((1, 9, 3, 4, 4), torch.bfloat16, place.device)
    with place, torch.autocast(place.device, dtype=torch.bfloat16):
        assert output_euler(*arguments).dtype == torch.float32


def test_gradients_raise():
    x, *rest = make((1, 9, 3, 4, 4))
    with pytest.raises(RuntimeError, match="output_euler"):
        output_euler(x.requires_grad_(), *rest).sum().backward()


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    spy = Spy(module_of("output_euler")._output_euler_fwd_kernel)
    monkeypatch.setattr(module_of("output_euler"), "_output_euler_fwd_kernel", spy)
    with interpreted:
        output_euler(*make((1, 9, 3, 4, 4)))
    assert spy.launches == 1


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    assert "lpmrf_cpp::output_euler" in ops_run(lambda: output_euler(*make((1, 9, 3, 4, 4))))


WRONG = {
    "no norm": ("tl.rsqrt(squares / channels + eps)", "tl.rsqrt(squares * 0 + 1.0)"),
    "the last channels left out of the norm": ("squares += tl.sum", "squares = tl.sum"),
    "no norm weight": ("* norm_weight[:, None]", ""),
    "backwards in time": ("z + dt * v", "z - dt * v"),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(interpreted, module_of, monkeypatch, tmp_path, old, new):
    module, arguments = module_of("output_euler"), make((1, 80, 3, 5, 4))
    right = module._output_euler_fwd_kernel
    with interpreted:
        monkeypatch.setattr(module, "_output_euler_fwd_kernel", mutant(right, old, old, tmp_path))
        assert_value(arguments)
        monkeypatch.setattr(module, "_output_euler_fwd_kernel", mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_value(arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.zeros(9, 3, 4)}, ValueError, r"expected x \(B, C, H, W\)"),
        ({1: torch.zeros(8)}, ValueError, r"norm_weight must be \(9,\), got \(8,\)"),
        ({2: float("nan")}, ValueError, "eps must be finite"),
        ({3: torch.zeros(4, 9, 3, 3)}, ValueError, r"weight \(O, C\) or \(O, C, 1, 1\)"),
        ({4: torch.zeros(5)}, ValueError, r"bias must be \(4,\)"),
        ({5: torch.zeros(1, 1, 6, 8)}, ValueError, r"z must be \(1, 4, 3, 4\), got \(1, 1, 6, 8\)"),
        ({6: float("inf")}, ValueError, "dt must be finite, got inf"),
        ({7: (3, 1)}, ValueError, "4 outputs are no patches of 3 x 1 pixels"),
        ({5: torch.zeros(1, 4, 3, 4).half()}, TypeError, "z must be float32 or float64"),
        ({3: torch.zeros(4, 9).long()}, TypeError, "weight must have a float dtype"),
        ({1: torch.zeros(9, device="meta")}, ValueError, "one device"),
    ],
)
def test_refuses(change, error, words):
    arguments = list(make((1, 9, 3, 4, 4)))
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=words):
        output_euler(*arguments)
