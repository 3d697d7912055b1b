"""Attention in SwinIR's windows: cyclic shift, partition, relative-position bias, mask, softmax and merge in one.

    y = unroll(merge(softmax(q kᵀ · scale + bias + mask) v)),    (q | k | v) = partition(roll(x, -shift))

Shapes      x (B, H, W, 3C), what the qkv projection writes: q, k and v, each heads · D channels. bias (heads, L, L),
            L = window_size² tokens of a window, query first. y (B, H, W, C). H and W are multiples of window_size.
Mask        -100 between tokens of a window that the shift brought together from two sides of the map, as in Swin. It is
            computed from coordinates, never loaded.
Dtypes      x float32, bfloat16 or float16; bias any float. y has x's dtype.
Layouts     x is read in place with its own strides; y is contiguous, as the projection behind it wants it.
Arithmetic  Products accumulate in float32; logits, bias and softmax are float32. Probabilities are rounded to x's dtype
            for the product with v, as everywhere.
Traffic     x once and y once. PyTorch makes about ten passes: roll, partition, three head copies, scores (L/D times x),
            bias, mask, softmax, merge, roll. Backward: x and g, then dx; scores and softmax are computed again, nothing
            is saved but the inputs.
Gradients   dbias in two stages, without atomics: each program sums its windows, then the programs' sums are added.
Fallback    The kernels take windows of up to 64 tokens (8x8) and heads of up to 64 channels; C++ takes any, in float32
            and bfloat16. Everything else, float64 above all, goes to the reference and is counted.
Source      Liu et al. 2021 (Swin), Liang et al. 2021 (SwinIR, arXiv 2108.10257).
"""

import math

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl
from .launch import choices, launch_config
from .registry import OPS, CompileCase, Kernel, Op, choose, register, run
from .tiles import DTYPES, load_tile, tile_size, upcast

PROGRAMS = 512  # of a backward pass, about; one number for all GPUs, so that they add up alike
CPP_PARTS = 32  # partial sums of dbias in C++, whatever the number of threads


# ---- kernels


@jit
def _window_tokens(window, height, width, shift, SIZE: tl.constexpr, BLOCK_L: tl.constexpr):
    """Row and column in the map of each token of a window, and the part of the rolled map that it is in."""
    token = tl.arange(0, BLOCK_L)
    across = width // SIZE
    y = window // across * SIZE + token // SIZE
    x = window % across * SIZE + token % SIZE
    part_y = (y >= height - SIZE).to(tl.int32) + (y >= height - shift).to(tl.int32)
    part_x = (x >= width - SIZE).to(tl.int32) + (x >= width - shift).to(tl.int32)
    return (y + shift) % height, (x + shift) % width, 3 * part_y + part_x  # [BLOCK_L] each


@jit
def _window_offsets(b, y, x, stride_b, stride_h, stride_w, ALIGN: tl.constexpr):
    """Triton sees multiples of 16 by itself; 540, three times six heads of 30 channels, it has to be told about."""
    return tl.multiple_of(b * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w, ALIGN)


