"""Noise of the restoration's source: z + noise_std · ε, ε standard normal from Philox4x32-10.

Shapes      z (B, C, H, W), seeds (B,); the result like z.
Dtypes      z any float, seeds int64; the result is float32, where the ODE starts.
Layouts     z is read with its own strides, nothing is copied; the result has z's memory format.
Traffic     numel · (sizeof(z) + 4) bytes, one pass; ε is never in memory. PyTorch makes four (ε, scale, upcast, add).
Fallback    The kernels take float32, bfloat16 and float16 z; other floats go to the reference and are counted.
Source      Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), Random123's philox4x32-10; Box & Muller
            1958. The logarithm and the circle: polynomials of Cephes' logf, sinf and cosf (S. Moshier).

ε, exactly. A photo's seed s gives the key (s mod 2³², ⌊s / 2³²⌋ mod 2³²). Element i of the photo, counted in logical
(C, H, W) order, belongs to block k = ⌊i / 4⌋, whose counter is (k mod 2³², ⌊k / 2³²⌋, 0, 0). The four outputs x₀…x₃
make two pairs, (x₀, x₁) for elements 4k and 4k + 1, (x₂, x₃) for 4k + 2 and 4k + 3. A pair (a, b) becomes

    u = (⌊a / 2⁸⌋ + 1) / 2²⁴ in (0, 1]      w = ⌊b / 2⁸⌋ / 2²⁴ in [0, 1)
    r = √(-2 ln u)                          ε = r cos 2πw, then r sin 2πw

24 bits are what a float32 holds exactly: u and w are the same on every machine, u is never 0, |ε| ≤ 5.77. So a photo
gets the same noise in any batch, order, layout, backend or machine: the integers bit for bit, ε to 1e-6. The reference
computes ε in float64; the kernels share one float32 recipe, because a device's own log and sin may be approximations:
near u = 1 they lose more than 1e-6. The angle is reduced to ±π/4 on the integer, where that is exact. Over all 2²⁴
values of u, and of w at the largest r, the recipe is within 8.3e-7 of the float64 one.
"""

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .launch import choices, launch_config
from .layout import laid_out_like
from .registry import CompileCase, Kernel, Op, register, run

Z_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---- kernel


@jit
def _box_muller(a, b):
    # ln u: u = 2^e · (1 + f) with f in [√½ - 1, √2 - 1], both from the bits of the float
    n = ((a >> 8).to(tl.int32) + 1).to(tl.float32)
    bits = n.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is √½
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e = (e - 24).to(tl.float32)
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    log_u = f + (p * f * f * f - 2.12194440e-4 * e - 0.5 * f * f) + 0.693359375 * e
    r = tl.sqrt_rn(-2.0 * log_u)

    # the circle: quadrant and an angle within ±π/4
    m = (b >> 8).to(tl.int32)
    quadrant = (m + 0x200000) >> 22
    t = (m - (quadrant << 22)).to(tl.float32) * 3.7450703e-07  # (π/2) / 2^22
    t2 = t * t
    sin = ((-1.9515295891e-4 * t2 + 8.3321608736e-3) * t2 - 1.6666654611e-1) * t2 * t + t
    cos = ((2.443315711809948e-5 * t2 - 1.388731625493765e-3) * t2 + 4.166664568298827e-2) * t2 * t2 - 0.5 * t2 + 1.0
    swap = (quadrant & 1) != 0
    x = tl.where(swap, sin, cos)
    y = tl.where(swap, cos, sin)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return r * x, r * y


@jit
def _philox_block(seed, k):
    """The four integers of block k (int64), Philox4x32-10."""
    c0 = (k & 0xFFFFFFFF).to(tl.uint32)
    c1 = (k >> 32).to(tl.uint32)
    return tl.philox(seed, c0, c1, c0 * 0, c0 * 0)


