"""to_uint8 and from_uint8: the same bits as PyTorch's own passes, any layout on either side, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Spy, arrange, guarded_outputs, mutant, ops_run

from lpmrf_kernels import from_uint8, registry, to_uint8, use_backend

SHAPES = {
    "photo": (2, 3, 16, 12),
    "one": (1, 1, 1, 1),
    "prime": (3, 5, 7, 11),
    "past one tile": (1, 3, 37, 41),
    "many channels": (1, 19, 3, 2),
    "no photo": (0, 3, 8, 8),
    "no pixel": (2, 3, 0, 8),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RANGES = ((0.0, 1.0), (-1.0, 1.0))
FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)


def make(shape, dtype=torch.float32, device="cpu", layout="contiguous", value_range=(0.0, 1.0)):
    """A little beyond the range, halves between two levels among them."""
    low, high = value_range
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    halves = (torch.arange(x.numel()).view(shape) % 256 + 0.5) / 255
    x = torch.where(torch.arange(x.numel()).view(shape) % 3 == 0, halves, x) * (high - low) + low
    return arrange(x.to(device, dtype), layout)


def make_bytes(shape, device="cpu", layout="contiguous"):
    x = (torch.arange(torch.Size(shape).numel()) * 7 % 256).view(shape).float()
    return arrange(x, layout).to(device, torch.uint8)


def strides(x, dtype, memory_format):
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format).stride()


def assert_to(x, value_range=(0.0, 1.0), memory_format=torch.preserve_format):
    """Bit for bit what PyTorch makes of the float32 values, pass by pass."""
    low, high = value_range
    out = to_uint8(x, value_range, memory_format)
    expected = ((x.float() - low) * (255 / (high - low))).nan_to_num(nan=0).clamp(0, 255).round().to(torch.uint8)
    assert out.dtype == torch.uint8 and out.device == x.device
    assert out.stride() == strides(x, torch.uint8, memory_format)
    assert torch.equal(out, expected)


def assert_from(x, value_range=(0.0, 1.0), dtype=torch.float32, memory_format=torch.preserve_format):
    low, high = value_range
    out = from_uint8(x, value_range, dtype, memory_format)
    expected = (x.float() / 255 * (high - low) + low).to(dtype)
    assert out.dtype == dtype and out.device == x.device
    assert out.stride() == strides(x, dtype, memory_format)
    if out.device.type == "cpu" and registry.forced_backend() == "triton" and dtype == torch.bfloat16:
        expected, limit = expected.float(), 2.0**-7  # the interpreter truncates
        assert ((out.float() - expected).abs() <= limit * expected.abs()).all()
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value(place, shape, dtype, poisoned_memory):
    with place:
        for value_range in RANGES:
            assert_to(make(shape, dtype, place.device, value_range=value_range), value_range)
            assert_from(make_bytes(shape, place.device), value_range, dtype)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, memory_format, poisoned_memory):
    shape = (2, 3, 5, 7)
    with place:
        assert_to(make(shape, torch.bfloat16, place.device, layout), memory_format=memory_format)
        assert_from(make_bytes(shape, place.device, layout), memory_format=memory_format)


def test_a_photo_as_picture_files_hold_it(place):
    photo = make_bytes((5, 7, 3, 1)).squeeze(-1).to(place.device)  # (H, W, 3)
    with place:
        x = from_uint8(photo.permute(2, 0, 1)[None], (-1, 1), memory_format=torch.contiguous_format)
        assert x.is_contiguous() and x.amin() == -1
        back = to_uint8(x, (-1, 1), torch.channels_last)[0].permute(1, 2, 0)
    assert back.is_contiguous() and torch.equal(back, photo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value_range", RANGES)
def test_every_level_comes_back(dtype, value_range):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(x, value_range, dtype), value_range), x)


def test_not_finite(place):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, 1e30, -1e30]).view(1, 1, 1, 6).to(place.device)
    with place:
        assert to_uint8(x).flatten().tolist() == [0, 255, 0, 128, 255, 0]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(0, n) for n in (2, 6, 9, 9)]),
    layout=st.sampled_from(LAYOUTS[:-1]),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(FLOATS),
    backend=st.sampled_from(("triton", "cpp")),
)
def test_random_shapes(shape, layout, memory_format, dtype, backend):
    if registry.unavailable(backend, "cpu"):
        backend = "torch"
    with use_backend(backend):
        assert_to(make(shape, dtype, layout=layout), (-1, 1), memory_format)
        assert_from(make_bytes(shape, layout=layout), (-1, 1), dtype, memory_format)


def test_writes_its_output_only(place, monkeypatch):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "transposed"):
        with place, guarded_outputs(monkeypatch):
            from_uint8(make_bytes((1, 3, 19, 23), place.device, layout))


def test_addresses_past_2_to_the_31(place):
    try:
        room = torch.empty(2**31 + 4, dtype=torch.uint8, device=place.device)
    except RuntimeError:
        pytest.skip("2.1 GB of address space are not there")
    x = room.as_strided((2, 1, 1, 4), (2**31, 4, 4, 1))
    x[0], x[1] = 51, 255
    with place:
        assert from_uint8(x)[:, 0, 0, 3].tolist() == [torch.tensor(51 / 255).item(), 1.0]


def test_other_floats_are_the_references():
    before = sum(registry.fallbacks().values())
    x = make((1, 3, 4, 5), torch.float64)
    assert torch.equal(to_uint8(x), (x * 255).clamp(0, 255).round().to(torch.uint8))
    assert from_uint8(make_bytes((1, 3, 4, 5)), dtype=torch.float64).dtype == torch.float64
    assert sum(registry.fallbacks().values()) == before + 2


def test_opcheck(place):
    with place:
        x = make((2, 3, 4, 5), torch.float16, place.device, "channels_last")
        torch.library.opcheck(torch.ops.lpmrf.to_uint8.default, (x, -1.0, 1.0, "contiguous"))
        x = make_bytes((2, 3, 4, 5), place.device)
        torch.library.opcheck(torch.ops.lpmrf.from_uint8.default, (x, 0.0, 1.0, torch.float16, "channels_last"))


def test_compiles_and_exports():
    class There(torch.nn.Module):
        def forward(self, x):
            return to_uint8(1 - from_uint8(x, (-1, 1)), (-1, 1), torch.channels_last)

    x = make_bytes((2, 3, 4, 4))
    compiled = torch.compile(There(), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, There()(x)) and compiled.stride() == There()(x).stride()
    program = torch.export.export(There(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = make_bytes((5, 3, 4, 4))
    assert torch.equal(program.module()(more), There()(more))


def test_no_gradient_is_asked_for():
    assert not to_uint8(torch.rand(1, 3, 2, 2, requires_grad=True)).requires_grad


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    module = module_of("uint8")
    spies = [Spy(module._to_uint8_fwd_kernel), Spy(module._from_uint8_fwd_kernel)]
    monkeypatch.setattr(module, "_to_uint8_fwd_kernel", spies[0])
    monkeypatch.setattr(module, "_from_uint8_fwd_kernel", spies[1])
    with interpreted:
        to_uint8(from_uint8(make_bytes((1, 3, 4, 5))))
    assert [spy.launches for spy in spies] == [1, 1]


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    seen = ops_run(lambda: to_uint8(from_uint8(make_bytes((1, 3, 4, 5)))))
    assert {"lpmrf_cpp::to_uint8", "lpmrf_cpp::from_uint8"} <= seen


WRONG = {
    "cut, not rounded": ("8388608.0", "8388607.5"),
    "no clamp above": ("x < 255.0, x, 255.0", "x < 255.0, x, x"),
    "no shift": (".to(tl.float32) - low", ".to(tl.float32)"),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(interpreted, module_of, monkeypatch, tmp_path, old, new):
    module, x = module_of("uint8"), make((1, 3, 19, 23), layout="channels_last", value_range=(-1, 1))
    right = module._to_uint8_fwd_kernel
    with interpreted:
        monkeypatch.setattr(module, "_to_uint8_fwd_kernel", mutant(right, old, old, tmp_path))
        assert_to(x, (-1, 1), torch.contiguous_format)
        monkeypatch.setattr(module, "_to_uint8_fwd_kernel", mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_to(x, (-1, 1), torch.contiguous_format)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: to_uint8(torch.zeros(3, 4, 4)), ValueError, r"to_uint8: x must be \(B, C, H, W\), got the shape"),
        (lambda: to_uint8(torch.zeros(1, 3, 4, 4).long()), TypeError, "float dtype, got torch.int64"),
        (lambda: to_uint8(torch.zeros(1, 3, 4, 4), (1, 0)), ValueError, "value_range must be finite and increase"),
        (lambda: to_uint8(torch.zeros(1, 3, 4, 4), (0, torch.inf)), ValueError, "value_range must be finite"),
        (lambda: from_uint8(torch.zeros(1, 3, 4, 4)), TypeError, "x must be uint8, got torch.float32"),
        (lambda: from_uint8(make_bytes((1, 3, 4, 4)), dtype=torch.int32), TypeError, "float dtype, got torch.int32"),
        (
            lambda: from_uint8(make_bytes((1, 3, 4, 4)), memory_format=torch.channels_last_3d),
            ValueError,
            "memory_format must be one of",
        ),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()
