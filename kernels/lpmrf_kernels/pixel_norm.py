"""Norms over the channels of each pixel: what layer_norm_2d, rms_norm_2d and ada_rms_norm_2d share.

    s = x + residual                                       only with a residual; rounded to x's dtype and returned
    y = (s - mean) · rsqrt(var + eps) · weight + bias      `centred`: LayerNorm, biased variance
    y = s · rsqrt(mean(s²) + eps) · weight                 else: RMSNorm; `plus_one` takes 1 + weight

Shapes      x and residual (B, C, H, W); weight (C,) or (B, C), one row a photo; bias (C,). weight and bias may be None.
Dtypes      x float32, bfloat16 or float16; residual as x; weight and bias any float. Results have x's dtype.
Layouts     Every tensor is read with its own strides, nothing is copied; results have x's memory format. A program
            holds whole pixels: rows of memory in channels-last; columns in NCHW, which cost more when C is large.
Arithmetic  float32 from the load to the store; the variance is the mean of squared differences.
Traffic     Forward: x, then y (with a residual: x, residual, s and y). PyTorch on CUDA moves the same for LayerNorm of
            channels-last, more with a residual or for RMSNorm, and copies NCHW around it. Backward: g and s, then dx:
            the statistics are computed again from a pixel that is in registers anyway, so that none are stored.
Gradients   Those of weight and bias in two stages, without atomics: each program sums its pixels, then the programs'
            sums are added. Two runs give the same bits.
Fallback    Triton takes up to 4096 channels, so that a pixel fits in registers. More of them and float64 go to the
            reference and are counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .launch import launch_config
from .layout import evenly_spaced, image_strides, laid_out_like
from .registry import OPS, CompileCase, Kernel, Op, choose, register, run

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_CHANNELS = 4096
PROGRAMS = 1024  # of a backward pass, about; one number for all GPUs, so that they add up alike
CHUNK = 16384  # elements that one partial sum of the C++ backward covers, at least


# ---- kernels


@jit
def image_offsets(p, c, width, stride_c, stride_h, stride_w, FLAT: tl.constexpr):
    if FLAT:
        pixels = p * stride_w
    else:
        pixels = p // width * stride_h + p % width * stride_w
    return pixels[:, None] + c[None, :].to(tl.int64) * stride_c  # [BLOCK_P, BLOCK_C]


@jit
def _pixel_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,  # has y's strides
    y_ptr,
    channels,
    pixels,  # of a photo
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_weight_b,
    stride_weight_c,
    stride_bias_c,
    eps,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FLAT: tl.constexpr,  # in each tensor the pixels of a photo are evenly spaced
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    p = (pid % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    mask_c = c < channels
    mask = (p < pixels)[:, None] & mask_c[None, :]
    offs_y = b * stride_yb + image_offsets(p, c, width, stride_yc, stride_yh, stride_yw, FLAT)

    offs_x = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
    x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        offs_r = b * stride_rb + image_offsets(p, c, width, stride_rc, stride_rh, stride_rw, FLAT)
        x += tl.load(residual_ptr + offs_r, mask=mask, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offs_y, x, mask=mask)
        x = x.to(tl.float32)

    if CENTRED:
        mean = tl.sum(x, 1) / channels
        x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + b * stride_weight_b + c * stride_weight_c, mask=mask_c, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight += 1.0
        y *= weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c * stride_bias_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_y, y, mask=mask)


@jit
def _pixel_norm_bwd_kernel(
    g_ptr,  # gradient of y
    g_sum_ptr,  # gradient of s
    x_ptr,  # s, where there was a residual
    weight_ptr,
    dx_ptr,
    dweight_ptr,  # [programs, C], this program's sums
    dbias_ptr,
    channels,
    pixels,
    width,
    steps,  # tiles a program
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_sb,
    stride_sc,
    stride_sh,
    stride_sw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    stride_weight_b,
    stride_weight_c,
    eps,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    programs = tl.cdiv(pixels, steps * BLOCK_P)  # of a photo
    pid = tl.program_id(0)
    b = (pid // programs).to(tl.int64)
    p = (pid % programs).to(tl.int64) * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    mask_c = c < channels
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + b * stride_weight_b + c * stride_weight_c, mask=mask_c, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight += 1.0
    dweight = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)

    for _ in range(steps):
        mask = (p < pixels)[:, None] & mask_c[None, :]
        offs_x = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
        offs_g = b * stride_gb + image_offsets(p, c, width, stride_gc, stride_gh, stride_gw, FLAT)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(x, 1) / channels
            x = tl.where(mask_c[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
        x_hat = tl.where(mask, x * rstd[:, None], 0.0)  # a masked pixel has x = 0, and rstd = inf where eps = 0
        if dweight_ptr is not None:
            dweight += g * x_hat
        if dbias_ptr is not None:
            dbias += g
        if weight_ptr is not None:
            g *= weight[None, :]
        dx = g - x_hat * (tl.sum(g * x_hat, 1) / channels)[:, None]
        if CENTRED:
            dx -= (tl.sum(g, 1) / channels)[:, None]
        dx *= rstd[:, None]
        if g_sum_ptr is not None:
            offs_s = b * stride_sb + image_offsets(p, c, width, stride_sc, stride_sh, stride_sw, FLAT)
            dx += tl.load(g_sum_ptr + offs_s, mask=mask, other=0.0).to(tl.float32)
        offs_d = b * stride_db + image_offsets(p, c, width, stride_dc, stride_dh, stride_dw, FLAT)
        tl.store(dx_ptr + offs_d, dx, mask=mask)
        p += BLOCK_P

    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid.to(tl.int64) * channels + c, tl.sum(dweight, 0), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid.to(tl.int64) * channels + c, tl.sum(dbias, 0), mask=mask_c)


# ---- launchers


@dataclass(frozen=True)
class PixelNorm:
    """One op of the family: its formula, its reference and its implementations in each backend."""

    name: str
    reference: Callable[..., Tensor | tuple[Tensor, Tensor]]
    """(x, residual, weight, bias, eps) → y, or (s, y)."""
    centred: bool
    plus_one: bool

    # Forward: (x, residual, weight, bias, eps) → [y], or [s, y] with a residual.

    def triton_forward(self, x, residual, weight, bias, eps) -> list[Tensor]:
        outputs = _outputs(x, residual)
        if x.numel():
            B, C, H, W = x.shape
            config = tuned(self.name, x, _forward_tile(x))
            flat = evenly_spaced(x, residual, outputs[-1])
            total = outputs[0] if residual is not None else None
            grid = (B * triton.cdiv(H * W, config["BLOCK_P"]),)
            with torch.cuda.device_of(x):
                _pixel_norm_fwd_kernel[grid](
                    x, residual, weight, bias, total, outputs[-1], C, H * W, W,
                    *image_strides(x, flat), *image_strides(residual, flat), *image_strides(outputs[-1], flat),
                    *_weight_strides(weight), 0 if bias is None else bias.stride(0), eps,
                    CENTRED=self.centred, PLUS_ONE=self.plus_one, FLAT=flat,
                    BLOCK_C=triton.next_power_of_2(C), **config,
                )  # fmt: skip
        return outputs

    def cpp_forward(self, x, residual, weight, bias, eps) -> list[Tensor]:
        outputs = _outputs(x, residual)
        if x.numel():
            total = outputs[0] if residual is not None else None
            torch.ops.lpmrf_cpp.pixel_norm(
                x, residual, native(weight), float(self.plus_one), native(bias), eps, self.centred, total, outputs[-1]
            )
        return outputs

    def torch_forward(self, x, residual, weight, bias, eps) -> list[Tensor]:
        outputs = self.reference(x, residual, weight, bias, eps)
        return [laid_out_like(y, x) for y in (outputs if residual is not None else (outputs,))]

    # Backward: (x or s, gradients of the outputs, weight, eps, weight_grad, bias_grad)
    # → [dx] + [dweight, as weight] * weight_grad + [dbias (C,), float32] * bias_grad.

    def triton_backward(self, x, grads, weight, eps, weight_grad, bias_grad) -> list[Tensor]:
        B, C, H, W = x.shape
        config = tuned(f"{self.name}_backward", x, _backward_tile(x))
        tiles = triton.cdiv(H * W, config["BLOCK_P"])
        steps = max(triton.cdiv(B * tiles, PROGRAMS), 1)
        programs = triton.cdiv(tiles, steps)
        dx, dweight, dbias = _gradients(x, programs, weight_grad, bias_grad)
        if x.numel():
            *g_sum, g = grads
            g_sum = g_sum[0] if g_sum else None
            flat = evenly_spaced(x, g, g_sum, dx)
            with torch.cuda.device_of(x):
                _pixel_norm_bwd_kernel[(B * programs,)](
                    g, g_sum, x, weight, dx, dweight, dbias, C, H * W, W, steps,
                    *image_strides(g, flat), *image_strides(g_sum, flat), *image_strides(x, flat),
                    *image_strides(dx, flat), *_weight_strides(weight), eps,
                    CENTRED=self.centred, PLUS_ONE=self.plus_one, FLAT=flat,
                    BLOCK_C=triton.next_power_of_2(C), **config,
                )  # fmt: skip
        return _summed(weight, dx, dweight, dbias)

    def cpp_backward(self, x, grads, weight, eps, weight_grad, bias_grad) -> list[Tensor]:
        chunks = max(1, x[:1].numel() // CHUNK)
        dx, dweight, dbias = _gradients(x, chunks, weight_grad, bias_grad)
        if x.numel():
            *g_sum, g = grads
            torch.ops.lpmrf_cpp.pixel_norm_backward(
                x, g, g_sum[0] if g_sum else None, native(weight), float(self.plus_one), eps, self.centred, chunks,
                dx, dweight, dbias,
            )  # fmt: skip
        return _summed(weight, dx, dweight, dbias)

    def torch_backward(self, x, grads, weight, eps, weight_grad, bias_grad) -> list[Tensor]:
        *g_sum, g = grads
        factor = weight if weight is None else weight.to(statistics_dtype(x)) + self.plus_one
        dx, dweight, dbias = reference.pixel_norm_backward(x, g, factor, eps, self.centred)
        if g_sum:
            dx = dx + g_sum[0]
        dx = laid_out_like(dx.to(x.dtype), x)
        return _summed(weight, dx, dweight[:, None] if weight_grad else None, dbias[:, None] if bias_grad else None)


def _outputs(x: Tensor, residual: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for _ in range(1 if residual is None else 2)]


def _gradients(x: Tensor, parts: int, weight_grad: bool, bias_grad: bool):
    """dx, and room for `parts` partial sums a photo of weight's and bias's gradients (B, parts, C), where asked for."""
    make = x.new_empty if x.numel() else x.new_zeros
    partial = lambda asked: make((x.shape[0], parts, x.shape[1]), dtype=torch.float32) if asked else None
    return torch.empty_like(x), partial(weight_grad), partial(bias_grad)


def _summed(weight: Tensor | None, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> list[Tensor]:
    """The second stage: partial sums (B, parts, C) to the shapes of weight and bias."""
    result = [dx]
    if dweight is not None:
        result.append(dweight.sum(1 if weight.dim() == 2 else (0, 1)).to(weight.dtype))
    if dbias is not None:
        result.append(dbias.sum((0, 1)))
    return result


def native(p: Tensor | None) -> Tensor | None:
    """A parameter in a dtype that C++ reads."""
    return p if p is None or p.dtype in DTYPES else p.float()


def _weight_strides(weight: Tensor | None) -> tuple[int, int]:
    if weight is None:
        return 0, 0
    return (weight.stride(0) if weight.dim() == 2 else 0), weight.stride(-1)


def _rows(x: Tensor) -> bool:
    """Whether a pixel's channels lie closer together than its neighbours."""
    return x.stride(1) <= x.stride(3)


