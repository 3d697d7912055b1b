"""What follows a convolution that ran without its bias, in one pass: silu(x + bias), or x + bias + residual.

Shapes      x, residual (B, C, H, W), bias (C,).
Dtypes      x float32, bfloat16 or float16, residual and result in x's; bias of any of these, as autocast leaves it.
Layouts     Any strides in Triton. C++ reads dense channels-last or channels-first memory; what is neither is copied to
            x's memory format first. The result has x's memory format.
Arithmetic  float32 from the load to the one rounding of the result.
Traffic     bias_silu 2 · numel · sizeof(x) bytes, bias_residual 3. On CUDA PyTorch's convolution adds its bias in a
            pass of its own, which makes 4 and 5. Backward of bias_silu: x and g read, dx written, and float32 sums of
            each program's pixels for dbias, added in a second stage.
Fallback    Other floats, float64 above all, and float16 on a CPU go to the reference and are counted.
Source      Epilogue fusion as in cuDNN's and oneDNN's convolutions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .depthwise import DTYPES, check_map, check_parameter, compile_case, refuses_dtypes, refuses_dtypes_cpp
from .launch import launch_config
from .layout import laid_out_like
from .pixels import TILE, pixel_tile, rows_adjoin, tile_default
from .registry import CompileCase, Kernel, Op, forced_backend, register, run, use_backend

BLOCKS = 8
"""Blocks of pixels that one program of the backward adds up."""


# ---- kernels


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _conv_epilogue_fwd_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    channels,
    pixels,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    HAS_RESIDUAL: tl.constexpr,  # x + bias + residual; without it silu(x + bias)
    ADJOIN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, p, c = pixel_tile(tl.program_id(0), channels, pixels, BLOCK_P, BLOCK_C)
    mask = (p < pixels) & (c < channels)
    if ADJOIN:
        offs_x = p * stride_xw
        offs_r = p * stride_rw
        offs_o = p * stride_ow
    else:
        offs_x = p // width * stride_xh + p % width * stride_xw
        offs_r = p // width * stride_rh + p % width * stride_rw
        offs_o = p // width * stride_oh + p % width * stride_ow
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0).to(tl.float32)
    h = tl.load(x_ptr + b * stride_xb + offs_x + c * stride_xc, mask=mask, other=0).to(tl.float32) + bias
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + b * stride_rb + offs_r + c * stride_rc
        out = h + tl.load(residual_ptrs, mask=mask, other=0).to(tl.float32)
    else:
        out = h * _sigmoid(h)
    tl.store(out_ptr + b * stride_ob + offs_o + c * stride_oc, out, mask=mask)


@jit
def _bias_silu_bwd_kernel(
    g_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,  # [programs / blocks of channels, C] float32
    channels,
    pixels,
    width,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    ADJOIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    b, first, c = pixel_tile(pid, channels, pixels, BLOCKS * BLOCK_P, BLOCK_C)
    first = tl.min(first, 0)[:, None] + tl.arange(0, BLOCK_P)[:, None]
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(BLOCKS):
        p = first + i * BLOCK_P
        mask = (p < pixels) & (c < channels)
        if ADJOIN:
            offs_g = p * stride_gw
            offs_x = p * stride_xw
            offs_d = p * stride_dw
        else:
            offs_g = p // width * stride_gh + p % width * stride_gw
            offs_x = p // width * stride_xh + p % width * stride_xw
            offs_d = p // width * stride_dh + p % width * stride_dw
        h = tl.load(x_ptr + b * stride_xb + offs_x + c * stride_xc, mask=mask, other=0).to(tl.float32) + bias
        g = tl.load(g_ptr + b * stride_gb + offs_g + c * stride_gc, mask=mask, other=0).to(tl.float32)
        s = _sigmoid(h)
        d = g * (s + h * s * (1.0 - s))
        tl.store(dx_ptr + b * stride_db + offs_d + c * stride_dc, d, mask=mask)
        total += tl.where(mask, d, 0.0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c_out = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    partial = partial_ptr + (pid // blocks_c).to(tl.int64) * channels + c_out
    tl.store(partial, tl.sum(total, 0), mask=c_out < channels)


# ---- launchers


def _tile(name: str, x: Tensor) -> dict[str, int]:
    """A table's where channels are dense, as they were when it was measured."""
    default = tile_default(x, x.shape[1])
    if x.stride(1) != 1:
        return default
    return launch_config(name, x.device, default, pixels=x.shape[2] * x.shape[3], channels=x.shape[1])


