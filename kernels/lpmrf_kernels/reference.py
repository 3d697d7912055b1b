"""Every op once, in plain differentiable torch: the specification, the tests' oracle and the `torch` backend.

Image-like tensors are logical NCHW in any memory format. Statistics and softmax are computed in at least float32
(float64 for float64 tensors); results come back in the dtype of the first input.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(p: Tensor, like: Tensor) -> Tensor:
    """(C,) or (B, C) → broadcastable against (B, C, H, W), in the dtype of `like`."""
    return p.to(like.dtype)[..., None, None]


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, act: str = "silu"
) -> Tensor:
    """act(GroupNorm(x)) over (B, C, H, W); `act` is "silu" or "none". Source: diffusers ResnetBlock2D's norm + SiLU.

    Raises ValueError for another `act` or when `num_groups` does not divide C.
    """
    if act not in ("silu", "none"):
        raise ValueError(f'group_norm_silu: act must be "silu" or "none", got {act!r}')
    if x.shape[1] % num_groups:
        raise ValueError(f"group_norm_silu: {num_groups} groups do not divide the {x.shape[1]} channels")
    return group_norm_silu_with_statistics(x, num_groups, weight, bias, eps, act)[0]


def group_norm_silu_with_statistics(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with mean and 1 / standard deviation of the groups (B, num_groups) in at least float32."""
    # What PyTorch's kernels take: channels-last on CPU only.
    channels_last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    h = _upcast(x) if channels_last else _upcast(x).contiguous()
    B, C, H, W = h.shape
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    y, mean, rstd = torch.native_group_norm(h, weight, bias, B, C, H * W, num_groups, eps)
    return (F.silu(y) if act == "silu" else y).to(x.dtype), mean, rstd


def group_norm_silu_backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for the gradient g of group_norm_silu's result, in at least float32.

    mean and rstd (B, num_groups) are the forward's.
    """
    C, groups = x.shape[1], mean.shape[1]

    def per_channel(s):  # (B, num_groups) → broadcastable against x
        return s.repeat_interleave(C // groups, dim=1)[..., None, None]

    def per_group(s):  # (B, C) sums → means over a group, broadcastable against x
        return per_channel(s.unflatten(1, (groups, -1)).sum(2) / (x[0].numel() // groups))

    h = (_upcast(x) - per_channel(mean)) * per_channel(rstd)
    g = g.to(h.dtype)
    if act == "silu":
        n = h if weight is None else h * _per_channel(weight, h)
        n = n if bias is None else n + _per_channel(bias, h)
        sigmoid = torch.sigmoid(n)
        g = g * sigmoid * (1 + n * (1 - sigmoid))
    dweight, dbias = (g * h).sum((2, 3)), g.sum((2, 3))
    w = h.new_ones(C) if weight is None else weight.to(h.dtype)
    dx = (g * _per_channel(w, g) - per_group(dbias * w) - h * per_group(dweight * w)) * per_channel(rstd)
    return dx, dweight.sum(0), dbias.sum(0)


def layer_norm_2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None
):
    """LayerNorm over the channels of each pixel of (B, C, H, W): Sim-VAE's norm.

    With a residual the sum is normalised and both are returned: (x + residual, y).
    """
    if residual is not None:
        x = x + residual
    # For a channels-last x this view is contiguous: PyTorch's own kernel, float32 inside, no copy.
    rows = x.permute(0, 2, 3, 1)
    if x.device.type == "cpu" and torch.is_grad_enabled():
        rows = _upcast(rows)  # its backward there adds up the gradients of weight and bias in the precision of the rows
    weight, bias = (None if p is None else p.to(rows.dtype) for p in (weight, bias))
    y = F.layer_norm(rows, (x.shape[1],), weight, bias, eps).to(x.dtype).permute(0, 3, 1, 2)
    return y if residual is None else (x, y)


def rms_norm_2d(x: Tensor, weight: Tensor | None, eps: float = 1e-6, residual: Tensor | None = None):
    """x / sqrt(mean over channels of x² + eps) · weight over (B, C, H, W); weight is (C,) or (B, C).

    With a residual the sum is normalised and both are returned: (x + residual, y).
    """
    if residual is not None:
        x = x + residual
    h = _upcast(x)
    y = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + eps)
    y = (y if weight is None else y * _per_channel(weight, y)).to(x.dtype)
    return y if residual is None else (x, y)


def ada_rms_norm_2d(x: Tensor, scale: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    """rms(x) · (1 + scale) over (B, C, H, W) with scale (B, C): LooUFormer's and HDiT's adaptive norm.

    With a residual the sum is normalised and both are returned: (x + residual, y).
    """
    return rms_norm_2d(x, 1 + _upcast(scale), eps, residual)


def pixel_norm_backward(x: Tensor, g: Tensor, weight: Tensor | None, eps: float, centred: bool):
    """Gradients of the norms above (`centred`: layer_norm_2d) for the gradient g of y; x is what was normalised.

    Returns dx, and the gradients of weight and bias photo by photo (B, C), all in at least float32.
    """
    h, g = _upcast(x), g.to(_upcast(x).dtype)
    if centred:
        h = h - h.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(h.square().mean(dim=1, keepdim=True) + eps)
    h = h * rstd
    dweight, dbias = (g * h).sum((2, 3)), g.sum((2, 3))
    if weight is not None:
        g = g * _per_channel(weight, g)
    dx = g - h * (g * h).mean(dim=1, keepdim=True)
    if centred:
        dx = dx - g.mean(dim=1, keepdim=True)
    return dx * rstd, dweight, dbias


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate element a with element a + r of the last dimension, a < r = cos.shape[-1]; the rest stays as it is.

    cos and sin broadcast against (..., r). Source: k-diffusion's apply_rotary_emb.
    """
    r = cos.shape[-1]
    a, b = _upcast(x[..., :r]), _upcast(x[..., r : 2 * r])
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * r :]], dim=-1)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise 3x3 convolution of (B, C, H, W) with zero padding, in x's dtype; weight (C, 1, 3, 3), bias (C,)."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def geglu(x: Tensor, dim: int = -1, gate_first: bool = False) -> Tensor:
    """gelu(gate) · value, the two halves of `dim`; GELU is the exact one."""
    first, second = x.chunk(2, dim=dim)
    return F.gelu(first) * second if gate_first else first * F.gelu(second)


