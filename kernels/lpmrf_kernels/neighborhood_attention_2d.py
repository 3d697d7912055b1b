"""Neighborhood attention: every pixel attends to the K x K pixels around it.

    out[i] = Σ_j softmax_j(q[i] · k[j] · scale) v[j],    j in rows s(y) … s(y) + K - 1, columns s(x) … s(x) + K - 1
    s(y) = clamp(y - (K - 1) / 2, 0, H - K), s(x) likewise: at a border the window is shifted, never padded or cut

Shapes      q, k, v and out (B, H, W, heads, D); K odd, at most H and W.
Dtypes      q, k, v float32, bfloat16 or float16, all alike; out has it too.
Layouts     q, k and v are read in place with their own strides, as views of one qkv tensor are; out has q's memory
            format as `torch.empty_like` gives it: contiguous for such a view.
Arithmetic  Products accumulate in float32, the softmax is float32 and online. Triton rounds probabilities to q's dtype
            for the product with v, as everywhere; C++ keeps them in float32.
Traffic     q, k, v and out about once: a program takes 8x8 queries, whose 14x14 keys (K = 7) it loads once for all of
            them: three times over the whole map, out of the L2 cache. PyTorch gathers K copies of keys and values, or
            masks the scores of all pixels. Memory is linear in pixels; the backward saves the inputs, out, and the
            logsumexp (4 bytes a query).
Gradients   dq by tiles of queries; dk and dv by tiles of keys, each gathering the queries that see it: no atomics, two
            runs give the same bits.
Not finite  A value that is not finite reaches its whole tile, as in PyTorch's masked form: 0 times NaN is NaN.
Fallback    The kernels take heads of up to 128 channels; C++ takes any, in float32 and bfloat16. Everything
            else, float64 above all, goes to the reference and is counted. No autocast rule: q, k and v come from a
            projection and have autocast's dtype already.
Source      Hassani et al. 2023 (NAT, arXiv 2204.07143), dilation 1: the same windows as NATTEN's na2d. Tiles: Hassani
            et al. 2024 (arXiv 2403.04690). Softmax: Dao 2023 (arXiv 2307.08691).
"""

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl
from .launch import choices, launch_config
from .layout import laid_out_like
from .registry import OPS, CompileCase, Kernel, Op, choose, register, run
from .tiles import DTYPES, load_tile, tile_size, upcast

# ---- kernels


