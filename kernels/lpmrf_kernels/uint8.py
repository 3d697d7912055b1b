"""Photos to and from uint8: range, clamp, rounding, dtype and layout in one pass each way.

    to_uint8    round(clamp((x - low) · 255 / (high - low), 0, 255)), halves to even as torch.round; NaN becomes 0
    from_uint8  x / 255 · (high - low) + low

Shapes      (B, C, H, W) in and out. A photo (H, W, 3) is the channels-last memory of (1, 3, H, W): permute it.
Dtypes      to_uint8: any float in, uint8 out. from_uint8: uint8 in, any float out.
Layouts     The input is read with its own strides, nothing is copied. The result has the input's memory format or the
            one that is asked for, so that planes become a picture file's rows in the same pass.
Arithmetic  float32, whatever the dtype; a difference and a product, or a true quotient: the same bits on every backend
            for the ranges [0, 1] and [-1, 1], whose scales are exact.
Traffic     numel · (sizeof(x) + 1) bytes, one pass. PyTorch makes five (subtract and scale, clamp, round, cast, copy).
Backward    None: uint8 has no gradient, and rounding's is zero almost everywhere.
Fallback    float32, bfloat16 and float16 have kernels; other floats go to the reference and are counted.
"""

import math

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .launch import choices, launch_config
from .registry import CompileCase, Kernel, Op, register, run

FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYOUTS = {
    torch.preserve_format: "preserve",
    torch.contiguous_format: "contiguous",
    torch.channels_last: "channels_last",
}
NO_BACKWARD = "it has none: uint8 has no gradient"


# ---- kernels


