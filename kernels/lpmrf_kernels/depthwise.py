"""Depthwise 3x3 convolution: what the ops that fuse one share, forward tiles and the whole backward.

The tile of a program is ROWS rows by BLOCK_W columns by BLOCK_C channels of a logical NCHW map, read by its strides. A
forward kernel walks down its rows and carries two sums, so each input row is loaded three times (its left, middle and
right columns), not nine. Padding is zero; weights are (C, 1, 3, 3).

Backward, from the gradient g of the convolution's output: dx is the convolution of g with the taps turned round;
dweight and dbias are summed by each program over its tile, in float32, then over the programs: two stages, no atomics.
Traffic: g and x read once, dx written once, and 40 / (ROWS · BLOCK_W) bytes of partial sums an element.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ._triton import jit, tl, triton
from .launch import choices, launch_config
from .registry import CompileCase

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STRIDES = ("b", "c", "h", "w")


# ---- parts of kernels


@jit
def tile_of(pid, channels, height, width, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch element, first row, columns [BLOCK_W, 1] and channels [1, BLOCK_C] of a program; channels run fastest."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_w = tl.cdiv(width, BLOCK_W)
    blocks_h = tl.cdiv(height, ROWS)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rest = pid // blocks_c
    x = rest % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    rest = rest // blocks_w
    return (rest // blocks_h).to(tl.int64), rest % blocks_h * ROWS, x, c


@jit
def load_taps(weight_ptr, c, mask_c):
    """The nine taps of the channels c, float32 [1, BLOCK_C] each, row by row."""
    p = weight_ptr + c * 9
    return (
        tl.load(p, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 1, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 2, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 3, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 4, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 5, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 6, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 7, mask=mask_c, other=0).to(tl.float32),
        tl.load(p + 8, mask=mask_c, other=0).to(tl.float32),
    )


@jit
def load_row(image_ptr, y, x, mask_c, height, width, stride_h, stride_w):
    """Columns x - 1, x and x + 1 of row y in float32, zero outside of the map: three of [BLOCK_W, BLOCK_C].

    image_ptr has the batch element's and the channels' offsets.
    """
    p = image_ptr + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    inside = mask_c & (y >= 0) & (y < height)
    left = tl.load(p - stride_w, mask=inside & (x >= 1) & (x <= width), other=0).to(tl.float32)
    middle = tl.load(p, mask=inside & (x < width), other=0).to(tl.float32)
    right = tl.load(p + stride_w, mask=inside & (x + 1 < width), other=0).to(tl.float32)
    return left, middle, right


@jit
def roll(row, taps, bias, ending, middle):
    """Input row y ends output row y - 1, continues row y and begins row y + 1; returns those three."""
    left, here, right = row
    # In this order each product and sum is one instruction.
    ended = ending + left * taps[6] + here * taps[7] + right * taps[8]
    ending = middle + left * taps[3] + here * taps[4] + right * taps[5]
    middle = bias + left * taps[0] + here * taps[1] + right * taps[2]
    return ended, ending, middle


# ---- backward


@jit
def _depthwise_bwd_kernel(
    g_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,  # [B · blocks of rows · blocks of columns, 10, C]: nine taps and the bias
    channels,
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
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    b, y0, x, c = tile_of(pid, channels, height, width, ROWS, BLOCK_W, BLOCK_C)
    mask_c = c < channels
    w = load_taps(weight_ptr, c, mask_c)
    turned = (w[8], w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0])
    c64 = c.to(tl.int64)
    g_image = g_ptr + b * stride_gb + c64 * stride_gc
    x_image = x_ptr + b * stride_xb + c64 * stride_xc + x.to(tl.int64) * stride_xw
    dx_image = dx_ptr + b * stride_db + c64 * stride_dc + x.to(tl.int64) * stride_dw
    mask = mask_c & (x < width)

    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    ending, middle = zero, zero
    # Input rows y - 1, y and y + 1 where they are this program's own, else zero: no pixel is counted twice.
    before, here = zero, zero
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s_bias = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(ROWS + 2):
        y = y0 + i - 1
        row = load_row(g_image, y, x, mask_c, height, width, stride_gh, stride_gw)
        left, centre, right = row
        own = mask & (i < ROWS) & (y + 1 < height)
        after = tl.load(x_image + (y + 1).to(tl.int64) * stride_xh, mask=own, other=0).to(tl.float32)
        # The pixel p meets g at p + (1, 1) - tap.
        s0 += before * right
        s1 += before * centre
        s2 += before * left
        s3 += here * right
        s4 += here * centre
        s5 += here * left
        s6 += after * right
        s7 += after * centre
        s8 += after * left
        s_bias += tl.where((i > 0) & (i <= ROWS), centre, 0.0)
        before = here
        here = after
        ended, ending, middle = roll(row, turned, 0.0, ending, middle)
        done = mask & (i >= 2) & (y - 1 < height)
        tl.store(dx_image + (y - 1).to(tl.int64) * stride_dh, ended, mask=done)

    c_out = tl.arange(0, BLOCK_C) + pid % tl.cdiv(channels, BLOCK_C) * BLOCK_C
    p = partial_ptr + (pid // tl.cdiv(channels, BLOCK_C)).to(tl.int64) * 10 * channels + c_out
    mask_out = c_out < channels
    tl.store(p, tl.sum(s0, 0), mask=mask_out)
    tl.store(p + channels, tl.sum(s1, 0), mask=mask_out)
    tl.store(p + 2 * channels, tl.sum(s2, 0), mask=mask_out)
    tl.store(p + 3 * channels, tl.sum(s3, 0), mask=mask_out)
    tl.store(p + 4 * channels, tl.sum(s4, 0), mask=mask_out)
    tl.store(p + 5 * channels, tl.sum(s5, 0), mask=mask_out)
    tl.store(p + 6 * channels, tl.sum(s6, 0), mask=mask_out)
    tl.store(p + 7 * channels, tl.sum(s7, 0), mask=mask_out)
    tl.store(p + 8 * channels, tl.sum(s8, 0), mask=mask_out)
    tl.store(p + 9 * channels, tl.sum(s_bias, 0), mask=mask_out)


# ---- launchers

# Four channels a thread: 8-byte loads, and the eighteen taps of two tiles stay in registers. Eight rows share them.
CONV_TILE = {"ROWS": 8, "BLOCK_W": 8, "BLOCK_C": 64, "num_warps": 4}


CONV_CANDIDATES = choices(ROWS=(4, 8), BLOCK_W=(8, 16), BLOCK_C=(64, 128), num_warps=(4, 8))
CONV_BACKWARD_CANDIDATES = choices(ROWS=(4, 8), BLOCK_W=(8,), BLOCK_C=(64, 128), num_warps=(4, 8))


def conv_default(out: Tensor) -> dict[str, int]:
    """A forward kernel's tile: fewer rows where eight leave a large GPU short of programs."""
    many = conv_grid(out, CONV_TILE)[0] >= 512
    return CONV_TILE if many else {**CONV_TILE, "ROWS": 4}


