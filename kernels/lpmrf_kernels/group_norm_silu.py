"""act(GroupNorm(x)): the norm and activation in front of a convolution of SD-VAE, FLUX-VAE and every diffusers UNet.

    y = act((x - mean) / sqrt(var + eps) · weight + bias),    act(n) = n / (1 + exp(-n)) ("silu") or n ("none")

with mean and biased variance over the pixels of a photo and the C / num_groups neighbouring channels of a group.

Shapes      x (B, C, H, W), weight and bias (C,) or None.
Dtypes      x float32, bfloat16 or float16; weight and bias any float. y has x's dtype, all else is float32.
Layouts     Every tensor is read with its own strides, nothing is copied; y has x's memory format.
Statistics  In two stages, without atomics: programs split the pixels, never one program a group, and keep a running
            mean and sum of squared differences of each channel; one small program a group merges them by Chan's
            formula. The backward's sums likewise. Two runs give the same bits, and a large mean costs no digits.
Traffic     x twice and y once, partial results of a few per cent. PyTorch on CUDA reads x twice and writes y, then
            reads and writes once more for SiLU, and copies channels-last to NCHW and back for some of its kernels. The
            second pass goes backwards through memory, so that it begins with what the L2 cache still holds. Backward:
            x and g twice, dx once.
Fallback    float64 goes to the reference and is counted.
Source      Wu & He 2018; Chan, Golub & LeVeque 1979; diffusers ResnetBlock2D.
"""

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .layout import evenly_spaced, image_strides, laid_out_like
from .pixel_norm import DTYPES, check, image_offsets, native, statistics_dtype, tuned
from .registry import OPS, CompileCase, Kernel, Op, backend_of_backward, register, run

PROGRAMS = 2048  # that split the pixels, about; one number for all GPUs, so that they add up alike
MIN_STEPS = 4  # tiles a program at least, or the partial results are too many


# ---- kernels


