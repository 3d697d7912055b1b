"""Gated linear unit of the two halves of the channels, gelu(gate) · value, alone or after a depthwise 3x3 convolution.

    geglu          gelu(gate) · value                  of x's halves
    dwconv_geglu   the same of h = dwconv3x3(x) + bias, zero padding; h is never in memory

Shapes      x (B, 2C, H, W) → (B, C, H, W); gate is the first half (`gate_first`, LooUFormer) or the second (the mapping
            network, HDiT). weight (2C, 1, 3, 3), bias (2C,) or None.
Dtypes      x float32, bfloat16 or float16, the result in x's; weight and bias of any of these, as autocast leaves them.
Layouts     Any strides in Triton. C++ reads channels-last maps; others are copied to that layout first. The result has
            x's memory format.
Arithmetic  float32 from the load to the one rounding of the result. GELU is the exact one, x · Φ(x). Triton and C++
            share a rational Φ, ½ + x P(x²) / Q(x²) on [-5.5, 5.5], 0 and 1 outside of it: fitted here by weighted
            least squares, within 2e-7 of Φ in float32, at half the instructions of a library's erf. The backward, where
            Φ is not multiplied by x, takes a more accurate one.
Traffic     1.5 · numel · sizeof(x) bytes, x once and the result once; PyTorch moves 5 to 9 times numel with its
            convolution, bias, GELU and product. Backward: h is computed again from x; its gradient is written once and
            read by the convolution's backward (`depthwise.py`), which also sums dweight and dbias in two stages.
Fallback    Other floats, float64 above all, and float16 on a CPU go to the reference and are counted.
Source      Shazeer 2020 ("GLU variants improve transformer"); depthwise gates as in LooUFormer's official code.
"""

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .depthwise import (
    BACKWARD_CANDIDATES,
    CONV_BACKWARD_CANDIDATES,
    CONV_CANDIDATES,
    CONV_TILE,
    DTYPES,
    backward_case,
    channels_last,
    channels_last_room,
    check_map,
    check_parameter,
    compile_case,
    conv_default,
    conv_grid,
    cpp_depthwise_backward,
    launch_depthwise_backward,
    load_row,
    load_taps,
    map_to_tune,
    refuses_dtypes,
    refuses_dtypes_cpp,
    roll,
    tile_of,
    torch_depthwise_backward,
)
from .launch import choices, launch_config
from .layout import laid_out_like
from .pixels import TILE, pixel_tile, rows_adjoin, tile_default
from .registry import CompileCase, Kernel, Op, forced_backend, register, run, use_backend

# ---- kernels


@jit
def _normal_cdf(x):
    t = x * x
    p = 6.3521001720801e-06 + 2.274937749291439e-08 * t
    p = 0.00016882493218872696 + p * t
    p = 0.004677256103605032 + p * t
    p = 0.03385258838534355 + p * t
    p = 0.398942232131958 + p * t
    q = 7.364719203906134e-05 + 1.197502911054471e-06 * t
    q = 0.0018844407750293612 + q * t
    q = 0.0286458358168602 + q * t
    q = 0.2515217661857605 + q * t
    q = 1.0 + q * t
    y = 0.5 + x * (p / q)
    return tl.where(x > 5.5, 1.0, tl.where(x < -5.5, 0.0, y))  # NaN compares false and stays


@jit
def _gated(gate, value):
    return gate * _normal_cdf(gate) * value


@jit
def _gated_backward(g, gate, value):
    """The gradients of gate and value: Φ(x) + x φ(x) is GELU's derivative."""
    cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return g * value * (cdf + gate * density), g * gate * cdf