def conv_grid(out: Tensor, config: dict[str, int]) -> tuple[int]:
    B, C, H, W = out.shape
    sizes = ((C, "BLOCK_C"), (H, "ROWS"), (W, "BLOCK_W"))
    return (B * math.prod(triton.cdiv(n, config[block]) for n, block in sizes),)


def launch_depthwise_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dweight like weight, dbias (C,) float32) from the gradient g of the convolution's output."""
    dx = torch.empty_like(x)
    B, C, H, W = x.shape
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros(C, device=x.device)
    # Sixteen rows keep the partial sums below a tenth of the traffic.
    config = launch_config("depthwise_backward", x.device, BACKWARD_DEFAULT, pixels=H * W, channels=C)
    grid = conv_grid(x, config)
    partial = torch.empty(grid[0] // triton.cdiv(C, config["BLOCK_C"]), 10, C, device=x.device)
    with torch.cuda.device_of(x):
        _depthwise_bwd_kernel[grid](
            g, x, weight.contiguous(), dx, partial, C, H, W, *g.stride(), *x.stride(), *dx.stride(), **config
        )
    dweight = partial[:, :9].sum(0).T.reshape(weight.shape)
    return dx, dweight.to(weight.dtype), partial[:, 9].sum(0)


BACKWARD_DEFAULT = {"ROWS": 16, "BLOCK_W": 8, "BLOCK_C": 64, "num_warps": 4}
BACKWARD_CANDIDATES = choices(ROWS=(8, 16), BLOCK_W=(8,), BLOCK_C=(64, 128), num_warps=(4, 8))


def map_to_tune(device, batch: int, channels: int, side: int, gradients: bool = False) -> Tensor:
    """A bfloat16 channels-last map of the velocity network."""
    x = torch.randn(batch, side, side, channels, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    return x.requires_grad_(gradients)


def cpp_depthwise_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in C++."""
    dx = torch.empty_like(x)
    room = channels_last_room(dx)
    dweight, dbias = torch.zeros(weight.shape), torch.zeros(x.shape[1])
    torch.ops.lpmrf_cpp.depthwise_backward(
        channels_last(g), channels_last(x), weight.contiguous(), room, dweight, dbias
    )
    return (dx if room is dx else dx.copy_(room)), dweight.to(weight.dtype), dbias


def torch_depthwise_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward as PyTorch computes it."""
    ones = [1, 1]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        g, x, weight.to(x.dtype), None, ones, ones, ones, False, [0, 0], x.shape[1], [True, True, False]
    )
    at_least_fp32 = torch.promote_types(g.dtype, torch.float32)
    return dx, dweight.to(weight.dtype), g.sum((0, 2, 3), dtype=at_least_fp32)


def channels_last(x: Tensor) -> Tensor:
    """x itself where its channels are neighbours in memory, else a channels-last copy: what the C++ kernels take."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def channels_last_room(out: Tensor) -> Tensor:
    """out itself, still empty, where a C++ kernel can write it, else a channels-last tensor of its shape."""
    if out.stride(1) == 1 or out.shape[1] == 1:
        return out
    return torch.empty_like(out, memory_format=torch.channels_last)


def compile_case(
    kernel, label: str, dtype: str, maps: dict[str, str], others, sizes, flags, tile, config: str
) -> CompileCase:
    """A case at channels-last maps of usual sizes. maps: prefix of a map's strides → name of its pointer. config: the
    launch's name."""
    strides = [f"stride_{t}{d}" for t in maps for d in STRIDES]
    return CompileCase(
        f"{dtype} {label}",
        kernel,
        {**{f"{t}_ptr": f"*{dtype}" for t in (*maps.values(), *others)}, **dict.fromkeys((*sizes, *strides), "i32")},
        {**{f"stride_{t}c": 1 for t in maps}, **flags, **{k: n for k, n in tile.items() if k != "num_warps"}},
        tile["num_warps"],
        aligned=True,
        config=config,
        raced=dtype == "bf16",
    )


def backward_case(dtype: str) -> CompileCase:
    maps = {"g": "g", "x": "x", "d": "dx"}
    case = compile_case(
        _depthwise_bwd_kernel,
        "depthwise backward",
        dtype,
        maps,
        ("weight",),
        ("channels", "height", "width"),
        {},
        BACKWARD_DEFAULT,
        "depthwise_backward",
    )
    return replace(case, signature={**case.signature, "partial_ptr": "*fp32"})


# ---- what every op with this convolution checks


def check_map(op: str, x: Tensor, name: str = "x") -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must have a float dtype, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be (B, C, H, W), got the shape {tuple(x.shape)}")


def check_parameter(op: str, name: str, p: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not p.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must have a float dtype, got {p.dtype}")
    if tuple(p.shape) != shape:
        raise ValueError(f"{op}: {name} must have the shape {shape} here, got {tuple(p.shape)}")
    if p.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {p.device}")


def refuses_dtypes(*tensors: Tensor | None, cpu: bool = False) -> str | None:
    """The kernels take float32, bfloat16 and float16 tensors, the C++ ones no float16 maps (the first tensor)."""
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"the kernel takes float32, bfloat16 and float16 tensors, not {t.dtype}"
    if cpu and tensors[0].dtype == torch.float16:
        return "the C++ kernel takes float32 and bfloat16 maps, not torch.float16"
    return None


def refuses_dtypes_cpp(*tensors: Tensor | None) -> str | None:
    return refuses_dtypes(*tensors, cpu=True)
