"""add_source_noise: z + noise_std · ε, ε keyed by the photo's seed and counted by the logical index in (C, H, W)."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, Spy, arrange, far_apart, guarded_outputs, mutant, ops_run

from lpmrf_kernels import add_source_noise, reference, registry, source_noise, use_backend
from lpmrf_kernels._triton import jit, tl

_module = importlib.import_module("lpmrf_kernels.add_source_noise")
_philox_block, _box_muller = _module._philox_block, _module._box_muller  # a kernel calls what its own file names

SHAPES = {
    "latent": (2, 16, 8, 8),
    "pixels": (1, 3, 32, 24),
    "one": (1, 1, 1, 1),
    "prime": (3, 5, 7, 11),
    "past one tile": (2, 3, 19, 23),
    "no photo": (0, 4, 8, 8),
    "no pixel": (2, 4, 0, 8),
}
Z_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, -1, 2**40 + 3, -(2**63), 2**63 - 1, 12345)
STD = 0.1


def make(shape, dtype=torch.float32, device="cpu", layout="contiguous"):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([SEEDS[b % len(SEEDS)] for b in range(shape[0])], dtype=torch.int64, device=device)
    return arrange(z.to(device, dtype), layout), seeds


def assert_value(z, seeds, std=STD):
    """Against the reference's ε, which comes from float64: 1e-6 for ε, and the roundings of one addition."""
    out = add_source_noise(z, std, seeds)
    exact = z.double() + std * source_noise(z.shape, seeds).double()
    assert out.dtype == torch.float32 and out.shape == z.shape and out.device == z.device
    assert out.stride() == torch.empty_like(z, dtype=torch.float32).stride()
    assert ((out - exact).abs() <= 1e-6 * abs(std) + 2.0**-23 * (exact.abs() + abs(std))).all()


# ---- the definition