@jit
def _add_source_noise_fwd_kernel(
    z_ptr,
    seeds_ptr,
    out_ptr,
    numel,  # of one photo
    height,
    width,
    stride_seeds,
    stride_zb,
    stride_zc,
    stride_zh,
    stride_zw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    noise_std,
    FLAT: tl.constexpr,  # within a photo, z and out are contiguous
    BLOCK: tl.constexpr,
):
    blocks_per_photo = tl.cdiv(numel, 4 * BLOCK)
    pid = tl.program_id(0)
    pid_b = (pid // blocks_per_photo).to(tl.int64)
    k = (pid % blocks_per_photo).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x0, x1, x2, x3 = _philox_block(tl.load(seeds_ptr + pid_b * stride_seeds), k)
    n0, n1 = _box_muller(x0, x1)
    n2, n3 = _box_muller(x2, x3)
    noise = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK, 4))  # rows n0 n1 n2 n3

    i = k[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
    mask = i < numel
    if FLAT:
        offs_z = i
        offs_o = i
    else:
        w = i % width
        h = i // width % height
        c = i // width // height
        offs_z = c * stride_zc + h * stride_zh + w * stride_zw
        offs_o = c * stride_oc + h * stride_oh + w * stride_ow
    z = tl.load(z_ptr + pid_b * stride_zb + offs_z, mask=mask).to(tl.float32)
    tl.store(out_ptr + pid_b * stride_ob + offs_o, z + noise_std * noise, mask=mask)


# ---- launchers


def _launch_add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    out = torch.empty_like(z, dtype=torch.float32)
    if z.numel():
        photos, _, height, width = z.shape
        numel = z[0].numel()
        config = launch_config("add_source_noise", z.device, {"BLOCK": 256, "num_warps": 4}, numel=numel)
        flat = z[0].is_contiguous() and out[0].is_contiguous()
        grid = (photos * triton.cdiv(numel, 4 * config["BLOCK"]),)
        with torch.cuda.device_of(z):
            _add_source_noise_fwd_kernel[grid](
                z, seeds, out, numel, height, width, seeds.stride(0), *z.stride(), *out.stride(), noise_std,
                FLAT=flat, **config,
            )  # fmt: skip
    return out


def _cpp_add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    out = torch.empty_like(z, dtype=torch.float32)
    torch.ops.lpmrf_cpp.add_source_noise(z, noise_std, seeds, out)
    return out


def _torch_add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    return laid_out_like(reference.add_source_noise(z, noise_std, seeds), z)


def _refuses(z: Tensor, noise_std: float, seeds: Tensor) -> str | None:
    return None if z.dtype in Z_DTYPES else f"the kernel takes a float32, bfloat16 or float16 z, not {z.dtype}"


def _compile_cases() -> list[CompileCase]:
    ints = ("numel", "height", "width", "stride_seeds", *(f"stride_{t}{d}" for t in "zo" for d in "bchw"))
    return [
        CompileCase(
            f"{dtype} z, {'flat' if flat else 'strided'}",
            _add_source_noise_fwd_kernel,
            {
                "z_ptr": f"*{dtype}",
                "seeds_ptr": "*i64",
                "out_ptr": "*fp32",
                **dict.fromkeys(ints, "i64"),
                "noise_std": "fp32",
            },
            {"FLAT": flat, "BLOCK": 256},
            raced=dtype == "fp32" and not flat,
        )
        for dtype in Z_DTYPES.values()
        for flat in (True, False)
    ]


def _tune_inputs(device):
    for batch in (1, 8, 32):  # latents of 512x512 photos
        yield (
            torch.randn(batch, 16, 64, 64, device=device).contiguous(memory_format=torch.channels_last),
            0.1,
            torch.arange(batch, device=device),
        )


# ---- registration

register(
    Op(
        "add_source_noise",
        forward={
            "triton": Kernel(_launch_add_source_noise, _refuses),
            "cpp": Kernel(_cpp_add_source_noise, _refuses),
            "torch": Kernel(_torch_add_source_noise),
        },
        notes={"backward": "it is a cast of g to z's dtype"},
        compile_cases=_compile_cases,
        candidates={"add_source_noise": choices(BLOCK=(64, 128, 256, 512), num_warps=(2, 4, 8))},
        tune_inputs=_tune_inputs,
    )
)


def _check(z: Tensor, seeds: Tensor) -> None:
    if not z.dtype.is_floating_point:
        raise TypeError(f"add_source_noise: z must have a float dtype, got {z.dtype}")
    if z.dim() != 4:
        raise ValueError(f"add_source_noise: z must be (B, C, H, W), got the shape {tuple(z.shape)}")
    if seeds.dtype != torch.int64:
        raise TypeError(f"add_source_noise: seeds must be int64, got {seeds.dtype}; call seeds.long()")
    if seeds.dim() != 1 or seeds.shape[0] != z.shape[0]:
        raise ValueError(
            f"add_source_noise: one seed a photo, expected the shape ({z.shape[0]},), got {tuple(seeds.shape)}"
        )
    if seeds.device != z.device:
        raise ValueError(f"add_source_noise: z and seeds must be on one device, got {z.device} and {seeds.device}")


@torch.library.custom_op("lpmrf::add_source_noise", mutates_args=())
def _add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    _check(z, seeds)
    return run("add_source_noise", z, noise_std, seeds)


@_add_source_noise.register_fake
def _(z, noise_std, seeds):
    _check(z, seeds)
    return torch.empty_like(z, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.z_dtype = inputs[0].dtype


def _backward(ctx, g):
    return g.to(ctx.z_dtype), None, None


_add_source_noise.register_autograd(_backward, setup_context=_setup_context)
# No autocast rule, as for euler_step: the op takes the dtypes that it is given.


# ---- public


def add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    """The ODE's source z + noise_std · ε: the same ε for a photo in any batch, order, layout, backend or machine.

    z: (B, C, H, W) source in latent or pixel units, any float dtype and memory format. noise_std: in the same units.
    seeds: (B,) int64, one a photo, on z's device. ε is Philox4x32-10 keyed by the seed and counted by the logical index
    in (C, H, W); this module's docstring defines it to the bit. Nothing is mutated.
    Returns a new float32 tensor in z's memory format. The gradient of z is a cast; noise_std and seeds have none.
    Raises TypeError for other dtypes, ValueError for other shapes or devices.
    """
    return torch.ops.lpmrf.add_source_noise(z, noise_std, seeds)