@jit
def _moments_kernel(
    x_ptr,
    mean_ptr,  # [B, chunks, C]
    m2_ptr,
    channels,
    pixels,
    width,
    steps,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared differences of each channel over one chunk of pixels."""
    chunks = tl.cdiv(pixels, steps * BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    p = (pid % chunks) * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    count = tl.zeros((BLOCK_P,), dtype=tl.float32)
    # Relative to the chunk's first pixel: a large mean costs no digits.
    start = tl.zeros((1,), dtype=tl.int64) + (pid % chunks) * steps * BLOCK_P
    first = b * stride_xb + image_offsets(start, c, width, stride_xc, stride_xh, stride_xw, FLAT)
    shift = tl.load(x_ptr + first, mask=mask_c[None, :], other=0.0).to(tl.float32)  # [1, BLOCK_C]
    for i in range(steps):  # Welford's, in each place of the tile: no exchange between threads in the loop
        mask_p = p < pixels
        mask = mask_p[:, None] & mask_c[None, :]
        offs = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - shift
        d = tl.where(mask, x - mean, 0.0)
        mean += d * (1.0 / (i + 1))
        m2 += d * (x - mean)
        count += mask_p.to(tl.float32)
        p += BLOCK_P
    total = tl.sum(count, 0)
    chunk_mean = tl.sum(mean * (count / total)[:, None], 0)
    d = mean - chunk_mean[None, :]
    m2 = tl.sum(m2 + d * d * count[:, None], 0)
    tl.store(mean_ptr + pid * channels + c, tl.sum(shift, 0) + chunk_mean, mask=mask_c)
    tl.store(m2_ptr + pid * channels + c, m2, mask=mask_c)


@jit
def _merge_moments_kernel(
    mean_ptr,  # [B, chunks, C]
    m2_ptr,
    group_mean_ptr,  # [B, G]
    group_rstd_ptr,
    channels,
    groups,
    pixels,
    chunks,
    chunk,  # pixels of each chunk but the last
    share,  # 1 / elements of a group
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    size = channels // groups
    first = pid // groups * chunks * channels + pid % groups * size
    shift = tl.load(mean_ptr + first)
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        n = tl.minimum(pixels - k * chunk, chunk).to(tl.float32)
        for c0 in range(0, size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (k < chunks)[:, None] & (c < size)[None, :]
            offs = first + k.to(tl.int64)[:, None] * channels + c[None, :]
            mean = tl.load(mean_ptr + offs, mask=mask, other=0.0)
            total += tl.where(mask, (mean - shift) * n[:, None], 0.0)
    group_mean = shift + tl.sum(tl.sum(total, 1), 0) * share
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        n = tl.minimum(pixels - k * chunk, chunk).to(tl.float32)
        for c0 in range(0, size, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (k < chunks)[:, None] & (c < size)[None, :]
            offs = first + k.to(tl.int64)[:, None] * channels + c[None, :]
            d = tl.load(mean_ptr + offs, mask=mask, other=0.0) - group_mean
            m2 = tl.load(m2_ptr + offs, mask=mask, other=0.0)
            total += tl.where(mask, m2 + d * d * n[:, None], 0.0)
    tl.store(group_mean_ptr + pid, group_mean)
    tl.store(group_rstd_ptr + pid, tl.rsqrt(tl.sum(tl.sum(total, 1), 0) * share + eps))


@jit
def _channel_parameters(ptr, c, stride, mask_c, absent):
    if ptr is not None:
        return tl.load(ptr + c * stride, mask=mask_c, other=0.0).to(tl.float32)
    else:
        return tl.where(mask_c, absent, 0.0)


@jit
def _group_norm_silu_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,  # [B, G]
    rstd_ptr,
    y_ptr,
    channels,
    groups,
    pixels,
    width,
    steps,  # tiles a program
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_weight,
    stride_bias,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunks = tl.cdiv(pixels, steps * BLOCK_P)
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # backwards: the L2 cache holds the end of x
    b = pid // chunks
    p = (pid % chunks) * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + group, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    scale = rstd * _channel_parameters(weight_ptr, c, stride_weight, mask_c, 1.0)
    bias = _channel_parameters(bias_ptr, c, stride_bias, mask_c, 0.0)
    for _ in range(steps):
        mask = (p < pixels)[:, None] & mask_c[None, :]
        offs_x = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        offs_y = b * stride_yb + image_offsets(p, c, width, stride_yc, stride_yh, stride_yw, FLAT)
        tl.store(y_ptr + offs_y, y, mask=mask)
        p += BLOCK_P


@jit
def _before_activation(g, x_hat, weight, bias, SILU: tl.constexpr):
    """The gradient of n = x̂ · weight + bias, from that of act(n)."""
    if SILU:
        n = x_hat * weight[None, :] + bias[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-n))
        g = g * sigmoid * (1.0 + n * (1.0 - sigmoid))
    return g


@jit
def _gradient_sums_kernel(
    g_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,  # [B, chunks, C]
    dbias_ptr,
    channels,
    groups,
    pixels,
    width,
    steps,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_weight,
    stride_bias,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over one chunk of pixels of the gradient of n, and of it times x̂."""
    chunks = tl.cdiv(pixels, steps * BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks
    p = (pid % chunks) * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + group, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    weight = _channel_parameters(weight_ptr, c, stride_weight, mask_c, 1.0)
    bias = _channel_parameters(bias_ptr, c, stride_bias, mask_c, 0.0)
    dweight = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for _ in range(steps):
        mask = (p < pixels)[:, None] & mask_c[None, :]
        offs_x = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
        offs_g = b * stride_gb + image_offsets(p, c, width, stride_gc, stride_gh, stride_gw, FLAT)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
        g = _before_activation(g, x_hat, weight, bias, SILU)
        dbias += g
        dweight += g * x_hat
        p += BLOCK_P
    tl.store(dweight_ptr + pid * channels + c, tl.sum(dweight, 0), mask=mask_c)
    tl.store(dbias_ptr + pid * channels + c, tl.sum(dbias, 0), mask=mask_c)


@jit
def _merge_sums_kernel(
    dweight_ptr,  # [B, chunks, C]
    dbias_ptr,
    weight_ptr,
    photo_dweight_ptr,  # [B, C]
    photo_dbias_ptr,
    group_gx_ptr,  # [B, G], means over a group of weight · g · x̂
    group_g_ptr,  # and of weight · g
    channels,
    groups,
    chunks,
    stride_weight,
    share,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    size = channels // groups
    b = pid // groups
    channel = pid % groups * size
    group_gx = tl.zeros((BLOCK_C,), dtype=tl.float32)
    group_g = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for c0 in range(0, size, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask_c = c < size
        dweight = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        dbias = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        for k0 in range(0, chunks, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = (k < chunks)[:, None] & mask_c[None, :]
            offs = (b * chunks + k)[:, None] * channels + (channel + c)[None, :]
            dweight += tl.load(dweight_ptr + offs, mask=mask, other=0.0)
            dbias += tl.load(dbias_ptr + offs, mask=mask, other=0.0)
        photo_dweight = tl.sum(dweight, 0)
        photo_dbias = tl.sum(dbias, 0)
        tl.store(photo_dweight_ptr + b * channels + channel + c, photo_dweight, mask=mask_c)
        tl.store(photo_dbias_ptr + b * channels + channel + c, photo_dbias, mask=mask_c)
        weight = _channel_parameters(weight_ptr, channel + c, stride_weight, mask_c, 1.0)
        group_gx += photo_dweight * weight
        group_g += photo_dbias * weight
    tl.store(group_gx_ptr + pid, tl.sum(group_gx, 0) * share)
    tl.store(group_g_ptr + pid, tl.sum(group_g, 0) * share)


@jit
def _group_norm_silu_bwd_kernel(
    g_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    group_gx_ptr,
    group_g_ptr,
    dx_ptr,
    channels,
    groups,
    pixels,
    width,
    steps,
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
    stride_weight,
    stride_bias,
    SILU: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunks = tl.cdiv(pixels, steps * BLOCK_P)
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    b = pid // chunks
    p = (pid % chunks) * steps * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    group = b * groups + c // (channels // groups)
    mean = tl.load(mean_ptr + group, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    group_gx = tl.load(group_gx_ptr + group, mask=mask_c, other=0.0)
    group_g = tl.load(group_g_ptr + group, mask=mask_c, other=0.0)
    weight = _channel_parameters(weight_ptr, c, stride_weight, mask_c, 1.0)
    bias = _channel_parameters(bias_ptr, c, stride_bias, mask_c, 0.0)
    for _ in range(steps):
        mask = (p < pixels)[:, None] & mask_c[None, :]
        offs_x = b * stride_xb + image_offsets(p, c, width, stride_xc, stride_xh, stride_xw, FLAT)
        offs_g = b * stride_gb + image_offsets(p, c, width, stride_gc, stride_gh, stride_gw, FLAT)
        x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - mean[None, :]) * rstd[None, :]
        g = _before_activation(g, x_hat, weight, bias, SILU)
        dx = (g * weight[None, :] - group_g[None, :] - x_hat * group_gx[None, :]) * rstd[None, :]
        offs_d = b * stride_db + image_offsets(p, c, width, stride_dc, stride_dh, stride_dw, FLAT)
        tl.store(dx_ptr + offs_d, dx, mask=mask)
        p += BLOCK_P


# ---- launchers


def _launch_group_norm_silu(x, num_groups, weight, bias, eps, act):
    y, mean, rstd = _outputs(x, num_groups)
    if x.numel():
        B, C, H, W = x.shape
        flat = evenly_spaced(x, y)
        sums_grid, sums_tile, chunks, sums_steps = _sums(x)
        merge_tile, share = _merge(x, num_groups)
        pass_grid, pass_tile, pass_steps = _pass(x)
        chunk_mean, chunk_m2 = (x.new_empty((B, chunks, C), dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(x):
            _moments_kernel[sums_grid](
                x, chunk_mean, chunk_m2, C, H * W, W, sums_steps, *image_strides(x, flat), FLAT=flat, **sums_tile
            )
            _merge_moments_kernel[(B * num_groups,)](
                chunk_mean, chunk_m2, mean, rstd, C, num_groups, H * W, chunks, sums_steps * sums_tile["BLOCK_P"],
                share, eps, **merge_tile,
            )  # fmt: skip
            _group_norm_silu_fwd_kernel[pass_grid](
                x, weight, bias, mean, rstd, y, C, num_groups, H * W, W, pass_steps, *image_strides(x, flat),
                *image_strides(y, flat), _stride(weight), _stride(bias), SILU=act == "silu", FLAT=flat, **pass_tile,
            )  # fmt: skip
    return y, mean, rstd


def _launch_group_norm_silu_backward(x, g, mean, rstd, num_groups, weight, bias, eps, act):
    dx = torch.empty_like(x)
    B, C, H, W = x.shape
    if not x.numel():
        return dx, *(x.new_zeros(C, dtype=torch.float32) for _ in range(2))
    flat = evenly_spaced(x, g, dx)
    sums_grid, sums_tile, chunks, sums_steps = _sums(x)
    merge_tile, share = _merge(x, num_groups)
    pass_grid, pass_tile, pass_steps = _pass(x)
    dweight, dbias = (x.new_empty((B, chunks, C), dtype=torch.float32) for _ in range(2))
    photo_dweight, photo_dbias = (x.new_empty((B, C), dtype=torch.float32) for _ in range(2))
    group_gx, group_g = torch.empty_like(mean), torch.empty_like(mean)
    constants = {"SILU": act == "silu", "FLAT": flat}
    with torch.cuda.device_of(x):
        _gradient_sums_kernel[sums_grid](
            g, x, weight, bias, mean, rstd, dweight, dbias, C, num_groups, H * W, W, sums_steps,
            *image_strides(g, flat), *image_strides(x, flat), _stride(weight), _stride(bias), **constants, **sums_tile,
        )  # fmt: skip
        _merge_sums_kernel[(B * num_groups,)](
            dweight, dbias, weight, photo_dweight, photo_dbias, group_gx, group_g, C, num_groups, chunks,
            _stride(weight), share, **merge_tile,
        )  # fmt: skip
        _group_norm_silu_bwd_kernel[pass_grid](
            g, x, weight, bias, mean, rstd, group_gx, group_g, dx, C, num_groups, H * W, W, pass_steps,
            *image_strides(g, flat), *image_strides(x, flat), *image_strides(dx, flat), _stride(weight), _stride(bias),
            **constants, **pass_tile,
        )  # fmt: skip
    return dx, photo_dweight.sum(0), photo_dbias.sum(0)


def _cpp_group_norm_silu(x, num_groups, weight, bias, eps, act):
    y, mean, rstd = _outputs(x, num_groups)
    if x.numel():
        torch.ops.lpmrf_cpp.group_norm_silu(
            x, num_groups, native(weight), native(bias), eps, act == "silu", y, mean, rstd
        )
    return y, mean, rstd


def _cpp_group_norm_silu_backward(x, g, mean, rstd, num_groups, weight, bias, eps, act):
    dx, (dweight, dbias) = torch.empty_like(x), (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        torch.ops.lpmrf_cpp.group_norm_silu_backward(
            x, g, mean, rstd, native(weight), native(bias), act == "silu", dx, dweight, dbias
        )
    return dx, dweight, dbias


def _torch_group_norm_silu(x, num_groups, weight, bias, eps, act):
    if not x.numel():
        return _outputs(x, num_groups)
    y, mean, rstd = reference.group_norm_silu_with_statistics(x, num_groups, weight, bias, eps, act)
    return laid_out_like(y, x), mean, rstd


def _torch_group_norm_silu_backward(x, g, mean, rstd, num_groups, weight, bias, eps, act):
    if not x.numel():
        return torch.empty_like(x), *(x.new_zeros(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))
    dx, dweight, dbias = reference.group_norm_silu_backward(x, g, mean, rstd, weight, bias, act)
    return laid_out_like(dx.to(x.dtype), x), dweight, dbias


def _outputs(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of the groups (B, G), zero for photos without pixels."""
    make = x.new_empty if x.numel() else x.new_zeros
    return torch.empty_like(x), *(make((x.shape[0], num_groups), dtype=statistics_dtype(x)) for _ in range(2))


def _stride(p: Tensor | None) -> int:
    return 0 if p is None else p.stride(0)


def _sums(x: Tensor):
    """Of the kernels that sum over pixels: grid, tile, chunks a photo, steps (tiles a chunk)."""
    B, C, H, W = x.shape
    tile = tuned("group_norm_silu_sums", x, _tile(x, 2048))
    tiles, columns = triton.cdiv(H * W, tile["BLOCK_P"]), triton.cdiv(C, tile["BLOCK_C"])
    steps = max(triton.cdiv(B * tiles * columns, PROGRAMS), min(MIN_STEPS, tiles))
    chunks = triton.cdiv(tiles, steps)
    return (B * chunks, columns), tile, chunks, steps


def _pass(x: Tensor):
    """Of the kernels that write every pixel: grid, tile, steps (tiles a program: a few, so that parameters pay)."""
    B, C, H, W = x.shape
    tile = tuned("group_norm_silu", x, _tile(x, 4096))
    tiles, columns = triton.cdiv(H * W, tile["BLOCK_P"]), triton.cdiv(C, tile["BLOCK_C"])
    steps = min(max(B * tiles * columns // (2 * PROGRAMS), 1), 8)
    return (B * triton.cdiv(tiles, steps), columns), tile, steps


def _merge(x: Tensor, num_groups: int) -> tuple[dict[str, int], float]:
    """Of the merging kernels: tile, and 1 / the elements of a group."""
    size = x.shape[1] // num_groups
    block_c = min(triton.next_power_of_2(size), 64)
    return {"BLOCK_K": 512 // block_c, "BLOCK_C": block_c, "num_warps": 4}, 1 / (size * x.shape[2] * x.shape[3])


def _tile(x: Tensor, elements: int) -> dict[str, int]:
    """Wide along the axis that is contiguous: up to 256 channels of channels-last, any number of pixels of NCHW."""
    block_c = triton.next_power_of_2(x.shape[1])
    block_p = triton.next_power_of_2(x.shape[2] * x.shape[3])
    if x.stride(1) <= x.stride(3):
        block_c = min(block_c, 256)
        block_p = min(block_p, max(elements // block_c, 1))
    else:
        block_p = min(block_p, elements)
        block_c = min(block_c, max(elements // block_p, 1))
    warps = block_p * block_c // (32 * 16)  # 16 elements a thread: two loads of bf16
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": min(max(warps, 1), 8)}


def _refuses(x, num_groups, weight, bias, eps, act) -> str | None:
    return None if x.dtype in DTYPES else f"the kernel takes float32, bfloat16 or float16, not {x.dtype}"


def _compile_cases() -> list[CompileCase]:
    """The default tiles at shapes of the VAEs, in both layouts."""
    cases = []
    for dtype, channels, channels_last in (("bf16", 128, True), ("fp32", 512, True), ("fp16", 128, False)):
        model = torch.empty(1, channels, 256, 256, device="meta")
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        sums, merge, apply = _sums(model)[1], _merge(model, 32)[0], _pass(model)[1]
        for kernel, tile in (
            (_moments_kernel, sums),
            (_merge_moments_kernel, merge),
            (_group_norm_silu_fwd_kernel, apply),
            (_gradient_sums_kernel, sums),
            (_merge_sums_kernel, merge),
            (_group_norm_silu_bwd_kernel, apply),
        ):
            constants = {"SILU": True, "FLAT": True, **tile}
            num_warps = constants.pop("num_warps")
            constants |= {f"stride_{t}{'c' if channels_last else 'w'}": 1 for t in "xygd"}
            constants |= {"stride_weight": 1, "stride_bias": 1}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            types = dict.fromkeys(("x_ptr", "y_ptr", "g_ptr", "dx_ptr"), f"*{dtype}") | {"eps": "fp32", "share": "fp32"}
            signature = {
                name: types.get(name, "*fp32" if name.endswith("_ptr") else "i64")
                for name in kernel.arg_names
                if name not in constants
            }
            multiples = ("stride_", "channels", "pixels")
            divisible = [name for name in signature if name.endswith("_ptr") or name.startswith(multiples)]
            label = f"{kernel.__name__.strip('_')}, {dtype}, {channels} {'channels-last' if channels_last else 'NCHW'}"
            config = "group_norm_silu_sums" if tile is sums else None
            cases.append(
                CompileCase(
                    label, kernel, signature, constants, num_warps, divisible, config=config, raced=dtype == "bf16"
                )
            )
    return cases


def _candidates(sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Tiles of `sizes` elements, wide along the channels, of 8 to 32 elements a thread."""
    return [
        {"BLOCK_P": size // block_c, "BLOCK_C": block_c, "num_warps": warps}
        for size in sizes
        for block_c in (64, 128, 256)
        for warps in (2, 4, 8)
        if 8 <= size // (32 * warps) <= 32
    ]


def _tune_inputs(device):
    for channels, size in ((128, 512), (256, 256), (512, 64)):  # of SD-VAE's and FLUX-VAE's levels
        x = torch.randn(8, size, size, channels, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        yield x.requires_grad_(), 32, weight, bias, 1e-6, "silu"


# ---- registration

register(
    Op(
        "group_norm_silu",
        forward={
            "triton": Kernel(_launch_group_norm_silu, _refuses),
            "cpp": Kernel(_cpp_group_norm_silu, _refuses),
            "torch": Kernel(_torch_group_norm_silu),
        },
        backward={
            "triton": Kernel(_launch_group_norm_silu_backward, _refuses),
            "cpp": Kernel(_cpp_group_norm_silu_backward, _refuses),
            "torch": Kernel(_torch_group_norm_silu_backward),
        },
        compile_cases=_compile_cases,
        candidates={
            "group_norm_silu_sums": _candidates((1024, 2048, 4096)),
            "group_norm_silu": _candidates((2048, 4096, 8192)),
        },
        tune_inputs=_tune_inputs,
    )
)


@torch.library.custom_op("lpmrf::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    return run("group_norm_silu", x, num_groups, weight, bias, eps, act)


@_group_norm_silu.register_fake
def _(x, num_groups, weight, bias, eps, act):
    return torch.empty_like(x), *(x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x)) for _ in range(2))


@torch.library.custom_op("lpmrf::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return OPS["group_norm_silu"].backward[backend].run(x, g, mean, rstd, num_groups, weight, bias, eps, act)


@_group_norm_silu_backward.register_fake
def _(x, g, mean, rstd, num_groups, weight, bias, eps, act, backend):
    return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=statistics_dtype(x)) for _ in range(2))


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.act = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.backend = backend_of_backward("group_norm_silu", *inputs)


def _backward(ctx, g, g_mean, g_rstd):  # mean and rstd do not leave this file: they have no gradient
    x, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.lpmrf.group_norm_silu_backward(
        x, g, mean, rstd, ctx.num_groups, weight, bias, ctx.eps, ctx.act, ctx.backend
    )
    return (
        dx,
        None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
    )


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)
# No autocast rule: statistics are float32 whatever x is, and a rule would cast x in a pass of its own.


# ---- public


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, act: str = "silu"
) -> Tensor:
    """act(GroupNorm(x)) with act "silu" or "none" (plain GroupNorm), in two reads and one write.

    x: (B, C, H, W), any float dtype and memory format. num_groups: a divisor of C. weight, bias: (C,) in any float
    dtype, or None. Nothing is mutated; differentiable in x, weight and bias.
    Returns a new tensor with x's shape, dtype and memory format.
    Raises TypeError for dtypes, ValueError for shapes, devices, num_groups, act or an eps that do not fit.
    """
    _check(x, num_groups, weight, bias, eps, act)
    return torch.ops.lpmrf.group_norm_silu(x, num_groups, weight, bias, eps, act)[0]


def _check(x, num_groups, weight, bias, eps, act) -> None:
    check("group_norm_silu", x, None, eps, weight=(weight, {1}), bias=(bias, {1}))
    if act not in ("silu", "none"):
        raise ValueError(f'group_norm_silu: act must be "silu" or "none", got {act!r}')
    if type(num_groups) is not int or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm_silu: num_groups must be a positive divisor of the {x.shape[1]} channels, got {num_groups!r}"
        )