@jit
def _geglu_fwd_kernel(
    x_ptr,
    out_ptr,
    hidden,
    pixels,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    GATE_FIRST: tl.constexpr,
    ADJOIN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, p, c = pixel_tile(tl.program_id(0), hidden, pixels, BLOCK_P, BLOCK_C)
    mask = (p < pixels) & (c < hidden)
    if ADJOIN:
        offs_x = p * stride_xw
        offs_o = p * stride_ow
    else:
        offs_x = p // width * stride_xh + p % width * stride_xw
        offs_o = p // width * stride_oh + p % width * stride_ow
    x_image = x_ptr + b * stride_xb + offs_x
    first = tl.load(x_image + c * stride_xc, mask=mask, other=0).to(tl.float32)
    second = tl.load(x_image + (c + hidden) * stride_xc, mask=mask, other=0).to(tl.float32)
    out = _gated(first, second) if GATE_FIRST else _gated(second, first)
    tl.store(out_ptr + b * stride_ob + offs_o + c * stride_oc, out, mask=mask)


@jit
def _geglu_bwd_kernel(
    g_ptr,
    x_ptr,
    dx_ptr,
    hidden,
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
    GATE_FIRST: tl.constexpr,
    ADJOIN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, p, c = pixel_tile(tl.program_id(0), hidden, pixels, BLOCK_P, BLOCK_C)
    mask = (p < pixels) & (c < hidden)
    if ADJOIN:
        offs_g = p * stride_gw
        offs_x = p * stride_xw
        offs_d = p * stride_dw
    else:
        offs_g = p // width * stride_gh + p % width * stride_gw
        offs_x = p // width * stride_xh + p % width * stride_xw
        offs_d = p // width * stride_dh + p % width * stride_dw
    x_image = x_ptr + b * stride_xb + offs_x
    first = tl.load(x_image + c * stride_xc, mask=mask, other=0).to(tl.float32)
    second = tl.load(x_image + (c + hidden) * stride_xc, mask=mask, other=0).to(tl.float32)
    g = tl.load(g_ptr + b * stride_gb + offs_g + c * stride_gc, mask=mask, other=0).to(tl.float32)
    if GATE_FIRST:
        d_first, d_second = _gated_backward(g, first, second)
    else:
        d_second, d_first = _gated_backward(g, second, first)
    d_image = dx_ptr + b * stride_db + offs_d
    tl.store(d_image + c * stride_dc, d_first, mask=mask)
    tl.store(d_image + (c + hidden) * stride_dc, d_second, mask=mask)


@jit
def _dwconv_geglu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    hidden,
    height,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    HAS_BIAS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, y0, x, c = tile_of(tl.program_id(0), hidden, height, width, ROWS, BLOCK_W, BLOCK_C)
    mask_c = c < hidden
    mask = mask_c & (x < width)
    taps1 = load_taps(weight_ptr, c, mask_c)
    taps2 = load_taps(weight_ptr, c + hidden, mask_c)
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias1 = tl.load(bias_ptr + c, mask=mask_c, other=0).to(tl.float32) + zero
        bias2 = tl.load(bias_ptr + c + hidden, mask=mask_c, other=0).to(tl.float32) + zero
    else:
        bias1 = zero
        bias2 = zero
    first = x_ptr + b * stride_xb + c.to(tl.int64) * stride_xc
    second = x_ptr + b * stride_xb + (c + hidden).to(tl.int64) * stride_xc
    out = out_ptr + b * stride_ob + c.to(tl.int64) * stride_oc + x.to(tl.int64) * stride_ow
    ending1, middle1, ending2, middle2 = bias1, bias1, bias2, bias2
    for i in tl.static_range(ROWS + 2):
        y = y0 + i - 1
        row1 = load_row(first, y, x, mask_c, height, width, stride_xh, stride_xw)
        row2 = load_row(second, y, x, mask_c, height, width, stride_xh, stride_xw)
        h1, ending1, middle1 = roll(row1, taps1, bias1, ending1, middle1)
        h2, ending2, middle2 = roll(row2, taps2, bias2, ending2, middle2)
        if i >= 2:
            result = _gated(h1, h2) if GATE_FIRST else _gated(h2, h1)
            tl.store(out + (y - 1).to(tl.int64) * stride_oh, result, mask=mask & (y - 1 < height))


@jit
def _dwconv_geglu_bwd_kernel(
    g_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    dconv_ptr,  # gradient of the convolution's output
    hidden,
    height,
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
    HAS_BIAS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, y0, x, c = tile_of(tl.program_id(0), hidden, height, width, ROWS, BLOCK_W, BLOCK_C)
    mask_c = c < hidden
    mask = mask_c & (x < width)
    taps1 = load_taps(weight_ptr, c, mask_c)
    taps2 = load_taps(weight_ptr, c + hidden, mask_c)
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias1 = tl.load(bias_ptr + c, mask=mask_c, other=0).to(tl.float32) + zero
        bias2 = tl.load(bias_ptr + c + hidden, mask=mask_c, other=0).to(tl.float32) + zero
    else:
        bias1 = zero
        bias2 = zero
    first = x_ptr + b * stride_xb + c.to(tl.int64) * stride_xc
    second = x_ptr + b * stride_xb + (c + hidden).to(tl.int64) * stride_xc
    g_image = g_ptr + b * stride_gb + c.to(tl.int64) * stride_gc + x.to(tl.int64) * stride_gw
    d_image = dconv_ptr + b * stride_db + x.to(tl.int64) * stride_dw
    ending1, middle1, ending2, middle2 = bias1, bias1, bias2, bias2
    for i in tl.static_range(ROWS + 2):
        y = y0 + i - 1
        row1 = load_row(first, y, x, mask_c, height, width, stride_xh, stride_xw)
        row2 = load_row(second, y, x, mask_c, height, width, stride_xh, stride_xw)
        h1, ending1, middle1 = roll(row1, taps1, bias1, ending1, middle1)
        h2, ending2, middle2 = roll(row2, taps2, bias2, ending2, middle2)
        if i >= 2:
            own = mask & (y - 1 < height)
            g = tl.load(g_image + (y - 1).to(tl.int64) * stride_gh, mask=own, other=0).to(tl.float32)
            if GATE_FIRST:
                d1, d2 = _gated_backward(g, h1, h2)
            else:
                d2, d1 = _gated_backward(g, h2, h1)
            d_row = d_image + (y - 1).to(tl.int64) * stride_dh
            tl.store(d_row + c.to(tl.int64) * stride_dc, d1, mask=own)
            tl.store(d_row + (c + hidden).to(tl.int64) * stride_dc, d2, mask=own)


# ---- launchers


def _half(x: Tensor) -> Tensor:
    """An empty tensor of half the channels in x's memory format."""
    # narrow, not an index: a fake CUDA tensor cannot be indexed where PyTorch has no CUDA.
    return torch.empty_like(x.narrow(1, 0, x.shape[1] // 2))


def _launch_geglu(x: Tensor, gate_first: bool) -> Tensor:
    out = _half(x)
    if out.numel():
        B, hidden, H, W = out.shape
        config = launch_config("geglu", x.device, tile_default(x, hidden), pixels=H * W, channels=hidden)
        grid = (B * triton.cdiv(H * W, config["BLOCK_P"]) * triton.cdiv(hidden, config["BLOCK_C"]),)
        with torch.cuda.device_of(x):
            _geglu_fwd_kernel[grid](
                x, out, hidden, H * W, W, *x.stride(), *out.stride(),
                GATE_FIRST=gate_first, ADJOIN=rows_adjoin(x, out), **config,
            )  # fmt: skip
    return out


def _launch_geglu_backward(x: Tensor, g: Tensor, gate_first: bool) -> Tensor:
    dx = torch.empty_like(x)
    if g.numel():
        B, hidden, H, W = g.shape
        config = launch_config("geglu_backward", x.device, tile_default(x, hidden), pixels=H * W, channels=hidden)
        grid = (B * triton.cdiv(H * W, config["BLOCK_P"]) * triton.cdiv(hidden, config["BLOCK_C"]),)
        with torch.cuda.device_of(x):
            _geglu_bwd_kernel[grid](
                g, x, dx, hidden, H * W, W, *g.stride(), *x.stride(), *dx.stride(),
                GATE_FIRST=gate_first, ADJOIN=rows_adjoin(g, x, dx), **config,
            )  # fmt: skip
    return dx


def _launch_dwconv_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    out = _half(x)
    if out.numel():
        _, hidden, H, W = out.shape
        config = launch_config("dwconv_geglu", x.device, conv_default(out), pixels=H * W, channels=hidden)
        with torch.cuda.device_of(x):
            _dwconv_geglu_fwd_kernel[conv_grid(out, config)](
                x, weight.contiguous(), weight if bias is None else bias.contiguous(), out, hidden, H, W,
                *x.stride(), *out.stride(), HAS_BIAS=bias is not None, GATE_FIRST=gate_first, **config,
            )  # fmt: skip
    return out


Gradients = tuple[Tensor, Tensor, Tensor]


def _launch_dwconv_geglu_backward(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool
) -> Gradients:
    dconv = torch.empty_like(x)
    if g.numel():
        _, hidden, H, W = g.shape
        config = launch_config("dwconv_geglu_backward", x.device, conv_default(g), pixels=H * W, channels=hidden)
        with torch.cuda.device_of(x):
            _dwconv_geglu_bwd_kernel[conv_grid(g, config)](
                g, x, weight.contiguous(), weight if bias is None else bias.contiguous(), dconv, hidden, H, W,
                *g.stride(), *x.stride(), *dconv.stride(), HAS_BIAS=bias is not None, GATE_FIRST=gate_first, **config,
            )  # fmt: skip
    return launch_depthwise_backward(dconv, x, weight)


def _cpp_geglu(x: Tensor, gate_first: bool) -> Tensor:
    out = _half(x)
    room = channels_last_room(out)
    torch.ops.lpmrf_cpp.geglu(channels_last(x), gate_first, room)
    return out if room is out else out.copy_(room)


def _cpp_geglu_backward(x: Tensor, g: Tensor, gate_first: bool) -> Tensor:
    dx = torch.empty_like(x)
    room = channels_last_room(dx)
    torch.ops.lpmrf_cpp.geglu_backward(channels_last(g), channels_last(x), gate_first, room)
    return dx if room is dx else dx.copy_(room)


def _or_empty(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_empty(0) if bias is None else bias


def _cpp_dwconv_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    out = _half(x)
    room = channels_last_room(out)
    bias = _or_empty(bias, weight)
    torch.ops.lpmrf_cpp.dwconv_geglu(channels_last(x), weight.contiguous(), bias, gate_first, room)
    return out if room is out else out.copy_(room)


def _cpp_dwconv_geglu_backward(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool
) -> Gradients:
    x_last, bias = channels_last(x), _or_empty(bias, weight)
    dconv = channels_last_room(torch.empty_like(x))
    torch.ops.lpmrf_cpp.dwconv_geglu_backward(channels_last(g), x_last, weight.contiguous(), bias, gate_first, dconv)
    dx, dweight, dbias = cpp_depthwise_backward(dconv, x_last, weight)
    return laid_out_like(dx, x), dweight, dbias


def _torch_geglu(x: Tensor, gate_first: bool) -> Tensor:
    return laid_out_like(reference.geglu(x, 1, gate_first), x[:, : x.shape[1] // 2])


def _torch_geglu_backward(x: Tensor, g: Tensor, gate_first: bool) -> Tensor:
    gate, value = x.chunk(2, dim=1) if gate_first else x.chunk(2, dim=1)[::-1]
    dgate = torch.ops.aten.gelu_backward(g * value, gate)
    dvalue = g * torch.nn.functional.gelu(gate)
    return laid_out_like(torch.cat([dgate, dvalue] if gate_first else [dvalue, dgate], dim=1), x)


def _torch_dwconv_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    return laid_out_like(reference.dwconv_geglu(x, weight, bias, gate_first), x[:, : x.shape[1] // 2])


def _torch_dwconv_geglu_backward(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool
) -> Gradients:
    dconv = _torch_geglu_backward(reference.depthwise_conv(x, weight, bias), g, gate_first)
    dx, dweight, dbias = torch_depthwise_backward(dconv, x, weight)
    return laid_out_like(dx, x), dweight, dbias


def _refuses(x, *rest):
    return refuses_dtypes(x, *(t for t in rest if isinstance(t, Tensor)))


def _refuses_cpp(x, *rest):
    return refuses_dtypes_cpp(x, *(t for t in rest if isinstance(t, Tensor)))


def _geglu_cases() -> list[CompileCase]:
    kernels = (
        (_geglu_fwd_kernel, "forward", {"x": "x", "o": "out"}, "geglu"),
        (_geglu_bwd_kernel, "backward", {"g": "g", "x": "x", "d": "dx"}, "geglu_backward"),
    )
    sizes, flags = ("hidden", "pixels", "width"), {"GATE_FIRST": False, "ADJOIN": True}
    return [
        compile_case(kernel, label, dtype, maps, (), sizes, flags, TILE, config)
        for dtype in DTYPES.values()
        for kernel, label, maps, config in kernels
    ]


def _dwconv_geglu_cases() -> list[CompileCase]:
    kernels = (
        (_dwconv_geglu_fwd_kernel, "forward", {"x": "x", "o": "out"}, "dwconv_geglu"),
        (_dwconv_geglu_bwd_kernel, "backward", {"g": "g", "x": "x", "d": "dconv"}, "dwconv_geglu_backward"),
    )
    sizes, flags = ("hidden", "height", "width"), {"HAS_BIAS": True, "GATE_FIRST": True}
    return [
        compile_case(kernel, label, dtype, maps, ("weight", "bias"), sizes, flags, CONV_TILE, config)
        for dtype in DTYPES.values()
        for kernel, label, maps, config in kernels
    ] + [backward_case(dtype) for dtype in DTYPES.values()]


_CANDIDATES = choices(BLOCK_P=(8, 16, 32), BLOCK_C=(128, 256), num_warps=(4, 8))


def _tune_geglu(device):
    """HDiT's levels; the gradients at a training's batch."""
    for batch, hidden, side in ((1, 768, 128), (1, 1536, 64), (8, 768, 128)):
        yield map_to_tune(device, batch, 2 * hidden, side), False
    yield map_to_tune(device, 8, 2 * 768, 128, gradients=True), False


def _tune_dwconv_geglu(device):
    """LooUFormer's levels."""
    for batch, hidden, side in ((1, 768, 64), (1, 1536, 32), (1, 2304, 16), (8, 768, 64)):
        for gradients in (False, True) if batch == 8 else (False,):
            weight, bias = torch.randn(2 * hidden, 1, 3, 3, device=device), torch.randn(2 * hidden, device=device)
            yield map_to_tune(device, batch, 2 * hidden, side, gradients), weight, bias, True


# ---- registration

register(
    Op(
        "geglu",
        forward={
            "triton": Kernel(_launch_geglu, _refuses),
            "cpp": Kernel(_cpp_geglu, _refuses_cpp),
            "torch": Kernel(_torch_geglu),
        },
        backward={
            "triton": Kernel(_launch_geglu_backward, _refuses),
            "cpp": Kernel(_cpp_geglu_backward, _refuses_cpp),
            "torch": Kernel(_torch_geglu_backward),
        },
        compile_cases=_geglu_cases,
        candidates={"geglu": _CANDIDATES, "geglu_backward": _CANDIDATES},
        tune_inputs=_tune_geglu,
    )
)
register(
    Op(
        "dwconv_geglu",
        forward={
            "triton": Kernel(_launch_dwconv_geglu, _refuses),
            "cpp": Kernel(_cpp_dwconv_geglu, _refuses_cpp),
            "torch": Kernel(_torch_dwconv_geglu),
        },
        backward={
            "triton": Kernel(_launch_dwconv_geglu_backward, _refuses),
            "cpp": Kernel(_cpp_dwconv_geglu_backward, _refuses_cpp),
            "torch": Kernel(_torch_dwconv_geglu_backward),
        },
        compile_cases=_dwconv_geglu_cases,
        candidates={
            "dwconv_geglu": CONV_CANDIDATES,
            "dwconv_geglu_backward": CONV_BACKWARD_CANDIDATES,
            "depthwise_backward": BACKWARD_CANDIDATES,  # of both ops with this convolution
        },
        tune_inputs=_tune_dwconv_geglu,
    )
)


def _check(op: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    check_map(op, x)
    if x.shape[1] % 2:
        raise ValueError(f"{op}: the channels are two halves, so their number must be even, got {x.shape[1]}")
    if weight is not None:
        check_parameter(op, "weight", weight, (x.shape[1], 1, 3, 3), x)
    if bias is not None:
        check_parameter(op, "bias", bias, (x.shape[1],), x)


@torch.library.custom_op("lpmrf::geglu", mutates_args=())
def _geglu(x: Tensor, gate_first: bool) -> Tensor:
    _check("geglu", x)
    return run("geglu", x, gate_first)


@torch.library.custom_op("lpmrf::geglu_backward", mutates_args=())
def _geglu_backward(g: Tensor, x: Tensor, gate_first: bool) -> Tensor:
    return run("geglu", x, g, gate_first, direction="backward")


@torch.library.custom_op("lpmrf::dwconv_geglu", mutates_args=())
def _dwconv_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool) -> Tensor:
    _check("dwconv_geglu", x, weight, bias)
    return run("dwconv_geglu", x, weight, bias, gate_first)


@torch.library.custom_op("lpmrf::dwconv_geglu_backward", mutates_args=())
def _dwconv_geglu_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return run("dwconv_geglu", x, g, weight, bias, gate_first, direction="backward")


@_geglu.register_fake
def _(x, gate_first):
    _check("geglu", x)
    return _half(x)


@_geglu_backward.register_fake
def _(g, x, gate_first):
    return torch.empty_like(x)


@_dwconv_geglu.register_fake
def _(x, weight, bias, gate_first):
    _check("dwconv_geglu", x, weight, bias)
    return _half(x)


@_dwconv_geglu_backward.register_fake
def _(g, x, weight, bias, gate_first):
    sums = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), weight.new_empty(weight.shape), x.new_empty(x.shape[1], dtype=sums)


def _setup_geglu(ctx, inputs, output):
    x, ctx.gate_first = inputs
    ctx.save_for_backward(x)
    ctx.backend = forced_backend() or "auto"


def _backward_geglu(ctx, g):
    with use_backend(ctx.backend):
        return torch.ops.lpmrf.geglu_backward(g, *ctx.saved_tensors, ctx.gate_first), None


def _setup_dwconv_geglu(ctx, inputs, output):
    x, weight, bias, ctx.gate_first = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.backend = forced_backend() or "auto"


def _backward_dwconv_geglu(ctx, g):
    x, weight, bias = ctx.saved_tensors
    with use_backend(ctx.backend):
        dx, dweight, dbias = torch.ops.lpmrf.dwconv_geglu_backward(g, x, weight, bias, ctx.gate_first)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None


_geglu.register_autograd(_backward_geglu, setup_context=_setup_geglu)
_dwconv_geglu.register_autograd(_backward_dwconv_geglu, setup_context=_setup_dwconv_geglu)
# No autocast rules: x comes from a matrix product, which autocast has made bfloat16 or float16 already, and parameters
# stay float32, which the kernels take as they are.


# ---- public


def geglu(x: Tensor, dim: int = -1, gate_first: bool = False) -> Tensor:
    """gelu(gate) · value of the two halves of `dim`: the last one (..., 2C), or 1 of (B, 2C, H, W).

    gate_first: which half is the gate. GELU is the exact one. x: any float dtype and strides; a tensor of more than
    four dimensions is flattened. Returns a new tensor with half of `dim`, in x's dtype and memory format.
    Differentiable.
    Raises TypeError for another dtype, ValueError for an odd size or another `dim`.
    """
    if x.dim() == 4 and dim in (1, -3):
        return torch.ops.lpmrf.geglu(x, gate_first)
    if x.dim() == 0 or dim not in (-1, x.dim() - 1):
        raise ValueError(f"geglu: dim must be the last one, or 1 of (B, 2C, H, W), got {dim} of {tuple(x.shape)}")
    maps = x.flatten(0, x.dim() - 4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]
    out = torch.ops.lpmrf.geglu(maps.movedim(-1, 1), gate_first)
    return out.movedim(1, -1).reshape(*x.shape[:-1], x.shape[-1] // 2)


def dwconv_geglu(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, gate_first: bool = True
) -> Tensor:
    """gelu(gate) · value of the two halves of h = dwconv3x3(x) + bias, zero padding: a gated feed-forward's middle.

    x: (B, 2C, H, W), any float dtype and memory format, channels-last best. weight: (2C, 1, 3, 3); None: h is x, then
    without a bias. bias: (2C,) or None. gate_first: which half is the gate. Returns a new (B, C, H, W) tensor in x's
    dtype and memory format. Differentiable in x, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes or devices.
    """
    if weight is None:
        if bias is not None:
            raise ValueError("dwconv_geglu: there is a bias but no weight; add it to the projection before")
        return geglu(x, 1, gate_first)
    return torch.ops.lpmrf.dwconv_geglu(x, weight, bias, gate_first)