KNOWN = [  # Random123's kat_vectors, philox4x32 10
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox4x32-10 in Python's integers, written apart from the library's."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox_4x32_10([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(map(int, words)) == expected == philox(counter, key)


def test_noise_is_what_the_docstring_defines():
    shape, seed = (1, 3, 5, 7), 2**40 - 77
    noise = source_noise(shape, [seed]).flatten()
    for i in range(noise.numel()):
        x = philox((i // 4, 0, 0, 0), (seed % 2**32, seed // 2**32 % 2**32))
        a, b = x[i % 4 // 2 * 2 :][:2]
        u, w = (a // 256 + 1) / 2**24, b // 256 / 2**24
        circle = math.sin if i % 2 else math.cos
        assert noise[i].item() == pytest.approx(math.sqrt(-2 * math.log(u)) * circle(2 * math.pi * w), abs=2.4e-7)


@jit
def _words_kernel(seeds_ptr, k_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x0, x1, x2, x3 = _philox_block(tl.load(seeds_ptr + tl.program_id(0)), tl.load(k_ptr + i))
    out_ptr += (tl.program_id(0) * COUNT + i) * 4
    tl.store(out_ptr, x0.to(tl.int64))
    tl.store(out_ptr + 1, x1.to(tl.int64))
    tl.store(out_ptr + 2, x2.to(tl.int64))
    tl.store(out_ptr + 3, x3.to(tl.int64))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_makes_the_same_integers(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := registry.unavailable("triton", device):
        pytest.skip(reason)
    k = [0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**60]
    words = torch.empty(len(SEEDS), len(k), 4, dtype=torch.int64, device=device)
    tensors = (torch.tensor(t, dtype=torch.int64, device=device) for t in (SEEDS, k))
    _words_kernel[(len(SEEDS),)](*tensors, words, COUNT=len(k))
    expected = [[philox((n % 2**32, n >> 32, 0, 0), (s % 2**32, (s >> 32) % 2**32)) for n in k] for s in SEEDS]
    assert words.tolist() == [[list(x) for x in row] for row in expected]


@jit
def _box_muller_kernel(a_ptr, b_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = _box_muller(tl.load(a_ptr + offs).to(tl.uint32), tl.load(b_ptr + offs).to(tl.uint32))
    tl.store(x_ptr + offs, x)
    tl.store(y_ptr + offs, y)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_normals_to_1e_6_where_it_is_hardest(device):
    """u near 0 and near 1, where a logarithm is steep and where it cancels, and all around the circle."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := registry.unavailable("triton", device):
        pytest.skip(reason)
    n = 2**14
    low, high = torch.arange(n), 2**24 - 1 - torch.arange(n)
    anywhere = torch.randint(2**24, (2 * n,), generator=torch.Generator().manual_seed(0))
    a = torch.cat([low, high, anywhere, torch.zeros(2 * n, dtype=torch.int64)]) << 8
    b = torch.cat([anywhere, anywhere.flip(0), low, high]) << 8
    a, b = a.to(device), b.to(device)
    x, y = torch.empty(2, len(a), device=device)
    _box_muller_kernel[(len(a) // 4096,)](a, b, x, y, BLOCK=4096)
    for actual, exact in zip((x, y), reference.box_muller(a, b), strict=True):
        assert (actual - exact).abs().max() < 1e-6


def test_moments():
    noise = source_noise((4, 16, 64, 64), [1, 2, 3, 4]).double()
    n = noise.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - expected) < 4 * math.sqrt(variance / n)
    assert 4 < noise.abs().max() < 5.77
    # no correlation between neighbours within a block of four, across it, between photos, nor between squares
    flat = noise.flatten(1)
    for a, b in [(flat[:, k:], flat[:, :-k]) for k in (1, 2, 3, 4, 64)] + [(flat[1:], flat[:-1])]:
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 4 * 2 / math.sqrt(a.numel())


# ---- values


@pytest.mark.parametrize("dtype", Z_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value(place, shape, dtype, poisoned_memory):
    with place:
        assert_value(*make(shape, dtype, place.device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, poisoned_memory):
    z, seeds = make((3, 5, 7, 6), torch.bfloat16, place.device, layout)
    with place:
        assert_value(z, seeds)
        assert_value(z, seeds.repeat_interleave(2)[::2])


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(0, n) for n in (3, 6, 9, 9)]),
    layout=st.sampled_from(LAYOUTS[:-1]),
    dtype=st.sampled_from(Z_DTYPES),
    std=st.floats(0, 2, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    backend=st.sampled_from(("triton", "cpp")),
)
def test_random_shapes(shape, layout, dtype, std, seed, backend):
    z, seeds = make(shape, dtype, layout=layout)
    seeds[:1] = seed
    if registry.unavailable(backend, "cpu"):
        backend = "torch"
    with use_backend(backend):
        assert_value(z, seeds, std)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_of_a_photo_is_its_own(place, layout):
    """Bit for bit: alone, in another order, at another place of the batch, in another layout."""
    z, seeds = make((4, 5, 7, 9), device=place.device)
    with place:
        together = add_source_noise(z, STD, seeds)
        order = torch.tensor([2, 0, 3, 1], device=place.device)
        shuffled = add_source_noise(arrange(z[order], layout), STD, seeds[order])
        assert torch.equal(shuffled, together[order])
        for b in range(4):
            assert torch.equal(add_source_noise(arrange(z[b : b + 1], layout), STD, seeds[b : b + 1])[0], together[b])
        assert torch.equal(*add_source_noise(z[:1].expand(2, -1, -1, -1), STD, seeds[:1].expand(2)))


def test_writes_its_output_only(place, monkeypatch):
    if place.backend == "torch":
        pytest.skip("PyTorch's own kernels")
    for layout in ("contiguous", "channels_last"):
        with place, guarded_outputs(monkeypatch):
            z, seeds = make((2, 3, 7, 11), device=place.device, layout=layout)
            out = add_source_noise(z, STD, seeds)
        assert (out - reference.add_source_noise(z, STD, seeds)).abs().max() < 1e-6


def test_not_finite_stays_where_it_is(place):
    z, seeds = make((2, 3, 4, 5), device=place.device)
    z[0, 1, 2, 3], z[1, 0, 0, 0] = torch.nan, -torch.inf
    with place:
        out = add_source_noise(z, STD, seeds)
    assert torch.equal(out.isfinite(), z.isfinite())


def test_no_noise_is_a_cast(place):
    z, seeds = make((2, 3, 4, 5), torch.bfloat16, place.device)
    with place:
        assert torch.equal(add_source_noise(z, 0.0, seeds), z.float())


def test_addresses_past_2_to_the_31(place):
    z = far_apart(place.device)
    z[0], z[1] = 1, 2
    with place:
        assert_value(z, torch.tensor([3, 4], device=place.device))


def test_float64_is_the_references():
    z, seeds = make((2, 3, 4, 5), torch.float64)
    before = sum(registry.fallbacks().values())
    assert torch.equal(add_source_noise(z, STD, seeds), reference.add_source_noise(z, STD, seeds))
    assert sum(registry.fallbacks().values()) == before + 1


# ---- gradients, and as a torch op


@pytest.mark.parametrize("dtype", (*Z_DTYPES, torch.float64), ids=str)
def test_gradient_is_a_cast(dtype):
    z, seeds = make((2, 3, 4, 5), dtype)
    g = torch.randn(z.shape)
    (dz,) = torch.autograd.grad(add_source_noise(z.requires_grad_(), STD, seeds), z, g)
    assert dz.dtype == dtype and torch.equal(dz, g.to(dtype))


def test_opcheck(place):
    op = torch.ops.lpmrf.add_source_noise.default
    with place:
        z, seeds = make((2, 3, 4, 5), torch.float16, place.device)
        torch.library.opcheck(op, (z.requires_grad_(), STD, seeds))
        z, seeds = make((2, 3, 4, 5), torch.float32, place.device, "channels_last")
        torch.library.opcheck(op, (z, STD, seeds))


def test_compiles_without_a_break(place):
    def source(z, seeds):
        return add_source_noise(z * 2, STD, seeds) + 1

    compiled = torch.compile(source, fullgraph=True, backend="aot_eager")
    z, seeds = make((2, 3, 4, 5), device=place.device, layout="channels_last")
    z.requires_grad_()
    with place:
        out, expected = compiled(z, seeds), source(z, seeds)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        (gradient,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(gradient, torch.full_like(z, 2))


def test_exports_with_a_dynamic_batch():
    class Source(torch.nn.Module):
        def forward(self, z, seeds):
            return add_source_noise(z, STD, seeds)

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Source(), make((2, 3, 4, 4)), dynamic_shapes=(batch, batch))
    assert "lpmrf.add_source_noise" in str(program.graph)
    inputs = make((5, 3, 4, 4))
    assert torch.equal(program.module()(*inputs), add_source_noise(inputs[0], STD, inputs[1]))


def test_autocast_leaves_it_alone(place):
    z, seeds = make((2, 3, 4, 5), torch.float32, place.device)
    with place, torch.autocast(place.device, dtype=torch.bfloat16):
        assert_value(z, seeds)


# ---- that it was the kernel


def test_triton_really_runs(interpreted, module_of, monkeypatch):
    spy = Spy(module_of("add_source_noise")._add_source_noise_fwd_kernel)
    monkeypatch.setattr(module_of("add_source_noise"), "_add_source_noise_fwd_kernel", spy)
    with interpreted:
        assert_value(*make((1, 2, 3, 4)))
    assert spy.launches == 1


def test_cpp_really_runs():
    if reason := registry.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    z, seeds = make((1, 2, 3, 4))
    assert "lpmrf_cpp::add_source_noise" in ops_run(lambda: add_source_noise(z, STD, seeds))


WRONG = {
    "one seed for all": ("seeds_ptr + pid_b * stride_seeds", "seeds_ptr"),
    "the next block": ("_philox_block(tl.load(seeds_ptr + pid_b * stride_seeds), k)", "_philox_block(pid_b, k + 1)"),
    "pairs mixed up": ("_box_muller(x0, x1)", "_box_muller(x0, x2)"),
    "lanes mixed up": ("tl.join(n0, n2), tl.join(n1, n3)", "tl.join(n0, n1), tl.join(n2, n3)"),
    "counted in memory order": ("w = i % width", "w = i % height"),
    "variance for deviation": ("noise_std * noise,", "noise_std * noise_std * noise,"),
}


@pytest.mark.parametrize(("old", "new"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_fails_the_value_check(interpreted, module_of, monkeypatch, tmp_path, old, new):
    module = module_of("add_source_noise")
    inputs = make((2, 3, 19, 23), layout="channels_last")
    right = module._add_source_noise_fwd_kernel
    with interpreted:
        for same in (right, mutant(right, old, old, tmp_path)):  # so that what fails below is the change
            monkeypatch.setattr(module, "_add_source_noise_fwd_kernel", same)
            assert_value(*inputs)
        monkeypatch.setattr(module, "_add_source_noise_fwd_kernel", mutant(right, old, new, tmp_path))
        with pytest.raises(AssertionError):
            assert_value(*inputs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0000714765e-1", "2.1e-1"),
        ("(a >> 8).to(tl.int32) + 1", "(a >> 8).to(tl.int32) + 2"),
        ("& 2) != 0, -y", "& 1) != 0, -y"),
    ],
)
def test_a_wrong_normal_fails_the_value_check(interpreted, module_of, monkeypatch, tmp_path, old, new):
    module = module_of("add_source_noise")
    wrong = mutant(module._box_muller, old, new, tmp_path)
    monkeypatch.setattr(module, "_box_muller", wrong)
    with interpreted, pytest.raises(AssertionError):
        assert_value(*make((2, 3, 19, 23)))


# ---- errors


SEED = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("z", "seeds", "error", "words"),
    [
        (torch.zeros(2, 3, 4), SEED, ValueError, r"\(B, C, H, W\), got the shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, 4, 4), SEED[:1], ValueError, r"expected the shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 3, 4, 4), SEED.int(), TypeError, r"int64, got torch.int32; call seeds.long\(\)"),
        (torch.zeros(2, 3, 4, 4).byte(), SEED, TypeError, "float dtype, got torch.uint8"),
        (torch.zeros(2, 3, 4, 4), SEED.to("meta"), ValueError, "one device"),
    ],
)
def test_refuses(z, seeds, error, words):
    with pytest.raises(error, match=words):
        add_source_noise(z, STD, seeds)


def test_refuses_a_standard_deviation_that_is_no_number():
    with pytest.raises(ValueError, match="noise_std must be finite, got inf"):
        add_source_noise(torch.zeros(2, 3, 4, 4), float("inf"), SEED)


def test_source_noise_wants_one_seed_a_photo():
    with pytest.raises(ValueError, match=r"one seed a photo, expected the shape \(2,\), got \(3,\)"):
        source_noise((2, 3, 4, 4), [1, 2, 3])
    assert source_noise((2, 1, 2, 2), torch.tensor([1, 2])).dtype == torch.float32