def dwconv_geglu(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, gate_first: bool = True
) -> Tensor:
    """geglu over the channels of the depthwise convolution of x; without a weight, of x."""
    return geglu(x if weight is None else depthwise_conv(x, weight, bias), 1, gate_first)


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """silu(x + bias) over (B, C, H, W) with bias (C,), the sum rounded once."""
    return F.silu(x + _per_channel(bias, x))


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual over (B, C, H, W) with bias (C,)."""
    return x + _per_channel(bias, x) + residual.to(x.dtype)


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
    """q, k and v (B, H, W, heads, D) of qkv (B, 3 · heads · D, H, W), channels ordered (q|k|v, head, element).

    After the depthwise convolution, where there is a weight, q and k are made as long as sqrt(scale) of their head,
    where there is a scale (heads,), and rotated, where there are tables cos and sin (H, W, heads, D / 4).
    """
    h = qkv if weight is None else depthwise_conv(qkv, weight, bias)
    q, k, v = h.permute(0, 2, 3, 1).unflatten(-1, (3, num_heads, -1)).unbind(3)
    if scale is not None:
        q, k = cosine_similarity_scale(q, scale, eps), cosine_similarity_scale(k, scale, eps)
    if cos is not None:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    return q, k, v


def cosine_similarity_scale(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x · sqrt(scale) / sqrt(sum of x² + eps) over (..., heads, D) with scale (heads,).

    Source: k-diffusion's scale_for_cosine_sim.
    """
    h = _upcast(x)
    factor = scale.to(h.dtype)[:, None].sqrt() * torch.rsqrt(h.square().sum(dim=-1, keepdim=True) + eps)
    return (h * factor).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v over (B, heads, L, D); scale defaults to D**-0.5."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) → (B · windows, size², C)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C)
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def unwindows(x: Tensor, size: int, H: int, W: int) -> Tensor:
    """The inverse of `windows`."""
    n, _, C = x.shape
    x = x.reshape(n * size**2 // (H * W), H // size, W // size, size, size, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(H: int, W: int, size: int, shift: int, device=None) -> Tensor:
    """-100 between tokens of one window that the cyclic shift brought together, else 0: (windows, size², size²)."""

    def regions(n):
        r = torch.zeros(n, device=device)
        r[n - size : n - shift] = 1
        r[n - shift :] = 2
        return r

    region = 3 * regions(H)[:, None] + regions(W)
    region = windows(region[None, :, :, None], size).squeeze(-1)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


def _split_windows(x: Tensor, parts: int, heads: int, size: int, shift: int) -> Tensor:
    """(B, H, W, parts · heads · D) → (parts, B · windows, heads, L, D), rolled by the shift."""
    return windows(x.roll((-shift, -shift), (1, 2)), size).unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _merge_windows(x: Tensor, size: int, shift: int, H: int, W: int) -> Tensor:
    """The inverse of `_split_windows` for one part."""
    return unwindows(x.transpose(1, 2).flatten(2), size, H, W).roll((shift, shift), (1, 2))


def _window_probabilities(q: Tensor, k: Tensor, bias: Tensor, x: Tensor, size: int, shift: int, scale: float) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1) + bias.to(q.dtype)
    if shift:
        mask = shift_mask(*x.shape[1:3], size, shift, x.device).to(q.dtype)
        logits = (logits.unflatten(0, (len(x), len(mask))) + mask[:, None]).flatten(0, 1)
    return logits.softmax(dim=-1)