@jit
def _tile(
    pixels,
    channels,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    ROWS_JOIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Offsets of one tile of a photo in x and in out, and what of it is there: [BLOCK, BLOCK_C] each."""
    tiles_p = tl.cdiv(pixels, BLOCK)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    pid_p = (pid % tiles_p).to(tl.int64)
    pid_c = (pid // tiles_p % tiles_c).to(tl.int64)
    pid_b = (pid // tiles_p // tiles_c).to(tl.int64)
    p = (pid_p * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = (pid_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if ROWS_JOIN:
        offs_x = p * stride_xw
        offs_o = p * stride_ow
    else:
        offs_x = p // width * stride_xh + p % width * stride_xw
        offs_o = p // width * stride_oh + p % width * stride_ow
    offs_x += pid_b * stride_xb + c * stride_xc
    offs_o += pid_b * stride_ob + c * stride_oc
    return offs_x, offs_o, (p < pixels) & (c < channels)


@jit
def _to_uint8_fwd_kernel(
    x_ptr,
    out_ptr,
    pixels,
    channels,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    low,
    scale,
    ROWS_JOIN: tl.constexpr,  # the rows of a photo follow each other in x and in out
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_x, offs_o, mask = _tile(
        pixels, channels, width, stride_xb, stride_xc, stride_xh, stride_xw,
        stride_ob, stride_oc, stride_oh, stride_ow, ROWS_JOIN, BLOCK, BLOCK_C,
    )  # fmt: skip
    x = (tl.load(x_ptr + offs_x, mask=mask).to(tl.float32) - low) * scale
    x = tl.where(x > 0.0, x, 0.0)  # NaN too
    x = tl.where(x < 255.0, x, 255.0)
    # Beside 2^23 a float32 has no room for fractions: the addition rounds, halves to even, and leaves the integer in
    # the low bits.
    y = (x + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    tl.store(out_ptr + offs_o, y.to(tl.uint8), mask=mask)


@jit
def _from_uint8_fwd_kernel(
    x_ptr,
    out_ptr,
    pixels,
    channels,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    low,
    scale,
    ROWS_JOIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_x, offs_o, mask = _tile(
        pixels, channels, width, stride_xb, stride_xc, stride_xh, stride_xw,
        stride_ob, stride_oc, stride_oh, stride_ow, ROWS_JOIN, BLOCK, BLOCK_C,
    )  # fmt: skip
    x = tl.load(x_ptr + offs_x, mask=mask).to(tl.float32)
    y = tl.div_rn(x, tl.full(x.shape, 255.0, tl.float32)) * scale + low
    tl.store(out_ptr + offs_o, y.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launchers


def _launch(name: str, kernel, x: Tensor, out: Tensor, low: float, scale: float) -> Tensor:
    if out.numel():
        if x.stride() == out.stride() and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            # No pixel moves: one long row of one channel.
            photos, channels, pixels, width = 1, 1, out.numel(), out.numel()
            strides = (0, 0, 0, 1) * 2
        else:
            photos, channels, height, width = x.shape
            pixels, strides = height * width, (*x.stride(), *out.stride())
        join = strides[2] == width * strides[3] and strides[6] == width * strides[7] or pixels == width
        narrow = min(8, triton.next_power_of_2(channels))
        default = {"BLOCK": 4096 // narrow, "BLOCK_C": narrow, "num_warps": 8}  # 16 elements a thread
        config = launch_config(name, x.device, default, numel=out.numel(), channels=channels)
        tiles = triton.cdiv(pixels, config["BLOCK"]) * triton.cdiv(channels, config["BLOCK_C"])
        with torch.cuda.device_of(x):
            kernel[(photos * tiles,)](
                x, out, pixels, channels, width, *strides, low, scale, ROWS_JOIN=join, **config
            )  # fmt: skip
    return out


def _empty(x: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    if layout == "preserve":
        return torch.empty_like(x, dtype=dtype)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format)


def _laid_out(y: Tensor, x: Tensor, layout: str) -> Tensor:
    out = _empty(x, y.dtype, layout)
    return y if y.stride() == out.stride() else out.copy_(y)


def _launch_to_uint8(x: Tensor, low: float, high: float, layout: str) -> Tensor:
    out = _empty(x, torch.uint8, layout)
    return _launch("to_uint8", _to_uint8_fwd_kernel, x, out, low, 255 / (high - low))


def _cpp_to_uint8(x: Tensor, low: float, high: float, layout: str) -> Tensor:
    out = _empty(x, torch.uint8, layout)
    torch.ops.lpmrf_cpp.to_uint8(x, low, 255 / (high - low), out)
    return out


def _torch_to_uint8(x: Tensor, low: float, high: float, layout: str) -> Tensor:
    return _laid_out(reference.to_uint8(x, low, high), x, layout)


def _launch_from_uint8(x: Tensor, low: float, high: float, dtype: torch.dtype, layout: str) -> Tensor:
    out = _empty(x, dtype, layout)
    return _launch("from_uint8", _from_uint8_fwd_kernel, x, out, low, high - low)


def _cpp_from_uint8(x: Tensor, low: float, high: float, dtype: torch.dtype, layout: str) -> Tensor:
    out = _empty(x, dtype, layout)
    torch.ops.lpmrf_cpp.from_uint8(x, low, high - low, out)
    return out


def _torch_from_uint8(x: Tensor, low: float, high: float, dtype: torch.dtype, layout: str) -> Tensor:
    return _laid_out(reference.from_uint8(x, low, high, dtype), x, layout)


def _to_refuses(x: Tensor, *_) -> str | None:
    return None if x.dtype in FLOATS else f"the kernel takes float32, bfloat16 or float16, not {x.dtype}"


def _from_refuses(x: Tensor, low: float, high: float, dtype: torch.dtype, layout: str) -> str | None:
    return None if dtype in FLOATS else f"the kernel makes float32, bfloat16 or float16, not {dtype}"


def _compile_cases(kernel, pointers) -> list[CompileCase]:
    ints = ("pixels", "channels", "width", *(f"stride_{t}{d}" for t in "xo" for d in "bchw"))
    # What is 1 at a launch is a constant to the compiler.
    cases = {
        "flat": dict(BLOCK=4096, BLOCK_C=1, ROWS_JOIN=True, channels=1, stride_xw=1, stride_ow=1),
        "planes to pixels": dict(BLOCK=1024, BLOCK_C=4, ROWS_JOIN=True, stride_xw=1, stride_oc=1),
        "strided": dict(BLOCK=1024, BLOCK_C=4, ROWS_JOIN=False),
    }
    return [
        CompileCase(
            f"{dtype}, {name}",
            kernel,
            {
                **pointers(dtype),
                **dict.fromkeys((n for n in ints if n not in constants), "i64"),
                "low": "fp32",
                "scale": "fp32",
            },
            constants,
            num_warps=8,
            divisible=("pixels", "width", "stride_xc"),
            raced=dtype == "bf16" and name == "planes to pixels",
        )
        for dtype in FLOATS.values()
        for name, constants in cases.items()
    ]


_CANDIDATES = [
    {**choice, "BLOCK": choice["BLOCK"] // narrow, "BLOCK_C": narrow}
    for narrow in (1, 4)
    for choice in choices(BLOCK=(2048, 4096, 8192), num_warps=(4, 8))
]


def _tune_to_uint8(device):
    x = torch.rand(8, 3, 512, 512, device=device).bfloat16()
    yield x, 0.0, 1.0, "channels_last"
    yield x, 0.0, 1.0, "contiguous"


def _tune_from_uint8(device):
    x = torch.zeros(8, 3, 512, 512, dtype=torch.uint8, device=device)
    yield x, 0.0, 1.0, torch.bfloat16, "channels_last"
    yield x, 0.0, 1.0, torch.bfloat16, "contiguous"


# ---- registration

register(
    Op(
        "to_uint8",
        forward={
            "triton": Kernel(_launch_to_uint8, _to_refuses),
            "cpp": Kernel(_cpp_to_uint8, _to_refuses),
            "torch": Kernel(_torch_to_uint8),
        },
        notes={"backward": NO_BACKWARD},
        compile_cases=lambda: _compile_cases(_to_uint8_fwd_kernel, lambda t: {"x_ptr": f"*{t}", "out_ptr": "*u8"}),
        candidates={"to_uint8": _CANDIDATES},
        tune_inputs=_tune_to_uint8,
    )
)
register(
    Op(
        "from_uint8",
        forward={
            "triton": Kernel(_launch_from_uint8, _from_refuses),
            "cpp": Kernel(_cpp_from_uint8, _from_refuses),
            "torch": Kernel(_torch_from_uint8),
        },
        notes={"backward": NO_BACKWARD},
        compile_cases=lambda: _compile_cases(_from_uint8_fwd_kernel, lambda t: {"x_ptr": "*u8", "out_ptr": f"*{t}"}),
        candidates={"from_uint8": _CANDIDATES},
        tune_inputs=_tune_from_uint8,
    )
)


def _check(name: str, x: Tensor, low: float, high: float) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"{name}: x must be (B, C, H, W), got the shape {tuple(x.shape)}; x[None], or permute an (H, W, 3) photo"
        )
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name}: value_range must be finite and increase, got ({low}, {high}); use (0, 1) or (-1, 1)")


def _check_float(name: str, what: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: {what} must be a float dtype, got {dtype}")


@torch.library.custom_op("lpmrf::to_uint8", mutates_args=())
def _to_uint8(x: Tensor, low: float, high: float, layout: str) -> Tensor:
    _check("to_uint8", x, low, high)
    _check_float("to_uint8", "x", x.dtype)
    return run("to_uint8", x, low, high, layout)


@_to_uint8.register_fake
def _(x, low, high, layout):
    _check("to_uint8", x, low, high)
    _check_float("to_uint8", "x", x.dtype)
    return _empty(x, torch.uint8, layout)


@torch.library.custom_op("lpmrf::from_uint8", mutates_args=())
def _from_uint8(x: Tensor, low: float, high: float, dtype: torch.dtype, layout: str) -> Tensor:
    _check_from(x, low, high, dtype)
    return run("from_uint8", x, low, high, dtype, layout)


@_from_uint8.register_fake
def _(x, low, high, dtype, layout):
    _check_from(x, low, high, dtype)
    return _empty(x, dtype, layout)


def _check_from(x, low, high, dtype):
    _check("from_uint8", x, low, high)
    if x.dtype != torch.uint8:
        raise TypeError(f"from_uint8: x must be uint8, got {x.dtype}")
    _check_float("from_uint8", "dtype", dtype)


def _layout(name: str, memory_format: torch.memory_format) -> str:
    if memory_format not in LAYOUTS:
        raise ValueError(f"{name}: memory_format must be one of {', '.join(map(str, LAYOUTS))}, got {memory_format}")
    return LAYOUTS[memory_format]


# ---- public


def to_uint8(
    x: Tensor,
    value_range: tuple[float, float] = (0.0, 1.0),
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Images of `value_range` as uint8: scaled, clamped to [0, 255] and rounded, halves to even. NaN becomes 0.

    x: (B, C, H, W), any float dtype and layout. memory_format: of the result, x's by default;
    `torch.channels_last` makes `.permute(0, 2, 3, 1)` a contiguous (B, H, W, C). Not differentiable.
    Raises TypeError for another dtype, ValueError for another shape, range or memory format.
    """
    return torch.ops.lpmrf.to_uint8(x.detach(), *map(float, value_range), _layout("to_uint8", memory_format))


def from_uint8(
    x: Tensor,
    value_range: tuple[float, float] = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """uint8 images as floats: 0 becomes value_range[0], 255 value_range[1].

    x: (B, C, H, W) uint8, any layout, such as `photo.permute(0, 3, 1, 2)` of (B, H, W, 3). dtype: of the result, a
    float. memory_format: of the result, x's by default. `to_uint8` is its inverse for float32 and float16.
    Raises TypeError for another dtype, ValueError for another shape, range or memory format.
    """
    return torch.ops.lpmrf.from_uint8(x, *map(float, value_range), dtype, _layout("from_uint8", memory_format))
