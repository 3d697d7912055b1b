"""The end of a step of the flow in one: RMSNorm, projection to the velocity, Euler update.

    z + dt · v,    v = weight · (x / sqrt(mean over channels of x² + eps) · norm_weight) + bias     at each pixel

Shapes      x (B, C, H, W), norm_weight (C,), weight (O, C) or a 1x1 convolution's (O, C, 1, 1), bias (O,) or None, z
            and the result (B, O / (p · q), H · p, W · q): a projection to patches of p x q pixels has its outputs in
            the order (row, column, channel), as HDiT's and LooUFormer's, and each is written to its pixel.
            A 3x3 convolution at the end (LooUFormer's other output) is a library's, followed by `euler_step`: each
            of its products needs the norms of nine pixels.
Dtypes      x, weights and bias any float each; z and the result float32: the state is never rounded to x's dtype.
Layouts     x and z are read with their own strides, nothing is copied; the result has z's memory format.
Arithmetic  float32 from the load on, v too is never rounded. The norm's factor of a pixel commutes with the projection,
            so that one pass over x gives both the mean square and the projection. Triton multiplies bfloat16 x in TF32
            (exact for x; of the weights 11 bits count, of a bfloat16 y 8) and the others in float32.
Traffic     numel(x) · sizeof(x) + 8 · numel(z) bytes, one launch; PyTorch makes five to seven passes and launches, the
            normalised x among them.
Backward    None: training compares v itself with its target and takes no Euler step. Gradients raise.
Fallback    The kernels take float32, bfloat16 and float16 x, float32 z, and Triton up to 128 outputs; everything else,
            float64 above all, goes to the reference and is counted.
Source      HDiT's out_norm and patch_out, or LooUFormer's out_norm and proj_out, then the explicit Euler method (see
            `euler_step`). LooUFormer's time runs the other way (sigma = 1 - t, v = source - clean): dt is negative.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .launch import choices, launch_config
from .layout import laid_out_like
from .registry import CompileCase, Kernel, Op, register, run

FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LANES = 16
"""Outputs that the C++ kernel computes at a time: its weights are padded to a multiple."""


# ---- kernel


@jit
def _output_euler_fwd_kernel(
    x_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    out_ptr,
    pixels,  # of one photo
    width,
    channels,
    outputs,
    patch_height,
    patch_width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_zb,
    stride_zc,
    stride_zh,
    stride_zw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    eps,
    dt,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK)
    pid = tl.program_id(0)
    pid_b = (pid // tiles).to(tl.int64)
    p = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask_p = p < pixels
    h = p // width
    w = p % width
    o = tl.arange(0, BLOCK_O)  # [BLOCK_O]
    mask_o = o < outputs
    x_ptr += pid_b * stride_xb + (h * stride_xh + w * stride_xw)[:, None]

    squares = tl.zeros([BLOCK], tl.float32)
    v = tl.zeros([BLOCK, BLOCK_O], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask_c = c < channels
        x = tl.load(x_ptr + (c.to(tl.int64) * stride_xc)[None, :], mask=mask_p[:, None] & mask_c[None, :], other=0.0)
        x = x.to(tl.float32)  # [BLOCK, BLOCK_C]
        squares += tl.sum(x * x, axis=1)
        norm_weight = tl.load(norm_weight_ptr + c, mask=mask_c, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + o[None, :] * channels + c[:, None], mask=mask_c[:, None] & mask_o[None, :], other=0.0
        )
        weight = weight.to(tl.float32) * norm_weight[:, None]  # [BLOCK_C, BLOCK_O]
        v = tl.dot(x, weight, v, input_precision=PRECISION)
    v = v * tl.rsqrt(squares / channels + eps)[:, None]
    if HAS_BIAS:
        v += tl.load(bias_ptr + o, mask=mask_o, other=0.0).to(tl.float32)[None, :]

    mask = mask_p[:, None] & mask_o[None, :]
    state_channels = outputs // (patch_height * patch_width)
    o = o.to(tl.int64)[None, :]
    c = o % state_channels
    y = h[:, None] * patch_height + o // state_channels // patch_width
    x = w[:, None] * patch_width + o // state_channels % patch_width
    offs_z = pid_b * stride_zb + c * stride_zc + y * stride_zh + x * stride_zw
    offs_o = pid_b * stride_ob + c * stride_oc + y * stride_oh + x * stride_ow
    z = tl.load(z_ptr + offs_z, mask=mask)
    tl.store(out_ptr + offs_o, z + dt * v, mask=mask)


# ---- launchers


def _default(dtype: torch.dtype, outputs: int) -> dict[str, int]:
    """Small tiles: a single latent of 64x64 should fill a GPU, and float32 products are made in registers."""
    if dtype == torch.float32:
        return {"BLOCK": 32, "BLOCK_C": 32, "num_warps": 4 if outputs <= 32 else 8}
    return {"BLOCK": 32, "BLOCK_C": 64, "num_warps": 4}


def _block_o(outputs: int) -> int:
    return max(16, 1 << (outputs - 1).bit_length())


def _launch_output_euler(x, norm_weight, eps, weight, bias, z, dt, patch):
    out = torch.empty_like(z)
    photos, channels, height, width = x.shape
    outputs, pixels = weight.shape[0], height * width
    if out.numel():
        sizes = {"pixels": photos * pixels, "channels": channels, "bits": 8 * x.element_size()}
        config = launch_config("output_euler", x.device, _default(x.dtype, outputs), **sizes)
        with torch.cuda.device_of(x):
            _output_euler_fwd_kernel[(photos * triton.cdiv(pixels, config["BLOCK"]),)](
                x, norm_weight.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous(), z, out,
                pixels, width, channels, outputs, *patch, *x.stride(), *z.stride(), *out.stride(), eps, dt,
                HAS_BIAS=bias is not None, PRECISION="tf32" if x.dtype == torch.bfloat16 else "ieee",
                BLOCK_O=_block_o(outputs), **config,
            )  # fmt: skip
    return out


def _cpp_output_euler(x, norm_weight, eps, weight, bias, z, dt, patch):
    out = torch.empty_like(z)
    room = -weight.shape[0] % LANES
    folded = F.pad((weight.float() * norm_weight.float()).T, (0, room)).contiguous()
    bias = folded.new_zeros(folded.shape[1]) if bias is None else F.pad(bias.float(), (0, room))
    torch.ops.lpmrf_cpp.output_euler(x, folded, bias, z, eps, dt, *patch, out)
    return out


def _torch_output_euler(x, norm_weight, eps, weight, bias, z, dt, patch):
    return laid_out_like(reference.output_euler(x, norm_weight, eps, weight, bias, z, dt, patch), z)


def _refuses(x, norm_weight, eps, weight, bias, z, dt, patch) -> str | None:
    if z.dtype != torch.float32:
        return f"the kernel keeps the state in float32, z is {z.dtype}"
    for t in (x, norm_weight, weight, bias):
        if t is not None and t.dtype not in FLOATS:
            return f"the kernel takes float32, bfloat16 or float16, not {t.dtype}"
    return None


def _triton_refuses(x, norm_weight, eps, weight, *rest) -> str | None:
    reason = _refuses(x, norm_weight, eps, weight, *rest)
    return reason or ("the kernel makes up to 128 outputs" if weight.shape[0] > 128 else None)


def _compile_cases() -> list[CompileCase]:
    """A latent's 16 channels, and HDiT's patches of 4x4 pixels."""
    sizes = ("pixels", "width", "channels", "outputs", *(f"stride_{t}{d}" for t in "xzo" for d in "bchw"))
    cases = []
    for torch_dtype, dtype in FLOATS.items():
        for label, axis, patch, outputs in (
            ("channels-last", "c", 1, 16),
            ("planes", "w", 1, 16),
            ("patches", "c", 4, 48),
        ):
            default = _default(torch_dtype, outputs)
            warps = default.pop("num_warps")
            ones = [f"stride_{t}{axis}" for t in "xzo"] + ["patch_height", "patch_width"] * (patch == 1)
            numbers = [name for name in (*sizes, "patch_height", "patch_width") if name not in ones]
            signature = {
                **{f"{name}_ptr": f"*{dtype}" for name in ("x", "norm_weight", "weight", "bias")},
                "z_ptr": "*fp32",
                "out_ptr": "*fp32",
                **dict.fromkeys(numbers, "i32"),
                "eps": "fp32",
                "dt": "fp32",
            }
            constants = {
                **dict.fromkeys(ones, 1),
                "HAS_BIAS": True,
                "PRECISION": "tf32" if dtype == "bf16" else "ieee",
                **default,
                "BLOCK_O": _block_o(outputs),
            }
            label = f"{dtype}, {label}"
            raced = dtype == "bf16" and axis == "c"
            cases.append(
                CompileCase(label, _output_euler_fwd_kernel, signature, constants, warps, divisible=sizes, raced=raced)
            )
    return cases


def _tune_inputs(device):
    for batch in (1, 8, 32):
        x, z = (torch.randn(batch, 64, 64, c, device=device).permute(0, 3, 1, 2) for c in (256, 16))
        norm_weight, weight = torch.ones(256, device=device), torch.randn(16, 256, device=device) / 16
        yield x.bfloat16(), norm_weight.bfloat16(), 2.0**-23, weight.bfloat16(), None, z, -0.04, (1, 1)
    for batch in (1, 8):  # HDiT at 512x512
        x, z = torch.randn(batch, 128, 128, 256, device=device), torch.randn(batch, 512, 512, 3, device=device)
        x, z, weight = x.permute(0, 3, 1, 2).bfloat16(), z.permute(0, 3, 1, 2), torch.randn(48, 256, device=device) / 16
        yield x, torch.ones(256, device=device).bfloat16(), 1e-6, weight.bfloat16(), None, z, 0.04, (4, 4)


# ---- registration

register(
    Op(
        "output_euler",
        forward={
            "triton": Kernel(_launch_output_euler, _triton_refuses),
            "cpp": Kernel(_cpp_output_euler, _refuses),
            "torch": Kernel(_torch_output_euler),
        },
        notes={"backward": "it has none: training takes no Euler step"},
        compile_cases=_compile_cases,
        candidates={"output_euler": choices(BLOCK=(16, 32, 64, 128), BLOCK_C=(32, 64, 128), num_warps=(2, 4, 8))},
        tune_inputs=_tune_inputs,
    )
)


def _check(x, norm_weight, eps, weight, bias, z, patch) -> None:
    for name, t in (("x", x), ("norm_weight", norm_weight), ("weight", weight), ("bias", bias), ("z", z)):
        if t is None:
            continue
        if not t.dtype.is_floating_point:
            raise TypeError(f"output_euler: {name} must have a float dtype, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"output_euler: all tensors must be on one device, got {x.device} and {t.device}")
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"output_euler: z must be float32 or float64, got {z.dtype}; keep the state as z.float()")
    if x.dim() != 4 or weight.dim() != 2:
        raise ValueError(
            f"output_euler: expected x (B, C, H, W) and weight (O, C) or (O, C, 1, 1), got {tuple(x.shape)} and"
            f" {tuple(weight.shape)}"
        )
    outputs, (p, q) = weight.shape[0], patch
    if p < 1 or q < 1 or outputs % (p * q):
        raise ValueError(f"output_euler: {outputs} outputs are no patches of {p} x {q} pixels")
    expected = {
        "norm_weight": (norm_weight, (x.shape[1],)),
        "weight": (weight, (outputs, x.shape[1])),
        "bias": (bias, (outputs,)),
        "z": (z, (x.shape[0], outputs // (p * q), x.shape[2] * p, x.shape[3] * q)),
    }
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"output_euler: {name} must be {shape}, got {tuple(t.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"output_euler: eps must be finite and at least 0, got {eps}")


@torch.library.custom_op("lpmrf::output_euler", mutates_args=())
def _output_euler(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    dt: float,
    patch: Sequence[int],
) -> Tensor:
    _check(x, norm_weight, eps, weight, bias, z, patch)
    return run("output_euler", x, norm_weight, eps, weight, bias, z, dt, patch)


@_output_euler.register_fake
def _(x, norm_weight, eps, weight, bias, z, dt, patch):
    _check(x, norm_weight, eps, weight, bias, z, patch)
    return torch.empty_like(z)


# No autocast rule, as for euler_step: the op takes the dtypes that it is given.


# ---- public


def output_euler(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    dt: float,
    patch: Sequence[int] = (1, 1),
) -> Tensor:
    """z + dt · v where v = weight · RMSNorm(x) + bias is the velocity that a network's last layers make of x.

    x: (B, C, H, W) before the last norm, norm_weight: (C,), eps: the norm's, weight: (O, C) or (O, C, 1, 1), bias: (O,)
    or None; any float dtype and memory format. z: state (B, O / (p · q), H · p, W · q) for a patch (p, q), whose
    outputs are ordered (row, column, channel); float32 (float64 is computed by the reference).
    dt: step in flow time, negative for a network that predicts v = source - clean. Nothing is mutated.
    Returns a new tensor with z's shape, dtype and memory format. Not differentiable.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or eps.
    """
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    return torch.ops.lpmrf.output_euler(x, norm_weight, eps, weight, bias, z, dt, patch)