def window_attention(x: Tensor, bias: Tensor, window_size: int, shift: int = 0, scale: float | None = None) -> Tensor:
    """SwinIR's attention in windows of the map rolled by -shift: (B, H, W, 3C) → (B, H, W, C).

    x holds q, k and v, each of heads · D channels; bias (heads, L, L) is added to the logits of every window.
    """
    heads = len(bias)
    q, k, v = _split_windows(x, 3, heads, window_size, shift)
    # PyTorch's softmax of a half-precision tensor computes in float32 inside; autocast would write float32 as well.
    with torch.autocast(x.device.type, enabled=False):
        p = _window_probabilities(q, k, bias, x, window_size, shift, q.shape[-1] ** -0.5 if scale is None else scale)
        return _merge_windows(p @ v, window_size, shift, *x.shape[1:3])


def window_attention_backward(g: Tensor, x: Tensor, bias: Tensor, window_size: int, shift: int, scale: float):
    """Gradients (dx, dbias) of `window_attention` for the gradient g of its result."""
    heads = len(bias)
    with torch.autocast(x.device.type, enabled=False):
        q, k, v = _upcast(_split_windows(x, 3, heads, window_size, shift))
        (g,) = _split_windows(g, 1, heads, window_size, shift).to(q.dtype)
        p = _window_probabilities(q, k, bias, x, window_size, shift, scale)
        dp = g @ v.transpose(-2, -1)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        parts = ds @ k * scale, ds.transpose(-2, -1) @ q * scale, p.transpose(-2, -1) @ g
        dx = torch.cat([_merge_windows(part, window_size, shift, *x.shape[1:3]) for part in parts], dim=-1)
    return dx.to(x.dtype), ds.sum(0).to(bias.dtype)