def _launch_conv_epilogue(op: str, x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        B, C, H, W = x.shape
        r = x if residual is None else residual
        config = _tile(op, x)
        grid = (B * triton.cdiv(H * W, config["BLOCK_P"]) * triton.cdiv(C, config["BLOCK_C"]),)
        with torch.cuda.device_of(x):
            _conv_epilogue_fwd_kernel[grid](
                x, bias.contiguous(), r, out, C, H * W, W, *x.stride(), *r.stride(), *out.stride(),
                HAS_RESIDUAL=residual is not None, ADJOIN=rows_adjoin(x, r, out), **config,
            )  # fmt: skip
    return out


def _launch_bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    return _launch_conv_epilogue("bias_silu", x, bias, None)


def _launch_bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return _launch_conv_epilogue("bias_residual", x, bias, residual)


def _launch_bias_silu_backward(x: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    B, C, H, W = x.shape
    if x.numel() == 0:
        return dx, torch.zeros(C, device=x.device)
    config = _tile("bias_silu_backward", x)
    parts = B * triton.cdiv(H * W, BLOCKS * config["BLOCK_P"])
    partial = torch.empty(parts, C, device=x.device)
    with torch.cuda.device_of(x):
        _bias_silu_bwd_kernel[(parts * triton.cdiv(C, config["BLOCK_C"]),)](
            g, x, bias.contiguous(), dx, partial, C, H * W, W, *g.stride(), *x.stride(), *dx.stride(),
            ADJOIN=rows_adjoin(g, x, dx), BLOCKS=BLOCKS, **config,
        )  # fmt: skip
    return dx, partial.sum(0)


def _dense(out: Tensor, *tensors: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether `out`, which is dense, is channels-last (else channels-first), and the tensors in its very strides."""
    channels_last = out.is_contiguous(memory_format=torch.channels_last)
    return channels_last, [laid_out_like(t, out) for t in tensors]


def _cpp_conv_epilogue(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    room = out
    if not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)):
        room = torch.empty_like(out, memory_format=torch.contiguous_format)  # such as a transposed photo
    channels_last, tensors = _dense(room, x, *(() if residual is None else (residual,)))
    if residual is None:
        torch.ops.lpmrf_cpp.bias_silu(*tensors, bias, channels_last, room)
    else:
        torch.ops.lpmrf_cpp.bias_residual(tensors[0], bias, tensors[1], channels_last, room)
    return out if room is out else out.copy_(room)


def _cpp_bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    return _cpp_conv_epilogue(x, bias, None)


def _cpp_bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return _cpp_conv_epilogue(x, bias, residual)


def _cpp_bias_silu_backward(x: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    room = dx
    if not (dx.is_contiguous() or dx.is_contiguous(memory_format=torch.channels_last)):
        room = torch.empty_like(dx, memory_format=torch.contiguous_format)
    channels_last, (x, g) = _dense(room, x, g)
    B, C, H, W = x.shape
    partial = torch.zeros(max(1, B * H * W // 64) if channels_last else B, C)
    torch.ops.lpmrf_cpp.bias_silu_backward(g, x, bias, channels_last, room, partial)
    return (dx if room is dx else dx.copy_(room)), partial.sum(0)


def _torch_bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    return laid_out_like(reference.bias_silu(x, bias), x)


def _torch_bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return laid_out_like(reference.bias_residual(x, bias, residual), x)


def _torch_bias_silu_backward(x: Tensor, g: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.ops.aten.silu_backward(g, x + bias.to(x.dtype)[:, None, None])
    return laid_out_like(dx, x), _bias_gradient(dx)


def _bias_gradient(g: Tensor) -> Tensor:
    return g.sum((0, 2, 3), dtype=torch.promote_types(g.dtype, torch.float32))


def _refuses(x, *rest):
    return refuses_dtypes(x, *rest)


def _refuses_cpp(x, *rest):
    return refuses_dtypes_cpp(x, *rest)


def _forward_cases(op: str) -> list[CompileCase]:
    maps = {"x": "x", "r": "residual", "o": "out"}
    flags = {"HAS_RESIDUAL": op == "bias_residual", "ADJOIN": True}
    return [
        compile_case(_conv_epilogue_fwd_kernel, "forward", dtype, maps, ("bias",), SIZES, flags, TILE, op)
        for dtype in DTYPES.values()
    ]


def _bias_silu_cases() -> list[CompileCase]:
    maps, flags = {"g": "g", "x": "x", "d": "dx"}, {"ADJOIN": True, "BLOCKS": BLOCKS}
    cases = [
        compile_case(
            _bias_silu_bwd_kernel, "backward", dtype, maps, ("bias",), SIZES, flags, TILE, "bias_silu_backward"
        )
        for dtype in DTYPES.values()
    ]
    return _forward_cases("bias_silu") + [replace(c, signature={**c.signature, "partial_ptr": "*fp32"}) for c in cases]


CANDIDATES = [
    {"BLOCK_P": size // block_c, "BLOCK_C": block_c, "num_warps": warps}
    for size in (1024, 2048, 4096)
    for block_c in (64, 128, 256)
    for warps in (2, 4, 8)
    if size // warps <= 1024  # 32 elements a thread
]


def _tune_inputs(device, residual: bool = False):
    for channels, size in ((128, 512), (256, 256), (512, 64)):  # of Sim-VAE's levels
        x = torch.randn(8, size, size, channels, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        bias = torch.zeros(channels, device=device)
        yield (x, bias, x) if residual else (x.requires_grad_(), bias)


SIZES = ("channels", "pixels", "width")


# ---- registration

register(
    Op(
        "bias_silu",
        forward={
            "triton": Kernel(_launch_bias_silu, _refuses),
            "cpp": Kernel(_cpp_bias_silu, _refuses_cpp),
            "torch": Kernel(_torch_bias_silu),
        },
        backward={
            "triton": Kernel(_launch_bias_silu_backward, _refuses),
            "cpp": Kernel(_cpp_bias_silu_backward, _refuses_cpp),
            "torch": Kernel(_torch_bias_silu_backward),
        },
        compile_cases=_bias_silu_cases,
        candidates={"bias_silu": CANDIDATES, "bias_silu_backward": CANDIDATES},
        tune_inputs=_tune_inputs,
    )
)
register(
    Op(
        "bias_residual",
        forward={
            "triton": Kernel(_launch_bias_residual, _refuses),
            "cpp": Kernel(_cpp_bias_residual, _refuses_cpp),
            "torch": Kernel(_torch_bias_residual),
        },
        notes={"backward": "it is g itself, twice, and the sum of g, which PyTorch does in one pass"},
        compile_cases=lambda: _forward_cases("bias_residual"),
        candidates={"bias_residual": CANDIDATES},
        tune_inputs=lambda device: _tune_inputs(device, residual=True),
    )
)


def _check(op: str, x: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    check_map(op, x)
    check_parameter(op, "bias", bias, (x.shape[1],), x)
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual must have x's dtype, {x.dtype}, got {residual.dtype}")
        check_parameter(op, "residual", residual, tuple(x.shape), x)


@torch.library.custom_op("lpmrf::bias_silu", mutates_args=())
def _bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    _check("bias_silu", x, bias)
    return run("bias_silu", x, bias)


@torch.library.custom_op("lpmrf::bias_silu_backward", mutates_args=())
def _bias_silu_backward(g: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return run("bias_silu", x, g, bias, direction="backward")


@torch.library.custom_op("lpmrf::bias_residual", mutates_args=())
def _bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    _check("bias_residual", x, bias, residual)
    return run("bias_residual", x, bias, residual)


@_bias_silu.register_fake
def _(x, bias):
    _check("bias_silu", x, bias)
    return torch.empty_like(x)


@_bias_silu_backward.register_fake
def _(g, x, bias):
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


@_bias_residual.register_fake
def _(x, bias, residual):
    _check("bias_residual", x, bias, residual)
    return torch.empty_like(x)


def _setup_bias_silu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.backend = forced_backend() or "auto"


def _backward_bias_silu(ctx, g):
    x, bias = ctx.saved_tensors
    with use_backend(ctx.backend):
        dx, dbias = torch.ops.lpmrf.bias_silu_backward(g, x, bias)
    return dx, dbias.to(bias.dtype)


def _setup_bias_residual(ctx, inputs, output):
    ctx.bias_dtype = inputs[1].dtype


def _backward_bias_residual(ctx, g):
    return g, _bias_gradient(g).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None, g


_bias_silu.register_autograd(_backward_bias_silu, setup_context=_setup_bias_silu)
_bias_residual.register_autograd(_backward_bias_residual, setup_context=_setup_bias_residual)
# No autocast rules: x comes from a convolution, which autocast has made half precision already, and the bias stays
# float32, which the kernels take as it is.


# ---- public


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias), the end of a convolution that ran without its bias.

    x: (B, C, H, W), any float dtype and strides. bias: (C,), any float dtype. Returns a new tensor with x's shape,
    dtype and memory format. Differentiable. Raises TypeError for other dtypes, ValueError for other shapes or devices.
    """
    return torch.ops.lpmrf.bias_silu(x, bias)


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual, the end of a residual branch whose last convolution ran without its bias.

    x: (B, C, H, W), any float dtype and strides. bias: (C,), any float dtype. residual: like x, any strides. Returns a
    new tensor with x's shape, dtype and memory format. Differentiable. Raises TypeError for other dtypes, ValueError
    for other shapes or devices.
    """
    return torch.ops.lpmrf.bias_residual(x, bias, residual)
