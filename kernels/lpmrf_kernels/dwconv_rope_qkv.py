"""From the qkv projection to q, k and v: depthwise 3x3 convolution, cosine-similarity scaling, rotary embedding.

    h = dwconv3x3(qkv) + bias                         where there is a weight; zero padding
    q, k ← h · √scale / √(Σ h² + eps) over the head   where there is a scale (HDiT)
    q, k ← (a, b) ↦ (a cos - b sin, b cos + a sin)    where there are tables; a and b are elements i and i + D/4 of the
                                                      head, i < D/4; the upper half of the head is not rotated

Shapes      qkv (B, 3·heads·D, H, W), channels ordered (q|k|v, head, element); weight (3·heads·D, 1, 3, 3), bias
            (3·heads·D,), scale (heads,), cos and sin (H, W, heads, D/4). q, k and v: (B, H, W, heads, D) each.
Dtypes      qkv float32, bfloat16 or float16, the results in its; the others of any of these, as autocast leaves them.
Layouts     qkv of any strides in Triton; C++ reads channels-last maps, others are copied to that layout first. q, k and
            v are contiguous: neighborhood attention reads them as they are, global attention as the strided view
            (B, heads, L, D), whose rows of D elements are dense. Tables that are not contiguous are copied, and so are
            gradients of q, k and v.
Arithmetic  float32 from the load to the one rounding of the results.
Traffic     2 · numel · sizeof(qkv) bytes and the tables. PyTorch moves 10 to 20 times that: convolution, bias, and two
            rotations of slices, products and concatenations in float32. Backward: the gradients are turned back into
            that of h in one pass (h is computed again only where there is a scale); the convolution's backward
            (`depthwise.py`) reads it. dscale, dweight and dbias are summed in two stages.
Fallback    Other floats, float64 above all, and float16 on a CPU go to the reference and are counted; so does, in
            Triton, a scale with a head size that is no power of two. Tables have no gradient.
Source      Axial rotary embedding and scaling as in k-diffusion's image_transformer_v2 (Crowson et al. 2024).
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from ._triton import jit, tl, triton
from .depthwise import (
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
from .launch import launch_config
from .layout import laid_out_like
from .registry import CompileCase, Kernel, Op, forced_backend, register, run, use_backend

# ---- kernels
#
# A program works on pairs of channels that rotate together, or pass: pair j of a part (q, k or v) is the head and half
# j // (D/4), and the place j % (D/4) in a quarter; its channels are D/4 apart. Even halves of q and k rotate.


@jit
def _pair_tile(pid, channels, height, width, QUARTER: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """tile_of for pairs: batch element, first row, columns, part, pairs and their first channels in the part."""
    blocks = tl.cdiv(channels // 2, BLOCK_C)
    b, y0, x, j = tile_of(pid, 3 * blocks * BLOCK_C, height, width, ROWS, BLOCK_W, BLOCK_C)
    part = pid % (3 * blocks) // blocks
    j -= part * blocks * BLOCK_C
    return b, y0, x, part, j, j // QUARTER * (2 * QUARTER) + j % QUARTER


@jit
def _head_sum(first, second, QUARTER: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ (first + second) of each head, at each of its pairs; BLOCK_C is whole heads."""
    heads = tl.reshape(first + second, [BLOCK_W, BLOCK_C // (2 * QUARTER), 2 * QUARTER])
    sums = tl.sum(heads, 2)[:, :, None]
    return tl.reshape(tl.broadcast_to(sums, [BLOCK_W, BLOCK_C // (2 * QUARTER), 2 * QUARTER]), [BLOCK_W, BLOCK_C])


@jit
def _dwconv_rope_qkv_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    scale_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    channels,  # heads · D
    height,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    eps,
    HALO: tl.constexpr,  # rows that the convolution needs more: 2, or 0 without it
    HAS_BIAS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUARTER: tl.constexpr,  # D / 4
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, y0, x, part, j, c = _pair_tile(tl.program_id(0), channels, height, width, QUARTER, ROWS, BLOCK_W, BLOCK_C)
    mask_c = j < channels // 2
    mask = mask_c & (x < width)
    half = j // QUARTER
    rotated = (half % 2 == 0) & (part < 2)
    channel = part * channels + c
    first = x_ptr + b * stride_xb + channel.to(tl.int64) * stride_xc
    second = x_ptr + b * stride_xb + (channel + QUARTER).to(tl.int64) * stride_xc
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if HALO:
        taps1 = load_taps(weight_ptr, channel, mask_c)
        taps2 = load_taps(weight_ptr, channel + QUARTER, mask_c)
    bias1 = zero
    bias2 = zero
    if HAS_BIAS:
        bias1 = tl.load(bias_ptr + channel, mask=mask_c, other=0).to(tl.float32) + zero
        bias2 = tl.load(bias_ptr + channel + QUARTER, mask=mask_c, other=0).to(tl.float32) + zero
    if HAS_SCALE:
        root = tl.sqrt(tl.load(scale_ptr + half // 2, mask=mask_c, other=0).to(tl.float32))
    out_ptr = q_ptr
    if part == 1:
        out_ptr = k_ptr
    if part == 2:
        out_ptr = v_ptr
    ending1, middle1, ending2, middle2 = bias1, bias1, bias2, bias2
    for i in tl.static_range(ROWS + HALO):
        y = y0 + i - HALO
        if HALO:
            row1 = load_row(first, y + 1, x, mask_c, height, width, stride_xh, stride_xw)
            row2 = load_row(second, y + 1, x, mask_c, height, width, stride_xh, stride_xw)
            h1, ending1, middle1 = roll(row1, taps1, bias1, ending1, middle1)
            h2, ending2, middle2 = roll(row2, taps2, bias2, ending2, middle2)
        if i >= HALO:
            own = mask & (y < height)
            if HALO == 0:
                at = y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
                h1 = tl.load(first + at, mask=own, other=0).to(tl.float32)
                h2 = tl.load(second + at, mask=own, other=0).to(tl.float32)
            if HAS_SCALE:
                factor = root / tl.sqrt(_head_sum(h1 * h1, h2 * h2, QUARTER, BLOCK_W, BLOCK_C) + eps)
                h1 = tl.where(part < 2, h1 * factor, h1)
                h2 = tl.where(part < 2, h2 * factor, h2)
            pixel = y * width + x
            if HAS_ROPE:
                table = pixel.to(tl.int64) * (channels // 4) + half // 2 * QUARTER + j % QUARTER
                cos = tl.load(cos_ptr + table, mask=own & rotated, other=1).to(tl.float32)
                sin = tl.load(sin_ptr + table, mask=own & rotated, other=0).to(tl.float32)
                turned1 = h1 * cos - h2 * sin
                turned2 = h2 * cos + h1 * sin
                h1 = tl.where(rotated, turned1, h1)
                h2 = tl.where(rotated, turned2, h2)
            out = out_ptr + (b * height * width + pixel) * channels + c
            tl.store(out, h1, mask=own)
            tl.store(out + QUARTER, h2, mask=own)


@jit
def _dwconv_rope_qkv_bwd_kernel(
    gq_ptr,
    gk_ptr,
    gv_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    scale_ptr,
    dconv_ptr,  # gradient of h
    along_ptr,  # [B · blocks of rows · blocks of columns, 2, heads] float32: sums for dscale
    channels,
    height,
    width,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    eps,
    HALO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    b, y0, x, part, j, c = _pair_tile(pid, channels, height, width, QUARTER, ROWS, BLOCK_W, BLOCK_C)
    mask_c = j < channels // 2
    mask = mask_c & (x < width)
    half = j // QUARTER
    rotated = (half % 2 == 0) & (part < 2)
    channel = part * channels + c
    first = x_ptr + b * stride_xb + channel.to(tl.int64) * stride_xc
    second = x_ptr + b * stride_xb + (channel + QUARTER).to(tl.int64) * stride_xc
    d_image = dconv_ptr + b * stride_db + x.to(tl.int64) * stride_dw
    g_ptr = gq_ptr
    if part == 1:
        g_ptr = gk_ptr
    if part == 2:
        g_ptr = gv_ptr
    zero = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    bias1 = zero
    bias2 = zero
    if HAS_SCALE:
        root = tl.sqrt(tl.load(scale_ptr + half // 2, mask=mask_c, other=0).to(tl.float32))
        total = zero
        if HALO:
            taps1 = load_taps(weight_ptr, channel, mask_c)
            taps2 = load_taps(weight_ptr, channel + QUARTER, mask_c)
        if HAS_BIAS:
            bias1 = tl.load(bias_ptr + channel, mask=mask_c, other=0).to(tl.float32) + zero
            bias2 = tl.load(bias_ptr + channel + QUARTER, mask=mask_c, other=0).to(tl.float32) + zero
    ending1, middle1, ending2, middle2 = bias1, bias1, bias2, bias2
    for i in tl.static_range(ROWS + HALO):
        y = y0 + i - HALO
        if HAS_SCALE and HALO:
            row1 = load_row(first, y + 1, x, mask_c, height, width, stride_xh, stride_xw)
            row2 = load_row(second, y + 1, x, mask_c, height, width, stride_xh, stride_xw)
            h1, ending1, middle1 = roll(row1, taps1, bias1, ending1, middle1)
            h2, ending2, middle2 = roll(row2, taps2, bias2, ending2, middle2)
        if i >= HALO:
            own = mask & (y < height)
            pixel = y * width + x
            g = g_ptr + (b * height * width + pixel) * channels + c
            g1 = tl.load(g, mask=own, other=0).to(tl.float32)
            g2 = tl.load(g + QUARTER, mask=own, other=0).to(tl.float32)
            if HAS_ROPE:
                table = pixel.to(tl.int64) * (channels // 4) + half // 2 * QUARTER + j % QUARTER
                cos = tl.load(cos_ptr + table, mask=own & rotated, other=1).to(tl.float32)
                sin = tl.load(sin_ptr + table, mask=own & rotated, other=0).to(tl.float32)
                turned1 = g1 * cos + g2 * sin
                turned2 = g2 * cos - g1 * sin
                g1 = tl.where(rotated, turned1, g1)
                g2 = tl.where(rotated, turned2, g2)
            if HAS_SCALE:
                if HALO == 0:
                    at = y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
                    h1 = tl.load(first + at, mask=own, other=0).to(tl.float32)
                    h2 = tl.load(second + at, mask=own, other=0).to(tl.float32)
                r = 1.0 / tl.sqrt(_head_sum(h1 * h1, h2 * h2, QUARTER, BLOCK_W, BLOCK_C) + eps)
                along = _head_sum(g1 * h1, g2 * h2, QUARTER, BLOCK_W, BLOCK_C) * r
                total += tl.where(own, along, 0.0)
                g1 = tl.where(part < 2, (g1 - h1 * (along * r)) * (root * r), g1)
                g2 = tl.where(part < 2, (g2 - h2 * (along * r)) * (root * r), g2)
            d_row = d_image + y.to(tl.int64) * stride_dh
            tl.store(d_row + channel.to(tl.int64) * stride_dc, g1, mask=own)
            tl.store(d_row + (channel + QUARTER).to(tl.int64) * stride_dc, g2, mask=own)
    if HAS_SCALE:
        # Each pair of a head has the head's sum: one of them writes it.
        blocks = 3 * tl.cdiv(channels // 2, BLOCK_C)
        at = ((pid // blocks).to(tl.int64) * 2 + part) * (channels // (4 * QUARTER)) + half // 2
        sums = tl.sum(total, 0)[None, :]
        tl.store(along_ptr + at, sums, mask=mask_c & (part < 2) & (j % (2 * QUARTER) == 0))


# ---- launchers

Three = tuple[Tensor, Tensor, Tensor]
Maybe = Tensor | None


def _grid(qkv: Tensor, config: dict[str, int]) -> tuple[int, int]:
    """Programs, and how many of them share the same pixels: the blocks of pairs of q, k and v."""
    B, C, H, W = qkv.shape
    blocks = 3 * triton.cdiv(C // 6, config["BLOCK_C"])
    return B * triton.cdiv(H, config["ROWS"]) * triton.cdiv(W, config["BLOCK_W"]) * blocks, blocks


TILE = {**CONV_TILE, "ROWS": 4}
"""With eight rows and the tables' pointers, sm_80 runs out of registers."""


def _config(name: str, qkv: Tensor, num_heads: int) -> dict[str, int]:
    """At least one whole head, as a scale needs."""
    _, C, H, W = qkv.shape
    half = triton.next_power_of_2(C // 6 // num_heads)
    default = {**TILE, "BLOCK_C": max(TILE["BLOCK_C"], half)}
    config = launch_config(name, qkv.device, default, pixels=H * W, channels=C)
    return {**config, "BLOCK_C": max(config["BLOCK_C"], half)}


def _heads_like(qkv: Tensor, num_heads: int) -> Three:
    """Empty q, k and v."""
    B, C, H, W = qkv.shape
    return tuple(qkv.new_empty(B, H, W, num_heads, C // 3 // num_heads) for _ in range(3))


def _launch_dwconv_rope_qkv(
    qkv: Tensor, num_heads: int, weight: Maybe, bias: Maybe, cos: Maybe, sin: Maybe, scale: Maybe, eps: float
) -> Three:
    q, k, v = _heads_like(qkv, num_heads)
    if qkv.numel():
        _, C, H, W = qkv.shape
        config = _config("dwconv_rope_qkv", qkv, num_heads)
        programs, _ = _grid(qkv, config)
        parameters = [qkv if p is None else p.contiguous() for p in (weight, bias, cos, sin, scale)]
        with torch.cuda.device_of(qkv):
            _dwconv_rope_qkv_fwd_kernel[(programs,)](
                qkv, *parameters, q, k, v, C // 3, H, W, *qkv.stride(), eps,
                HALO=0 if weight is None else 2, HAS_BIAS=bias is not None, HAS_ROPE=cos is not None,
                HAS_SCALE=scale is not None, QUARTER=C // 12 // num_heads, **config,
            )  # fmt: skip
    return q, k, v


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _nothing(qkv: Tensor) -> Tensor:
    return qkv.new_empty(0)


def _launch_dwconv_rope_qkv_backward(
    qkv: Tensor,
    num_heads: int,
    gq: Tensor,
    gk: Tensor,
    gv: Tensor,
    weight: Maybe,
    bias: Maybe,
    cos: Maybe,
    sin: Maybe,
    scale: Maybe,
    eps: float,
) -> Gradients:
    dconv = torch.empty_like(qkv)
    along = qkv.new_zeros(1, 2, num_heads, dtype=torch.float32)
    if qkv.numel():
        _, C, H, W = qkv.shape
        config = _config("dwconv_rope_qkv_backward", qkv, num_heads)
        programs, blocks = _grid(qkv, config)
        along = torch.empty(programs // blocks, 2, num_heads, device=qkv.device)
        parameters = [qkv if p is None else p.contiguous() for p in (weight, bias, cos, sin, scale)]
        with torch.cuda.device_of(qkv):
            _dwconv_rope_qkv_bwd_kernel[(programs,)](
                gq.contiguous(), gk.contiguous(), gv.contiguous(), qkv, *parameters, dconv, along, C // 3, H, W,
                *qkv.stride(), *dconv.stride(), eps,
                HALO=0 if weight is None else 2, HAS_BIAS=bias is not None, HAS_ROPE=cos is not None,
                HAS_SCALE=scale is not None, QUARTER=C // 12 // num_heads, **config,
            )  # fmt: skip
    dscale = _nothing(qkv) if scale is None else _scale_gradient(along, scale)
    if weight is None:
        return dconv, _nothing(qkv), _nothing(qkv), dscale
    return *launch_depthwise_backward(dconv, qkv, weight), dscale


def _scale_gradient(along: Tensor, scale: Tensor) -> Tensor:
    """along (parts, 2, heads): the gradient of √scale."""
    return (along.sum((0, 1)) * 0.5 / scale.to(along.dtype).sqrt()).to(scale.dtype)


def _cpp_arguments(qkv: Tensor, weight: Maybe, bias: Maybe, cos: Maybe, sin: Maybe, scale: Maybe) -> list[Tensor]:
    empty = _nothing(qkv)
    conv = [empty if p is None else p.contiguous() for p in (weight, bias)]
    return conv + [empty if p is None else p.float().contiguous() for p in (cos, sin, scale)]


def _cpp_dwconv_rope_qkv(
    qkv: Tensor, num_heads: int, weight: Maybe, bias: Maybe, cos: Maybe, sin: Maybe, scale: Maybe, eps: float
) -> Three:
    out = _heads_like(qkv, num_heads)
    arguments = _cpp_arguments(qkv, weight, bias, cos, sin, scale)
    torch.ops.lpmrf_cpp.dwconv_rope_qkv(channels_last(qkv), num_heads, *arguments, eps, *out)
    return out


def _cpp_dwconv_rope_qkv_backward(
    qkv: Tensor,
    num_heads: int,
    gq: Tensor,
    gk: Tensor,
    gv: Tensor,
    weight: Maybe,
    bias: Maybe,
    cos: Maybe,
    sin: Maybe,
    scale: Maybe,
    eps: float,
) -> Gradients:
    x, gradients = channels_last(qkv), [g.contiguous() for g in (gq, gk, gv)]
    dconv = torch.empty_like(qkv)
    room = channels_last_room(dconv)
    along = torch.zeros(qkv.shape[0] * -(-qkv.shape[2] // CPP_ROWS), 2, num_heads)
    arguments = _cpp_arguments(qkv, weight, bias, cos, sin, scale)
    torch.ops.lpmrf_cpp.dwconv_rope_qkv_backward(*gradients, x, num_heads, *arguments, eps, room, along)
    dscale = _nothing(qkv) if scale is None else _scale_gradient(along, scale)
    if weight is None:
        return (dconv if room is dconv else dconv.copy_(room)), _nothing(qkv), _nothing(qkv), dscale
    dx, dweight, dbias = cpp_depthwise_backward(room, x, weight)
    return laid_out_like(dx, qkv), dweight, dbias, dscale


CPP_ROWS = 16
"""kRows of csrc/depthwise.h: the rows that one sum of `along` covers."""


def _torch_dwconv_rope_qkv(
    qkv: Tensor, num_heads: int, weight: Maybe, bias: Maybe, cos: Maybe, sin: Maybe, scale: Maybe, eps: float
) -> Three:
    out = reference.dwconv_rope_qkv(qkv, num_heads, weight, bias, cos, sin, scale, eps)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in out)


def _torch_dwconv_rope_qkv_backward(
    qkv: Tensor,
    num_heads: int,
    gq: Tensor,
    gk: Tensor,
    gv: Tensor,
    weight: Maybe,
    bias: Maybe,
    cos: Maybe,
    sin: Maybe,
    scale: Maybe,
    eps: float,
) -> Gradients:
    gradients = [gq, gk, gv]
    if cos is not None:
        gradients[:2] = (reference.rope(g, cos, -sin) for g in gradients[:2])
    dscale = _nothing(qkv)
    if scale is not None:
        h = qkv if weight is None else reference.depthwise_conv(qkv, weight, bias)
        wide = torch.promote_types(h.dtype, torch.float32)
        h = h.permute(0, 2, 3, 1).unflatten(-1, (3, num_heads, -1))[:, :, :, :2].to(wide)
        g = torch.stack(gradients[:2], dim=3).to(wide)  # (B, H, W, 2, heads, D)
        r = torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)
        along = (g * h).sum(-1, keepdim=True) * r
        dscale = _scale_gradient(along.sum((0, 1, 2)).squeeze(-1)[None], scale)
        scaled = (g - h * (along * r)) * (scale.to(wide)[:, None].sqrt() * r)
        gradients[:2] = scaled.to(qkv.dtype).unbind(3)
    dconv = torch.stack(gradients, dim=3).flatten(3).permute(0, 3, 1, 2)
    if weight is None:
        return laid_out_like(dconv, qkv), _nothing(qkv), _nothing(qkv), dscale
    dx, dweight, dbias = torch_depthwise_backward(dconv, qkv, weight)
    return laid_out_like(dx, qkv), dweight, dbias, dscale


def _tensors(arguments) -> list[Tensor]:
    return [t for t in arguments if isinstance(t, Tensor)]


def _refuses(qkv, num_heads, *rest):
    # The scale is the only parameter with one entry a head; gradients come before it in the backward.
    scaled = rest[-2] is not None
    size = qkv.shape[1] // 3 // num_heads
    if scaled and size & (size - 1):
        return "cosine-similarity scaling needs a head size that is a power of two"
    return refuses_dtypes(qkv, *_tensors(rest))


def _refuses_cpp(qkv, num_heads, *rest):
    return refuses_dtypes_cpp(qkv, *_tensors(rest))


def _compile_cases() -> list[CompileCase]:
    def cases(dtype, label, flags):
        sizes, parameters = ("channels", "height", "width"), ("weight", "bias", "cos", "sin", "scale")
        flags = {"HAS_ROPE": True, "QUARTER": 16, **flags}
        forward = compile_case(
            _dwconv_rope_qkv_fwd_kernel,
            f"forward, {label}",
            dtype,
            {"x": "x"},
            (*parameters, "q", "k", "v"),
            sizes,
            flags,
            TILE,
            "dwconv_rope_qkv",
        )
        backward = compile_case(
            _dwconv_rope_qkv_bwd_kernel,
            f"backward, {label}",
            dtype,
            {"x": "x", "d": "dconv"},
            (*parameters, "gq", "gk", "gv"),
            sizes,
            flags,
            TILE,
            "dwconv_rope_qkv_backward",
        )
        floats = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
        raced = dtype == "bf16" and flags["HALO"] > 0
        return [
            replace(forward, signature={**forward.signature, **floats}, raced=raced),
            replace(backward, signature={**backward.signature, **floats, "along_ptr": "*fp32"}, raced=raced),
        ]

    convolution = {"HALO": 2, "HAS_BIAS": True, "HAS_SCALE": False}
    cosine = {"HALO": 0, "HAS_BIAS": False, "HAS_SCALE": True}
    return [
        case
        for dtype in DTYPES.values()
        for case in (*cases(dtype, "convolution", convolution), *cases(dtype, "cosine", cosine), backward_case(dtype))
    ]


def _tune_inputs(device):
    """LooUFormer's levels."""
    for batch, heads, side in ((1, 4, 64), (1, 8, 32), (1, 12, 16), (8, 4, 64)):
        for gradients in (False, True) if batch == 8 else (False,):
            channels = 3 * heads * 64
            qkv = map_to_tune(device, batch, channels, side, gradients)
            weight, bias = torch.randn(channels, 1, 3, 3, device=device), torch.randn(channels, device=device)
            angles = torch.randn(side, side, heads, 16, device=device)
            yield qkv, heads, weight, bias, angles.cos(), angles.sin(), None, 1e-6


# ---- registration

register(
    Op(
        "dwconv_rope_qkv",
        forward={
            "triton": Kernel(_launch_dwconv_rope_qkv, _refuses),
            "cpp": Kernel(_cpp_dwconv_rope_qkv, _refuses_cpp),
            "torch": Kernel(_torch_dwconv_rope_qkv),
        },
        backward={
            "triton": Kernel(_launch_dwconv_rope_qkv_backward, _refuses),
            "cpp": Kernel(_cpp_dwconv_rope_qkv_backward, _refuses_cpp),
            "torch": Kernel(_torch_dwconv_rope_qkv_backward),
        },
        compile_cases=_compile_cases,
        candidates={"dwconv_rope_qkv": CONV_CANDIDATES, "dwconv_rope_qkv_backward": CONV_BACKWARD_CANDIDATES},
        tune_inputs=_tune_inputs,
    )
)


def _check(qkv, num_heads, weight, bias, cos, sin, scale) -> None:
    op = "dwconv_rope_qkv"
    check_map(op, qkv, "qkv")
    B, C, H, W = qkv.shape
    if num_heads < 1 or C % (3 * num_heads):
        raise ValueError(f"{op}: qkv must have 3 · num_heads · D channels, got {C} for {num_heads} heads")
    D = C // 3 // num_heads
    if D % 4:
        raise ValueError(f"{op}: the head size must be a multiple of 4, got {D}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin come together, got one of them")
    if weight is None and bias is not None:
        raise ValueError(f"{op}: there is a bias but no weight; add it to the projection before")
    shapes = {"weight": (weight, (C, 1, 3, 3)), "bias": (bias, (C,)), "scale": (scale, (num_heads,))}
    tables = (H, W, num_heads, D // 4)
    for name, (p, shape) in {**shapes, "cos": (cos, tables), "sin": (sin, tables)}.items():
        if p is not None:
            check_parameter(op, name, p, shape, qkv)


@torch.library.custom_op("lpmrf::dwconv_rope_qkv", mutates_args=())
def _dwconv_rope_qkv(
    qkv: Tensor,
    num_heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(qkv, num_heads, weight, bias, cos, sin, scale)
    return run("dwconv_rope_qkv", qkv, num_heads, weight, bias, cos, sin, scale, eps)


@torch.library.custom_op("lpmrf::dwconv_rope_qkv_backward", mutates_args=())
def _dwconv_rope_qkv_backward(
    gq: Tensor,
    gk: Tensor,
    gv: Tensor,
    qkv: Tensor,
    num_heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (qkv, num_heads, gq, gk, gv, weight, bias, cos, sin, scale, eps)
    return run("dwconv_rope_qkv", *arguments, direction="backward")


@_dwconv_rope_qkv.register_fake
def _(qkv, num_heads, weight, bias, cos, sin, scale, eps):
    _check(qkv, num_heads, weight, bias, cos, sin, scale)
    return _heads_like(qkv, num_heads)


@_dwconv_rope_qkv_backward.register_fake
def _(gq, gk, gv, qkv, num_heads, weight, bias, cos, sin, scale, eps):
    dscale = qkv.new_empty(0) if scale is None else torch.empty_like(scale)
    if weight is None:
        return torch.empty_like(qkv), qkv.new_empty(0), qkv.new_empty(0), dscale
    sums = torch.promote_types(qkv.dtype, torch.float32)
    return torch.empty_like(qkv), weight.new_empty(weight.shape), qkv.new_empty(qkv.shape[1], dtype=sums), dscale


def _setup_context(ctx, inputs, output):
    qkv, ctx.num_heads, weight, bias, cos, sin, scale, ctx.eps = inputs
    ctx.save_for_backward(qkv, weight, bias, cos, sin, scale)
    ctx.backend = forced_backend() or "auto"


def _backward(ctx, gq, gk, gv):
    qkv, weight, bias, cos, sin, scale = ctx.saved_tensors
    with use_backend(ctx.backend):
        dx, dweight, dbias, dscale = torch.ops.lpmrf.dwconv_rope_qkv_backward(
            gq, gk, gv, qkv, ctx.num_heads, weight, bias, cos, sin, scale, ctx.eps
        )
    return (
        dx,
        None,
        None if weight is None else dweight,
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
        None if scale is None else dscale,
        None,
    )


_dwconv_rope_qkv.register_autograd(_backward, setup_context=_setup_context)
# No autocast rule: qkv comes from a matrix product, which autocast has made half precision already, and parameters and
# tables stay float32, which the kernels take as they are.


# ---- public


def dwconv_rope_qkv(
    qkv: Tensor,
    num_heads: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the qkv projection, ready for attention: depthwise convolution, scaling and rotation in one pass.

    qkv: (B, 3 · num_heads · D, H, W), channels ordered (q|k|v, head, element), any float dtype and memory format,
    channels-last best; D is a multiple of 4. weight (3 · num_heads · D, 1, 3, 3) and bias (3 · num_heads · D,): of a
    depthwise convolution with zero padding; None: none. scale (num_heads,): q and k are made √scale long, with eps
    added to their squared length; None: they stay. cos and sin (H, W, num_heads, D / 4): tables of the rotary embedding
    of q and k, without gradient; None: no rotation.
    Returns three contiguous (B, H, W, num_heads, D) tensors in qkv's dtype; `t.flatten(1, 2).transpose(1, 2)` is the
    (B, num_heads, L, D) view that global attention takes. Differentiable in qkv, weight, bias and scale.
    Raises TypeError for other dtypes, ValueError for other shapes or devices.
    """
    return torch.ops.lpmrf.dwconv_rope_qkv(qkv, num_heads, weight, bias, cos, sin, scale, eps)