@jit
def _window_start(i, length, K: tl.constexpr):
    return tl.minimum(tl.maximum(i - K // 2, 0), length - K)


@jit
def _inside(i, start, K: tl.constexpr):
    return (i >= start) & (i < start + K)


@jit
def _pixels(y, x, stride_h, stride_w, stride_d, BLOCK_D: tl.constexpr):
    rows = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return rows[:, None] + tl.arange(0, BLOCK_D)[None, :] * stride_d  # [pixels, BLOCK_D]


@jit
def _load_pixels(
    ptr, y, x, mask, stride_h, stride_w, stride_d, UPCAST: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    mask = mask[:, None] & (tl.arange(0, BLOCK_D) < DEPTH)[None, :]
    return load_tile(ptr, _pixels(y, x, stride_h, stride_w, stride_d, BLOCK_D), mask, UPCAST)


@jit
def _tile(height, width, heads, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Photo, head, and the first row and column of this program's tile. Heads of a pixel share its rows of memory."""
    pid = tl.program_id(0)
    head = pid % heads
    tiles_w = tl.cdiv(width, TILE_W)
    tile = pid // heads % (tl.cdiv(height, TILE_H) * tiles_w)
    b = (pid // heads // (tl.cdiv(height, TILE_H) * tiles_w)).to(tl.int64)
    return b, head, tile // tiles_w * TILE_H, tile % tiles_w * TILE_W


@jit
def _neighborhood_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [B, heads, H, W], float32
    height,
    width,
    heads,
    stride_qb,
    stride_qh,
    stride_qw,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kw,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vw,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_ow,
    stride_on,
    stride_od,
    scale,
    UPCAST: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, head, top, left = _tile(height, width, heads, TILE_H, TILE_W)
    m = tl.arange(0, TILE_H * TILE_W)
    qy = top + m // TILE_W
    qx = left + m % TILE_W
    mask_q = (qy < height) & (qx < width)
    q_ptr += b * stride_qb + head * stride_qn
    q = _load_pixels(q_ptr, qy, qx, mask_q, stride_qh, stride_qw, stride_qd, UPCAST, DEPTH, BLOCK_D)
    start_y = _window_start(qy, height, K)
    start_x = _window_start(qx, width, K)

    # The keys that some query of the tile sees: rows first_y … last_y of SPAN columns from first_x on.
    SPAN: tl.constexpr = TILE_W + K - 1
    first_y = _window_start(top, height, K)
    first_x = _window_start(left, width, K)
    count = (_window_start(tl.minimum(top + TILE_H, height) - 1, height, K) + K - first_y) * SPAN
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    scale *= 1.4426950408889634  # log2 e: exp2 is the machine's own
    largest = tl.full((TILE_H * TILE_W,), -1e30, dtype=tl.float32)
    total = tl.zeros((TILE_H * TILE_W,), dtype=tl.float32)
    out = tl.zeros((TILE_H * TILE_W, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        ky = first_y + n // SPAN
        kx = first_x + n % SPAN
        mask_k = (n < count) & (kx < width)
        k = _load_pixels(k_ptr, ky, kx, mask_k, stride_kh, stride_kw, stride_kd, UPCAST, DEPTH, BLOCK_D)
        v = _load_pixels(v_ptr, ky, kx, mask_k, stride_vh, stride_vw, stride_vd, UPCAST, DEPTH, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = _inside(ky[None, :], start_y[:, None], K) & _inside(kx[None, :], start_x[:, None], K)
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = new

    d = tl.arange(0, BLOCK_D)
    out_ptr += b * stride_ob + head * stride_on
    out_ptrs = out_ptr + _pixels(qy, qx, stride_oh, stride_ow, stride_od, BLOCK_D)
    tl.store(out_ptrs, out * (1.0 / total)[:, None], mask=mask_q[:, None] & (d < DEPTH)[None, :])
    lse = 0.6931471805599453 * (largest + tl.log2(total))
    tl.store(lse_ptr + ((b * heads + head) * height + qy) * width + qx, lse, mask=mask_q)


@jit
def _neighborhood_attention_dq_kernel(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,  # like lse: Σ_d g · out of each query, for the other kernel
    height,
    width,
    heads,
    stride_gb,
    stride_gh,
    stride_gw,
    stride_gn,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qw,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kw,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vw,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_ow,
    stride_on,
    stride_od,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xn,
    stride_xd,
    scale,
    UPCAST: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, head, top, left = _tile(height, width, heads, TILE_H, TILE_W)
    m = tl.arange(0, TILE_H * TILE_W)
    qy = top + m // TILE_W
    qx = left + m % TILE_W
    mask_q = (qy < height) & (qx < width)
    g_ptr += b * stride_gb + head * stride_gn
    q_ptr += b * stride_qb + head * stride_qn
    out_ptr += b * stride_ob + head * stride_on
    g = _load_pixels(g_ptr, qy, qx, mask_q, stride_gh, stride_gw, stride_gd, UPCAST, DEPTH, BLOCK_D)
    out = _load_pixels(out_ptr, qy, qx, mask_q, stride_oh, stride_ow, stride_od, UPCAST, DEPTH, BLOCK_D)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    rows = ((b * heads + head) * height + qy) * width + qx
    tl.store(delta_ptr + rows, delta, mask=mask_q)
    q = _load_pixels(q_ptr, qy, qx, mask_q, stride_qh, stride_qw, stride_qd, UPCAST, DEPTH, BLOCK_D)
    lse = tl.load(lse_ptr + rows, mask=mask_q, other=0.0) * 1.4426950408889634
    start_y = _window_start(qy, height, K)
    start_x = _window_start(qx, width, K)

    SPAN: tl.constexpr = TILE_W + K - 1
    first_y = _window_start(top, height, K)
    first_x = _window_start(left, width, K)
    count = (_window_start(tl.minimum(top + TILE_H, height) - 1, height, K) + K - first_y) * SPAN
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    dq = tl.zeros((TILE_H * TILE_W, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        ky = first_y + n // SPAN
        kx = first_x + n % SPAN
        mask_k = (n < count) & (kx < width)
        k = _load_pixels(k_ptr, ky, kx, mask_k, stride_kh, stride_kw, stride_kd, UPCAST, DEPTH, BLOCK_D)
        v = _load_pixels(v_ptr, ky, kx, mask_k, stride_vh, stride_vw, stride_vd, UPCAST, DEPTH, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        seen = _inside(ky[None, :], start_y[:, None], K) & _inside(kx[None, :], start_x[:, None], K)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    d = tl.arange(0, BLOCK_D)
    dq_ptr += b * stride_xb + head * stride_xn
    dq_ptrs = dq_ptr + _pixels(qy, qx, stride_xh, stride_xw, stride_xd, BLOCK_D)
    tl.store(dq_ptrs, dq * scale, mask=mask_q[:, None] & (d < DEPTH)[None, :])


@jit
def _first_seer(key, K: tl.constexpr):
    """The first query whose window holds this key."""
    return tl.where(key < K, 0, key - K // 2)


@jit
def _last_seer(key, length, K: tl.constexpr):
    return tl.where(key >= length - K, length - 1, key + K // 2)


@jit
def _neighborhood_attention_dkdv_kernel(
    g_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    height,
    width,
    heads,
    stride_gb,
    stride_gh,
    stride_gw,
    stride_gn,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qw,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kw,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vw,
    stride_vn,
    stride_vd,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yh,
    stride_yw,
    stride_yn,
    stride_yd,
    scale,
    UPCAST: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, head, top, left = _tile(height, width, heads, TILE_H, TILE_W)
    m = tl.arange(0, TILE_H * TILE_W)
    ky = top + m // TILE_W
    kx = left + m % TILE_W
    mask_k = (ky < height) & (kx < width)
    k_ptr += b * stride_kb + head * stride_kn
    v_ptr += b * stride_vb + head * stride_vn
    k = _load_pixels(k_ptr, ky, kx, mask_k, stride_kh, stride_kw, stride_kd, UPCAST, DEPTH, BLOCK_D)
    v = _load_pixels(v_ptr, ky, kx, mask_k, stride_vh, stride_vw, stride_vd, UPCAST, DEPTH, BLOCK_D)

    # The queries that see some key of the tile. Near a border more of them do, so their number is not a constant.
    first_y = _first_seer(top, K)
    first_x = _first_seer(left, K)
    span = _last_seer(tl.minimum(left + TILE_W, width) - 1, width, K) - first_x + 1
    count = (_last_seer(tl.minimum(top + TILE_H, height) - 1, height, K) - first_y + 1) * span
    g_ptr += b * stride_gb + head * stride_gn
    q_ptr += b * stride_qb + head * stride_qn
    dk = tl.zeros((TILE_H * TILE_W, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((TILE_H * TILE_W, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        qy = first_y + n // span
        qx = first_x + n % span
        mask_q = n < count
        q = _load_pixels(q_ptr, qy, qx, mask_q, stride_qh, stride_qw, stride_qd, UPCAST, DEPTH, BLOCK_D)
        g = _load_pixels(g_ptr, qy, qx, mask_q, stride_gh, stride_gw, stride_gd, UPCAST, DEPTH, BLOCK_D)
        rows = ((b * heads + head) * height + qy) * width + qx
        lse = tl.load(lse_ptr + rows, mask=mask_q, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + rows, mask=mask_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)  # [keys, queries]
        seen_y = _inside(ky[:, None], _window_start(qy, height, K)[None, :], K)
        seen = seen_y & _inside(kx[:, None], _window_start(qx, width, K)[None, :], K) & mask_q[None, :]
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    d = tl.arange(0, BLOCK_D)
    mask = mask_k[:, None] & (d < DEPTH)[None, :]
    dk_ptr += b * stride_xb + head * stride_xn
    dv_ptr += b * stride_yb + head * stride_yn
    tl.store(dk_ptr + _pixels(ky, kx, stride_xh, stride_xw, stride_xd, BLOCK_D), dk * scale, mask=mask)
    tl.store(dv_ptr + _pixels(ky, kx, stride_yh, stride_yw, stride_yd, BLOCK_D), dv, mask=mask)


# ---- launchers


def _launch_neighborhood_attention_2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q)
    if q.numel():
        config = _config("neighborhood_attention_2d", q, kernel_size)
        with torch.cuda.device_of(q):
            _neighborhood_attention_fwd_kernel[_grid(q, config)](
                q, k, v, out, lse, *q.shape[1:4], *q.stride(), *k.stride(), *v.stride(), *out.stride(), scale,
                **_constants(q, kernel_size), **config,
            )  # fmt: skip
    return out, lse


def _launch_neighborhood_attention_2d_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    if q.numel():
        delta = torch.empty_like(lse)
        config = _config("neighborhood_attention_2d_dq", q, kernel_size)
        constants = _constants(q, kernel_size)
        with torch.cuda.device_of(q):
            _neighborhood_attention_dq_kernel[_grid(q, config)](
                g, q, k, v, out, lse, dq, delta, *q.shape[1:4], *g.stride(), *q.stride(), *k.stride(), *v.stride(),
                *out.stride(), *dq.stride(), scale, **constants, **config,
            )  # fmt: skip
            config = _config("neighborhood_attention_2d_dkdv", q, kernel_size)
            _neighborhood_attention_dkdv_kernel[_grid(q, config)](
                g, q, k, v, lse, delta, dk, dv, *q.shape[1:4], *g.stride(), *q.stride(), *k.stride(), *v.stride(),
                *dk.stride(), *dv.stride(), scale, **constants, **config,
            )  # fmt: skip
    return dq, dk, dv


def _grid(q: Tensor, config: dict[str, int]) -> tuple[int]:
    B, H, W, heads, _ = q.shape
    return (B * -(-H // config["TILE_H"]) * -(-W // config["TILE_W"]) * heads,)


def _config(kernel: str, q: Tensor, kernel_size: int) -> dict[str, int]:
    """A table is made with half precision and heads of 64: what is larger may not fit the memory of its choices."""
    B, H, W, heads, D = q.shape
    default = _default(kernel, q)
    if q.dtype == torch.float32 or D > 64:
        return default
    return launch_config(kernel, q.device, default, queries=B * H * W * heads, depth=D, window=kernel_size)


def _default(kernel: str, q: Tensor) -> dict[str, int]:
    """64 queries a program: four warps of 16 rows, or the 64 rows of one wgmma. Every choice fits 99 KB."""
    wide = tile_size(q.shape[4]) > 64
    if q.dtype == torch.float32:
        return {"TILE_H": 8, "TILE_W": 4, "BLOCK_N": 32, "STAGES": 1, "num_warps": 8}
    if kernel == "neighborhood_attention_2d":
        return {"TILE_H": 8, "TILE_W": 8, "BLOCK_N": 64, "STAGES": 2 if wide else 3, "num_warps": 4}
    if kernel.endswith("dkdv"):
        return {"TILE_H": 8, "TILE_W": 8, "BLOCK_N": 32, "STAGES": 2, "num_warps": 8 if wide else 4}
    return {"TILE_H": 8, "TILE_W": 8, "BLOCK_N": 32 if wide else 64, "STAGES": 2, "num_warps": 4}


def _constants(q: Tensor, kernel_size: int) -> dict[str, int | bool]:
    D = q.shape[4]
    return {"UPCAST": upcast(q.dtype), "K": kernel_size, "DEPTH": D, "BLOCK_D": tile_size(D)}


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, H, W, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty((B, heads, H, W), dtype=torch.float32)


def _cpp_neighborhood_attention_2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q)
    if q.numel():
        with _channels_together(out) as (rows,):
            torch.ops.lpmrf_cpp.neighborhood_attention_2d(q, k, v, kernel_size, scale, rows, lse)
    return out, lse


def _cpp_neighborhood_attention_2d_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, ...]:
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    if q.numel():
        with _channels_together(*grads) as rows:
            torch.ops.lpmrf_cpp.neighborhood_attention_2d_backward(g, q, k, v, lse, kernel_size, scale, *rows)
    return grads


@contextmanager
def _channels_together(*outputs: Tensor):
    """Stand-ins for outputs whose channels are not neighbours in memory, copied into them at the end."""
    rows = [t if t.stride(4) == 1 else torch.empty_like(t, memory_format=torch.contiguous_format) for t in outputs]
    yield rows
    for output, filled in zip(outputs, rows, strict=True):
        if filled is not output:
            output.copy_(filled)


def _torch_neighborhood_attention_2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = laid_out_like(reference.neighborhood_attention_2d(q, k, v, kernel_size, scale), q)
    return out, _outputs(q)[1].zero_()  # its backward needs no logsumexp


def _torch_neighborhood_attention_2d_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, ...]:
    grads = reference.neighborhood_attention_2d_backward(g, q, k, v, kernel_size, scale)
    return tuple(laid_out_like(grad, t) for grad, t in zip(grads, (q, k, v), strict=True))


def _refuses(q: Tensor, *args) -> str | None:
    if q.dtype not in DTYPES:
        return f"the kernel takes float32, bfloat16 or float16, not {q.dtype}"
    return None if q.shape[4] <= 128 else "the kernel takes heads of up to 128 channels"


def _cpp_refuses(q: Tensor, *args) -> str | None:
    return None if q.dtype in (torch.float32, torch.bfloat16) else f"it takes float32 or bfloat16, not {q.dtype}"


def _compile_cases() -> list[CompileCase]:
    """7x7 windows and heads of 64 channels, views of one qkv tensor; then the other sizes of a tile."""
    cases = []
    for dtype, D, K in (
        (torch.bfloat16, 64, 7),
        (torch.float16, 32, 5),
        (torch.bfloat16, 128, 7),
        (torch.float32, 64, 7),
    ):
        q = torch.empty(1, 64, 64, 4, D, dtype=dtype, device="meta")
        for kernel, name, tensors in (
            (_neighborhood_attention_fwd_kernel, "neighborhood_attention_2d", "qkvo"),
            (_neighborhood_attention_dq_kernel, "neighborhood_attention_2d_dq", "gqkvox"),
            (_neighborhood_attention_dkdv_kernel, "neighborhood_attention_2d_dkdv", "gqkvxy"),
        ):
            constants = {**_constants(q, K), "UPCAST": False, **_default(name, q)}
            warps = constants.pop("num_warps")
            constants |= {f"stride_{t}d": 1 for t in tensors}
            names = [arg for arg in kernel.arg_names if arg not in constants]
            signature = {arg: "i64" if arg.startswith("stride") else "i32" for arg in names}
            signature |= {arg: f"*{DTYPES[dtype]}" for arg in names if arg.endswith("_ptr")}
            signature |= {arg: "*fp32" for arg in names if arg in ("lse_ptr", "delta_ptr")} | {"scale": "fp32"}
            label = f"{name.removeprefix('neighborhood_attention_2d').strip('_') or 'forward'}, {DTYPES[dtype]}"
            label += f", {K}x{K}, heads of {D}"
            aligned = tuple(arg for arg in names if arg.startswith("stride") or arg.endswith("_ptr"))
            raced = dtype == torch.bfloat16 and D == 64
            cases.append(CompileCase(label, kernel, signature, constants, warps, aligned, config=name, raced=raced))
    return cases


def _tune_inputs(device):
    """The levels of LooUFormer and HDiT; the gradients at a training's batch."""
    for batch, side, heads, gradients in ((1, 64, 4, False), (1, 32, 8, False), (1, 128, 4, False), (8, 64, 4, True)):
        shape, like = (batch, side, side, heads, 64), {"device": device, "dtype": torch.bfloat16}
        yield *(torch.randn(shape, **like, requires_grad=gradients) for _ in range(3)), 7, 0.125


# Those that spill are left out: `compile_report --candidates`.
_FORWARD = [
    choice
    for choice in choices(TILE_H=(8,), TILE_W=(8, 16), BLOCK_N=(32, 64), STAGES=(2, 3), num_warps=(4, 8))
    if choice["TILE_W"] * choice["BLOCK_N"] // choice["num_warps"] <= 128
]
_BACKWARD = choices(TILE_H=(8,), TILE_W=(8,), BLOCK_N=(32, 64), STAGES=(2,), num_warps=(4, 8))


# ---- registration

register(
    Op(
        "neighborhood_attention_2d",
        forward={
            "triton": Kernel(_launch_neighborhood_attention_2d, _refuses),
            "cpp": Kernel(_cpp_neighborhood_attention_2d, _cpp_refuses),
            "torch": Kernel(_torch_neighborhood_attention_2d),
        },
        backward={
            "triton": Kernel(_launch_neighborhood_attention_2d_backward, _refuses),
            "cpp": Kernel(_cpp_neighborhood_attention_2d_backward, _cpp_refuses),
            "torch": Kernel(_torch_neighborhood_attention_2d_backward),
        },
        compile_cases=_compile_cases,
        candidates={
            "neighborhood_attention_2d": _FORWARD,
            "neighborhood_attention_2d_dq": _BACKWARD,
            "neighborhood_attention_2d_dkdv": [c for c in _BACKWARD if c["BLOCK_N"] // c["num_warps"] <= 8],
        },
        tune_inputs=_tune_inputs,
    )
)


@torch.library.custom_op("lpmrf::neighborhood_attention_2d", mutates_args=())
def _neighborhood_attention_2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return run("neighborhood_attention_2d", q, k, v, kernel_size, scale)


@_neighborhood_attention_2d.register_fake
def _(q, k, v, kernel_size, scale):
    return _outputs(q)


@torch.library.custom_op("lpmrf::neighborhood_attention_2d_backward", mutates_args=())
def _neighborhood_attention_2d_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel_size: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return OPS["neighborhood_attention_2d"].backward[backend].run(g, q, k, v, out, lse, kernel_size, scale)


@_neighborhood_attention_2d_backward.register_fake
def _(g, q, k, v, out, lse, kernel_size, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.backend = choose("neighborhood_attention_2d", *inputs, direction="backward")


def _backward(ctx, g, _):
    grads = torch.ops.lpmrf.neighborhood_attention_2d_backward(g, *ctx.saved_tensors, *ctx.arguments, ctx.backend)
    return *grads, None, None


_neighborhood_attention_2d.register_autograd(_backward, setup_context=_setup_context)


# ---- public


def neighborhood_attention_2d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float | None = None) -> Tensor:
    """Each query attends to exactly kernel_size x kernel_size keys around it; at a border the window is shifted.

    q, k, v: (B, H, W, heads, D), one float dtype, any strides: they are read in place. kernel_size: odd, at most H and
    W. scale: of the logits, by default D**-0.5. Nothing is mutated; differentiable in q, k and v.
    Returns a new tensor with q's shape, dtype and memory format; contiguous where q is a view of a larger tensor.
    Raises TypeError for dtypes, ValueError for shapes, devices, a window or a scale that do not fit.
    """
    op = "neighborhood_attention_2d"
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"{op}: q, k and v must have one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dim() != 5 or q.shape[4] == 0:
        raise ValueError(f"{op}: q must be (B, H, W, heads, D), got the shape {tuple(q.shape)}")
    if k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"{op}: q, k and v must have one shape, got {shapes}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"{op}: q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if type(kernel_size) is not int or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size must be odd and positive, got {kernel_size}")
    H, W, D = q.shape[1], q.shape[2], q.shape[4]
    if kernel_size > min(H, W):
        raise ValueError(f"{op}: kernel_size {kernel_size} is larger than the {H}x{W} map; use a larger image")
    scale = D**-0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return torch.ops.lpmrf.neighborhood_attention_2d(q, k, v, kernel_size, scale)[0]