@jit
def _window_probabilities(q, k, bias, part, scale, L: tl.constexpr, BLOCK_L: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias  # [BLOCK_L, BLOCK_L], query first
    s += tl.where(part[:, None] == part[None, :], 0.0, -100.0)
    if L < BLOCK_L:
        s = tl.where(tl.arange(0, BLOCK_L)[None, :] < L, s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p * (1.0 / tl.sum(p, 1))[:, None]


@jit
def _window_attention_fwd_kernel(
    x_ptr,
    bias_ptr,  # [heads, L, L], float32
    y_ptr,
    height,
    width,
    shift,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_yb,
    stride_yh,
    stride_yw,
    scale,
    UPCAST: tl.constexpr,
    ALIGN: tl.constexpr,  # every offset of a head in x and y is a multiple of it
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,  # channels of a head
    SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = SIZE * SIZE
    pid = tl.program_id(0)
    head = pid % HEADS  # heads of a window share its rows of memory
    windows = (height // SIZE) * (width // SIZE)
    b = (pid // HEADS // windows).to(tl.int64)
    y, x, part = _window_tokens(pid // HEADS % windows, height, width, shift, SIZE, BLOCK_L)
    t = tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)
    mask = (t < L)[:, None] & (d < DEPTH)[None, :]

    rows = _window_offsets(b, y, x, stride_xb, stride_xh, stride_xw, ALIGN)
    offs = rows[:, None] + (head * DEPTH + d)[None, :] * stride_xc
    q = load_tile(x_ptr, offs, mask, UPCAST)  # [BLOCK_L, BLOCK_D]
    k = load_tile(x_ptr + HEADS * DEPTH * stride_xc, offs, mask, UPCAST)
    v = load_tile(x_ptr + 2 * HEADS * DEPTH * stride_xc, offs, mask, UPCAST)
    bias = tl.load(
        bias_ptr + head * (L * L) + t[:, None] * L + t[None, :], mask=(t < L)[:, None] & (t < L)[None, :], other=0.0
    )
    p = _window_probabilities(q, k, bias, part, scale, L, BLOCK_L)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee")

    rows = _window_offsets(b, y, x, stride_yb, stride_yh, stride_yw, ALIGN)
    offs = rows[:, None] + (head * DEPTH + d)[None, :]
    tl.store(y_ptr + offs, out, mask=mask)


@jit
def _window_attention_bwd_kernel(
    g_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,  # [programs / heads, heads, L, L], float32: this program's sum
    batch,
    height,
    width,
    shift,
    steps,  # windows a program
    stride_gb,
    stride_gh,
    stride_gw,
    stride_gc,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_db,
    stride_dh,
    stride_dw,
    scale,
    UPCAST: tl.constexpr,
    ALIGN: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    L: tl.constexpr = SIZE * SIZE
    pid = tl.program_id(0)
    head = pid % HEADS
    windows = (height // SIZE) * (width // SIZE)
    t = tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)
    mask = (t < L)[:, None] & (d < DEPTH)[None, :]
    square = t[:, None] * L + t[None, :]
    mask_square = (t < L)[:, None] & (t < L)[None, :]
    channels = (head * DEPTH + d)[None, :]
    dbias_ptr += pid.to(tl.int64) * (L * L)

    first = pid // HEADS * steps
    for window in tl.range(first, min(first + steps, batch * windows), num_stages=1):
        b = (window // windows).to(tl.int64)
        y, x, part = _window_tokens(window % windows, height, width, shift, SIZE, BLOCK_L)
        offs = _window_offsets(b, y, x, stride_xb, stride_xh, stride_xw, ALIGN)[:, None] + channels * stride_xc
        q = load_tile(x_ptr, offs, mask, UPCAST)
        k = load_tile(x_ptr + HEADS * DEPTH * stride_xc, offs, mask, UPCAST)
        v = load_tile(x_ptr + 2 * HEADS * DEPTH * stride_xc, offs, mask, UPCAST)
        offs = _window_offsets(b, y, x, stride_gb, stride_gh, stride_gw, ALIGN)[:, None] + channels * stride_gc
        g = load_tile(g_ptr, offs, mask, UPCAST)

        bias = tl.load(bias_ptr + head * (L * L) + square, mask=mask_square, other=0.0)
        p = _window_probabilities(q, k, bias, part, scale, L, BLOCK_L)
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision="ieee")
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        # The sum lives in the cache: in registers, it would not fit beside the rest.
        tl.store(dbias_ptr + square, tl.load(dbias_ptr + square, mask=mask_square) + ds, mask=mask_square)
        tl.debug_barrier()  # what a thread adds to next time, another may have written
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale

        offs = _window_offsets(b, y, x, stride_db, stride_dh, stride_dw, ALIGN)[:, None] + channels
        tl.store(dx_ptr + offs, dq, mask=mask)
        tl.store(dx_ptr + HEADS * DEPTH + offs, dk, mask=mask)
        tl.store(dx_ptr + 2 * HEADS * DEPTH + offs, dv, mask=mask)


# ---- launchers


def _launch_window_attention(x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float) -> Tensor:
    y = _output(x)
    if y.numel():
        B, H, W, _ = x.shape
        programs = B * (H // window_size) * (W // window_size) * len(bias)
        config = launch_config("window_attention", x.device, {"num_warps": 4}, programs=programs)
        with torch.cuda.device_of(x):
            _window_attention_fwd_kernel[(programs,)](
                x, bias.float().contiguous(), y, H, W, shift, *x.stride(), *y.stride()[:3], scale,
                **_constants(x, bias, window_size, y), **config,
            )  # fmt: skip
    return y


def _launch_window_attention_backward(
    g: Tensor, x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, W, _ = x.shape
    heads = len(bias)
    windows = B * (H // window_size) * (W // window_size)
    steps = max(-(-windows * heads // PROGRAMS), 1)
    parts = -(-windows // steps)
    dx, dbias = _gradients(x, bias, parts)
    dbias.zero_()
    if x.numel():
        config = launch_config("window_attention_backward", x.device, _backward_warps(x), programs=parts * heads)
        with torch.cuda.device_of(x):
            _window_attention_bwd_kernel[(parts * heads,)](
                g, x, bias.float().contiguous(), dx, dbias, B, H, W, shift, steps,
                *g.stride(), *x.stride(), *dx.stride()[:3], scale,
                **_constants(x, bias, window_size, g, dx), **config,
            )  # fmt: skip
    return dx, dbias.sum(0).to(bias.dtype)


def _backward_warps(x: Tensor) -> dict[str, int]:
    """Products of float32 spread over any number of warps, tensor cores take 16 rows a warp."""
    return {"num_warps": 8 if x.dtype == torch.float32 else 4}


def _constants(x: Tensor, bias: Tensor, window_size: int, *others: Tensor) -> dict[str, int | bool | str]:
    heads, tokens, _ = bias.shape
    depth = x.shape[3] // 3 // heads
    strides = (stride for t in (x, *others) for stride in t.stride()[:3])
    return {
        "UPCAST": upcast(x.dtype),
        "ALIGN": math.gcd(16, depth, *strides),
        "HEADS": heads,
        "DEPTH": depth,
        "SIZE": window_size,
        "BLOCK_L": tile_size(tokens),
        "BLOCK_D": tile_size(depth),
    }


def _cpp_window_attention(x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float) -> Tensor:
    y = _output(x)
    if y.numel():
        torch.ops.lpmrf_cpp.window_attention(x, bias.float().contiguous(), window_size, shift, scale, y)
    return y


def _cpp_window_attention_backward(
    g: Tensor, x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    dx, dbias = _gradients(x, bias, CPP_PARTS if x.numel() else 0)
    if x.numel():
        torch.ops.lpmrf_cpp.window_attention_backward(
            g, x, bias.float().contiguous(), window_size, shift, scale, dx, dbias
        )
    return dx, dbias.sum(0).to(bias.dtype)


def _output(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] // 3))


def _gradients(x: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty((parts, *bias.shape), dtype=torch.float32)


def _refuses(x: Tensor, bias: Tensor, *args) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernel takes float32, bfloat16 or float16, not {x.dtype}"
    if bias.shape[1] > 64:
        return "the kernel takes windows of up to 64 tokens"
    if x.shape[3] // 3 // len(bias) > 64:
        return "the kernel takes heads of up to 64 channels"
    return None


def _cpp_refuses(x: Tensor, bias: Tensor, *args) -> str | None:
    return None if x.dtype in (torch.float32, torch.bfloat16) else f"it takes float32 or bfloat16, not {x.dtype}"


def _compile_cases() -> list[CompileCase]:
    """PMRF's SwinIR (heads of 30 channels), ours (32), and a 7x7 window."""
    cases = []
    for dtype, heads, depth, size in (
        (torch.bfloat16, 6, 30, 8),
        (torch.bfloat16, 3, 32, 8),
        (torch.float16, 6, 32, 7),
        (torch.float32, 6, 30, 8),
    ):
        for kernel, tensors in ((_window_attention_fwd_kernel, "xy"), (_window_attention_bwd_kernel, "gxd")):
            x, bias = (
                torch.empty(n, dtype=dtype, device="meta")
                for n in ((1, 64, 64, 3 * heads * depth), (heads, size**2, 1))
            )
            constants = {**_constants(x, bias, size), "UPCAST": False}
            constants |= {f"stride_{t}c": 1 for t in "xg" if t in tensors}
            half, full = f"*{DTYPES[dtype]}", "*fp32"
            pointers = {
                "x_ptr": half,
                "y_ptr": half,
                "g_ptr": half,
                "dx_ptr": half,
                "bias_ptr": full,
                "dbias_ptr": full,
            }
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: pointers.get(name, "i64" if name.startswith("stride") else "i32") for name in names}
            signature["scale"] = "fp32"
            way, warps = (
                ("forward", 4) if kernel is _window_attention_fwd_kernel else ("backward", *_backward_warps(x).values())
            )
            label = f"{way}, {DTYPES[dtype]}, {size}x{size} window, {heads} heads of {depth}"
            aligned = tuple(
                arg for arg in names if arg.endswith("_ptr") or (arg.startswith("stride") and depth % 16 == 0)
            )
            config = "window_attention" if way == "forward" else "window_attention_backward"
            raced = dtype == torch.bfloat16 and depth == 30
            cases.append(CompileCase(label, kernel, signature, constants, warps, aligned, config=config, raced=raced))
    return cases


def _tune_inputs(device):
    """SwinIR of PMRF at 512x512; the gradients at a training's batch."""
    for batch, shift, gradients in ((1, 0, False), (8, 4, False), (32, 4, False), (8, 4, True)):
        x = torch.randn(batch, 64, 64, 3 * 180, device=device, dtype=torch.bfloat16, requires_grad=gradients)
        yield x, torch.randn(6, 64, 64, device=device), 8, shift, 30**-0.5


# ---- registration

register(
    Op(
        "window_attention",
        forward={
            "triton": Kernel(_launch_window_attention, _refuses),
            "cpp": Kernel(_cpp_window_attention, _cpp_refuses),
            "torch": Kernel(reference.window_attention),
        },
        backward={
            "triton": Kernel(_launch_window_attention_backward, _refuses),
            "cpp": Kernel(_cpp_window_attention_backward, _cpp_refuses),
            "torch": Kernel(reference.window_attention_backward),
        },
        compile_cases=_compile_cases,
        candidates={
            "window_attention": choices(num_warps=(2, 4, 8)),
            "window_attention_backward": choices(num_warps=(4, 8)),
        },
        tune_inputs=_tune_inputs,
    )
)


@torch.library.custom_op("lpmrf::window_attention", mutates_args=())
def _window_attention(x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float) -> Tensor:
    return run("window_attention", x, bias, window_size, shift, scale)


@_window_attention.register_fake
def _(x, bias, window_size, shift, scale):
    return _output(x)


@torch.library.custom_op("lpmrf::window_attention_backward", mutates_args=())
def _window_attention_backward(
    g: Tensor, x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return OPS["window_attention"].backward[backend].run(g, x, bias, window_size, shift, scale)


@_window_attention_backward.register_fake
def _(g, x, bias, window_size, shift, scale, backend):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    x, bias, *ctx.arguments = inputs
    ctx.save_for_backward(x, bias)
    ctx.backend = choose("window_attention", *inputs, direction="backward")


def _backward(ctx, g):
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.lpmrf.window_attention_backward(g, x, bias, *ctx.arguments, ctx.backend)
    return dx, dbias, None, None, None


_window_attention.register_autograd(_backward, setup_context=_setup_context)
# No autocast rule: the projection in front has x in autocast's dtype already, and the bias stays float32.


# ---- public


def window_attention(x: Tensor, bias: Tensor, window_size: int, shift: int = 0, scale: float | None = None) -> Tensor:
    """SwinIR's (shifted) window attention between the qkv projection and the output projection.

    x: (B, H, W, 3C), any float dtype and strides: q, k and v, each of heads · D channels; H and W multiples of
    window_size. bias: (heads, L, L), L = window_size², any float dtype, added to the logits of every window, query
    first. shift: 0, or by how many pixels the windows lie further down and right, less than window_size. scale: of the
    logits, by default D**-0.5. Nothing is mutated; differentiable in x and bias.
    Returns (B, H, W, C), contiguous, in x's dtype.
    Raises TypeError for dtypes, ValueError for shapes, devices, a shift or a scale that do not fit.
    """
    if not (x.dtype.is_floating_point and bias.dtype.is_floating_point):
        raise TypeError(f"window_attention: x and bias must have a float dtype, got {x.dtype} and {bias.dtype}")
    if x.dim() != 4:
        raise ValueError(f"window_attention: x must be (B, H, W, 3C), got the shape {tuple(x.shape)}")
    if window_size < 1 or bias.dim() != 3 or tuple(bias.shape[1:]) != (window_size**2, window_size**2):
        tokens = window_size**2
        raise ValueError(f"window_attention: bias must be (heads, {tokens}, {tokens}), got {tuple(bias.shape)}")
    if bias.shape[0] == 0 or x.shape[3] == 0 or x.shape[3] % (3 * bias.shape[0]):
        raise ValueError(
            f"window_attention: x must have 3 · {bias.shape[0]} heads · D channels last, got {x.shape[3]} channels"
        )
    if x.shape[1] % window_size or x.shape[2] % window_size:
        raise ValueError(
            f"window_attention: height and width must be multiples of the window's {window_size},"
            f" got {x.shape[1]}x{x.shape[2]}; pad the map"
        )
    if not 0 <= shift < window_size:
        raise ValueError(f"window_attention: shift must be at least 0 and less than {window_size}, got {shift}")
    if bias.device != x.device:
        raise ValueError(f"window_attention: x and bias must be on one device, got {x.device} and {bias.device}")
    scale = (x.shape[3] // 3 // bias.shape[0]) ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"window_attention: scale must be finite, got {scale}")
    return torch.ops.lpmrf.window_attention(x, bias, window_size, shift, scale)