def window_starts(length: int, kernel_size: int) -> list[int]:
    """First key of every query's neighborhood along one axis: shifted at the borders, never padded or cut."""
    return [min(max(i - kernel_size // 2, 0), length - kernel_size) for i in range(length)]


def neighborhood_attention_2d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float | None = None) -> Tensor:
    """Each query attends to exactly kernel_size x kernel_size keys around it; (B, H, W, heads, D) in and out.

    Same result as NATTEN's na2d with dilation 1. kernel_size is odd and at most min(H, W), else ValueError.
    The rows of a neighborhood are gathered, its columns are picked by a mask: memory is kernel_size times the input.
    """
    keys, mask, _ = _neighborhoods(q, kernel_size)
    out = F.scaled_dot_product_attention(q.transpose(2, 3), keys(k), keys(v), attn_mask=mask, scale=scale)
    return out.transpose(2, 3)


def _neighborhoods(q: Tensor, kernel_size: int):
    """What a row of queries sees: keys(x): (B, H, W, heads, D) → (B, H, heads, K · W, D), the mask (W, K · W) of the
    columns, and the rows (H, K)."""
    H, W = q.shape[1:3]
    if kernel_size % 2 == 0 or kernel_size < 1:
        raise ValueError(f"neighborhood_attention_2d: kernel_size must be odd and positive, got {kernel_size}")
    if kernel_size > min(H, W):
        raise ValueError(
            f"neighborhood_attention_2d: kernel_size {kernel_size} is larger than the {H}x{W} map; use a larger image"
        )
    offsets = torch.arange(kernel_size, device=q.device)
    rows = torch.tensor(window_starts(H, kernel_size), device=q.device)[:, None] + offsets  # (H, K)
    first = torch.tensor(window_starts(W, kernel_size), device=q.device)[:, None]
    columns = torch.arange(W, device=q.device)
    seen = (columns >= first) & (columns < first + kernel_size)  # (W query, W key)
    return lambda x: x[:, rows].permute(0, 1, 4, 2, 3, 5).flatten(3, 4), seen.repeat(1, kernel_size), rows


def neighborhood_attention_2d_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float):
    """Gradients (dq, dk, dv) of `neighborhood_attention_2d` for the gradient g of its result."""
    gather, mask, rows = _neighborhoods(q, kernel_size)
    keys, values = gather(_upcast(k)), gather(_upcast(v))
    queries, g = (_upcast(t).transpose(2, 3) for t in (q, g))  # (B, H, heads, W, D)
    p = (queries @ keys.transpose(-2, -1) * scale).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    dp = g @ values.transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    onto = F.one_hot(rows, q.shape[1]).to(keys.dtype)  # (H query, K, H key)

    def summed(x):  # (B, H, heads, K · W, D) → (B, H, W, heads, D), without atomics
        return torch.einsum("bhnkwd,hkg->bgwnd", x.unflatten(3, (kernel_size, -1)), onto)

    dq = (ds @ keys * scale).transpose(2, 3)
    dk, dv = summed(ds.transpose(-2, -1) @ queries * scale), summed(p.transpose(-2, -1) @ g)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def euler_step(z: Tensor, v: Tensor, dt: float) -> Tensor:
    """z + dt · v in z's dtype: one Euler step, t running from 0 (source) to 1 (clean)."""
    return z + dt * v.to(z.dtype)


def philox_4x32_10(counter, key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random123's philox4x32 with ten rounds; every word is an int64 tensor (they broadcast) holding [0, 2³²).

    counter: four words, key: two; four words come back. Source: Salmon et al. 2011.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, and the wrapped bits are the unsigned ones: shift, then drop the copies of the sign.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 standard normals from two words in [0, 2³²); their upper 24 bits count."""
    u, w = ((a >> 8) + 1).double() / 2**24, (b >> 8).double() / 2**24
    r, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * w
    return r * torch.cos(angle), r * torch.sin(angle)


def source_noise(shape, seeds, device=None) -> Tensor:
    """Standard normal float32 noise of `shape` (B, C, H, W): a photo's depends on its seed and its (C, H, W) only.

    seeds: (B,) int64 tensor or list of ints, one a photo; the noise is on `device`, by default the seeds'. Exact
    definition in `add_source_noise.py`. Raises ValueError unless there is one seed a photo.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    if seeds.device.type == "mps":  # has no float64
        return source_noise(shape, seeds.cpu()).to(seeds.device)
    B, C, H, W = shape
    if seeds.shape != (B,):
        raise ValueError(f"source_noise: one seed a photo, expected the shape ({B},), got {tuple(seeds.shape)}")
    low = 0xFFFFFFFF
    k = torch.arange((C * H * W + 3) // 4, device=seeds.device)
    zero = torch.zeros_like(k)
    key = seeds[:, None] & low, seeds[:, None] >> 32 & low
    x = philox_4x32_10((k & low, k >> 32, zero, zero), key)
    normals = torch.stack([*box_muller(x[0], x[1]), *box_muller(x[2], x[3])], dim=-1)  # (B, blocks, 4)
    return normals.flatten(1)[:, : C * H * W].reshape(shape).float()


def add_source_noise(z: Tensor, noise_std: float, seeds: Tensor) -> Tensor:
    """z + noise_std · source_noise in float32: the source of the ODE."""
    return z.float() + noise_std * source_noise(z.shape, seeds)


def to_uint8(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Pixels of [low, high] as uint8: (x - low) · 255 / (high - low), clamped, halves to even. NaN becomes 0."""
    y = (_upcast(x) - low) * (255 / (high - low))
    return y.nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def from_uint8(x: Tensor, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 as pixels of [low, high]: x / 255 · (high - low) + low in at least float32, then rounded to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) / 255 * (high - low) + low).to(dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest 2x, then a 3x3 convolution with padding 1: the upsampler of Sim-VAE and of diffusers' decoders."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def output_euler(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    dt: float,
    patch=(1, 1),
) -> Tensor:
    """z + dt · projection(RMSNorm(x)) in z's dtype; x (B, C, H, W), weight (O, C) of a 1x1 convolution.

    Outputs are the pixels of a patch, ordered (row, column, channel).
    """
    y = rms_norm_2d(x, norm_weight, eps)
    v = F.linear(y.movedim(1, -1), weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
    v = v.unflatten(-1, (*patch, -1)).permute(0, 5, 1, 3, 2, 4)  # (B, channels, H, p, W, q)
    return euler_step(z, v.reshape(z.shape), dt)