def tuned(name: str, x: Tensor, default: dict[str, int]) -> dict[str, int]:
    """The tile for a launch on (B, C, H, W): of a table where rows are channels, as they were when it was measured."""
    if not _rows(x):
        return default
    return launch_config(name, x.device, default, channels=x.shape[1], pixels=x.shape[2] * x.shape[3])


def _forward_tile(x: Tensor) -> dict[str, int]:
    """About 16 elements a thread. Rows: 8 KB of bf16. Columns: at least 32 pixels side by side where they fit."""
    block_c = triton.next_power_of_2(x.shape[1])
    elements = 4096 if _rows(x) else min(max(32 * block_c, 4096), 16384)
    return _tile(x, elements, elements_a_thread=16)


def _backward_tile(x: Tensor) -> dict[str, int]:
    """About 8 elements a thread: two inputs and two running sums of them are in registers."""
    block_c = triton.next_power_of_2(x.shape[1])
    return _tile(x, 2048 if _rows(x) else min(max(16 * block_c, 2048), 4096), elements_a_thread=8)


def _tile(x: Tensor, elements: int, elements_a_thread: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(x.shape[1])
    block_p = min(max(elements // block_c, 1), triton.next_power_of_2(max(x.shape[2] * x.shape[3], 1)))
    warps = block_p * block_c // (32 * elements_a_thread)
    return {"BLOCK_P": block_p, "num_warps": min(max(warps, 1), 16)}


def _refuses(x, residual, weight, bias, eps) -> str | None:
    return None if x.dtype in DTYPES else f"the kernel takes float32, bfloat16 or float16, not {x.dtype}"


def _triton_refuses(x, residual, weight, bias, eps) -> str | None:
    if x.shape[1] > MAX_CHANNELS:
        return f"the kernel takes up to {MAX_CHANNELS} channels"
    return _refuses(x, residual, weight, bias, eps)


def _compile_cases(norm: PixelNorm) -> list[CompileCase]:
    """The default tiles at the channel counts of the networks, with and without a residual, in both layouts."""
    cases = []
    for dtype, channels, channels_last, residual in (
        ("bf16", 128, True, False),
        ("bf16", 512, True, True),
        ("fp16", 256, True, True),
        ("bf16", MAX_CHANNELS, True, False),
        ("bf16", 128, False, True),
        ("fp32", 512, False, True),
    ):
        model = torch.empty(1, channels, 64, 64, device="meta")
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        flags = {"CENTRED": norm.centred, "PLUS_ONE": norm.plus_one, "FLAT": True}
        block_c = {"BLOCK_C": triton.next_power_of_2(channels)}
        for kernel, tile, pointers, optional, images in (
            (
                _pixel_norm_fwd_kernel,
                _forward_tile(model),
                {"x_ptr": dtype, "y_ptr": dtype, "weight_ptr": "fp32"},
                {"residual_ptr": dtype, "sum_ptr": dtype},
                "xry",
            ),
            (
                _pixel_norm_bwd_kernel,
                _backward_tile(model),
                {"g_ptr": dtype, "x_ptr": dtype, "dx_ptr": dtype, "weight_ptr": "fp32", "dweight_ptr": "fp32"},
                {"g_sum_ptr": dtype},
                "gsxd",
            ),
        ):
            bias = "bias_ptr" if kernel is _pixel_norm_fwd_kernel else "dbias_ptr"
            constants = {**flags, **block_c, **tile}
            num_warps = constants.pop("num_warps")
            # As at a launch, where Triton sees a stride of 1 and absent tensors as constants.
            constants |= {f"stride_{t}{'c' if channels_last else 'w'}": 1 for t in images}
            for name, there in (*((n, residual) for n in optional), (bias, norm.centred)):
                if not there:
                    constants[name] = None
            pointers = {**pointers, **optional, bias: "fp32"}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: f"*{pointers[name]}" if name in pointers else "i64" for name in names}
            signature["eps"] = "fp32"
            way = "forward" if kernel is _pixel_norm_fwd_kernel else "backward"
            layout = "channels-last" if channels_last else "NCHW"
            label = f"{way}, {dtype}, {channels} {layout}" + ", residual" * residual
            config = None if way == "forward" else f"{norm.name}_backward"
            divisible = [
                name
                for name in signature
                if name.endswith("_ptr") or name.startswith(("stride_", "channels", "pixels"))
            ]
            raced = dtype == "bf16" and channels_last and channels < MAX_CHANNELS
            cases.append(
                CompileCase(label, kernel, signature, constants, num_warps, divisible, config=config, raced=raced)
            )
    return cases


def _candidates(most: int) -> list[dict[str, int]]:
    """Half a pixel a warp to `most` of them: of 512 channels 16 · most elements a thread, which registers hold."""
    return [
        {"BLOCK_P": int(warps * share), "num_warps": warps}
        for warps in (2, 4, 8)  # 16 leave a thread 128 registers: too few
        for share in (0.5, 1, 2, 4)
        if share <= most
    ]


def _tune_inputs(norm: PixelNorm, device):
    """Sim-VAE's levels for LayerNorm, the velocity network's for RMSNorm, with gradients."""
    for channels, size in ((128, 512), (256, 256), (512, 64)) if norm.centred else ((256, 64), (512, 32)):
        x = torch.randn(8, size, size, channels, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        weight = torch.ones((8, channels) if norm.plus_one else channels, device=device, requires_grad=True)
        yield x.requires_grad_(), None, weight, torch.zeros_like(weight) if norm.centred else None, 1e-6


# ---- registration


def define(name: str, reference: Callable, centred: bool, plus_one: bool = False) -> None:
    """Register torch.ops.lpmrf.<name>(x, residual, weight, bias, eps) → [y] or [s, y], and its backward."""
    norm = PixelNorm(name, reference, centred, plus_one)
    register(
        Op(
            name,
            forward={
                "triton": Kernel(norm.triton_forward, _triton_refuses),
                "cpp": Kernel(norm.cpp_forward, _refuses),
                "torch": Kernel(norm.torch_forward),
            },
            backward={
                "triton": Kernel(norm.triton_backward, _triton_refuses),
                "cpp": Kernel(norm.cpp_backward, _refuses),
                "torch": Kernel(norm.torch_backward),
            },
            compile_cases=lambda: _compile_cases(norm),
            candidates={name: _candidates(4), f"{name}_backward": _candidates(2)},
            tune_inputs=lambda device: _tune_inputs(norm, device),
        )
    )

    @torch.library.custom_op(f"lpmrf::{name}", mutates_args=())
    def forward(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> list[Tensor]:
        return run(name, x, residual, weight, bias, eps)

    @forward.register_fake
    def _(x, residual, weight, bias, eps):
        return _outputs(x, residual)

    @torch.library.custom_op(f"lpmrf::{name}_backward", mutates_args=())
    def backward(
        x: Tensor,
        grads: list[Tensor],
        weight: Tensor | None,
        eps: float,
        weight_grad: bool,
        bias_grad: bool,
        backend: str,
    ) -> list[Tensor]:
        return OPS[name].backward[backend].run(x, grads, weight, eps, weight_grad, bias_grad)

    @backward.register_fake
    def _(x, grads, weight, eps, weight_grad, bias_grad, backend):
        result = [torch.empty_like(x)]
        if weight_grad:
            result.append(weight.new_empty(weight.shape))
        if bias_grad:
            result.append(x.new_empty(x.shape[1], dtype=statistics_dtype(x)))
        return result

    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, ctx.eps = inputs
        ctx.save_for_backward(x if residual is None else output[0], weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.backend = choose(name, *inputs, direction="backward")  # compiled code keeps the one it was traced with

    def differentiate(ctx, grads):
        x, weight = ctx.saved_tensors
        _, needs_residual, weight_grad, bias_grad, _ = ctx.needs_input_grad
        dx, *others = getattr(torch.ops.lpmrf, f"{name}_backward")(
            x, grads, weight, ctx.eps, weight_grad, bias_grad, ctx.backend
        )
        dweight = others.pop(0) if weight_grad else None
        dbias = others.pop(0).to(ctx.bias_dtype) if bias_grad else None
        return dx, dx if needs_residual else None, dweight, dbias, None

    forward.register_autograd(differentiate, setup_context=setup_context)
    # No autocast rule: statistics are float32 whatever x is, and a rule would cast x in a pass of its own.


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check(op: str, x: Tensor, residual: Tensor | None, eps: float, **parameters: tuple[Tensor | None, set[int]]):
    """Raise for arguments that fit no backend. parameters: name → (tensor, {1} for (C,), {2} for (B, C), or both)."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{op}: x must be a tensor of a float dtype, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got the shape {tuple(x.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    B, C = x.shape[:2]
    for name, (p, dims) in parameters.items():
        if p is None:
            continue
        if not p.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a float dtype, got {p.dtype}")
        expected = [shape for shape in ((C,), (B, C)) if len(shape) in dims]
        if tuple(p.shape) not in expected:
            raise ValueError(f"{op}: {name} must be {' or '.join(map(str, expected))}, got {tuple(p.shape)}")
        if p.device != x.device:
            raise ValueError(f"{op}: x and {name} must be on one device, got {x.device} and {p.device}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}; expand it"
            )
        if residual.dtype != x.dtype:
            raise TypeError(
                f"{op}: residual must have x's dtype {x.dtype}, got {residual.dtype}; use residual.to(x.dtype)"
            )
        if residual.device != x.device:
            raise ValueError(f"{op}: x and residual must be on one device, got {x.device} and {residual.device}")
