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
    y = F.layer_norm(
        x.permute(0, 2, 3, 1),
        (x.shape[1],),
        None if weight is None else weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        eps,
    ).permute(0, 3, 1, 2)
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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v over (B, heads, L, D); scale defaults to D**-0.5."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + bias + mask) v over (B · windows, heads, L, D): SwinIR's window attention.

    bias (heads, L, L) is added to every window, mask (windows, L, L), if any, to every head of its window.
    """
    # PyTorch's softmax of a half-precision tensor computes in float32 inside; autocast would write float32 as well.
    with torch.autocast(q.device.type, enabled=False):
        logits = (q * scale) @ k.transpose(-2, -1) + bias.to(q.dtype)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None].to(q.dtype)).flatten(0, 1)
        return logits.softmax(dim=-1) @ v


def window_starts(length: int, kernel_size: int) -> list[int]:
    """First key of every query's neighborhood along one axis: shifted at the borders, never padded or cut."""
    return [min(max(i - kernel_size // 2, 0), length - kernel_size) for i in range(length)]


def neighborhood_attention_2d(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float | None = None
) -> Tensor:
    """Each query attends to exactly kernel_size x kernel_size keys around it; (B, H, W, heads, D) in and out.

    Same result as NATTEN's na2d with dilation 1. kernel_size is odd and at most min(H, W), else ValueError.
    The rows of a neighborhood are gathered, its columns are picked by a mask: memory is kernel_size times the input.
    """
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

    def keys(x):  # (B, H, W, heads, D) → (B, H, heads, K * W, D)
        return x[:, rows].permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    mask = seen.repeat(1, kernel_size)  # (W, K * W)
    out = F.scaled_dot_product_attention(q.transpose(2, 3), keys(k), keys(v), attn_mask=mask, scale=scale)
    return out.transpose(2, 3)


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
