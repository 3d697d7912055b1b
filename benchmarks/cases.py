"""What the kernel benchmark compares: one entry an op and layer, at the shapes of the pipeline.

A new op is one `Case`: inputs, PyTorch's own composition, ours, and what a perfect implementation moves and multiplies.
Shapes are those of a 512x512 face: latents 64x64, Sim-VAE's 128 to 512 channels, LooUFormer's 256 channels at 64x64,
SwinIR-L's 180 channels in 8x8 windows. `batch` is the device's (kernels.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lpmrf_kernels as ops
from lpmrf_kernels import reference


class Maker:
    """Random tensors of one device and dtype, the same ones in every run."""

    def __init__(self, device: str, dtype: torch.dtype, batch: int):
        self.device, self.dtype, self.batch = device, dtype, batch
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape, dtype=None) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator).to(dtype or self.dtype)

    def image(self, channels: int, size: int, dtype=None) -> Tensor:
        """(batch, channels, size, size), channels-last as everywhere in the pipeline."""
        x = self.normal(self.batch, size, size, channels, dtype=dtype)
        return x.permute(0, 3, 1, 2)

    def parameter(self, *shape) -> Tensor:
        """In the dtype of the network, about one; (a, b, ...) is a weight whose products stay of order one."""
        p = self.normal(*shape, dtype=torch.float32)
        p = 1 + 0.1 * p if len(shape) == 1 else p / p[0].numel() ** 0.5
        return p.to(self.dtype)


@dataclass(frozen=True)
class Case:
    op: str
    """The public name in lpmrf_kernels; where it is missing, our rows say so."""
    label: str
    inputs: Callable[[Maker], tuple]
    eager: Callable
    """PyTorch's own composition, as the published code has it; it is compiled for the `compile` rows."""
    bytes: Callable[..., int]
    """Of a perfect implementation: what must be read and written once."""
    flops: Callable[..., int] = lambda *args: 0
    ours: Callable | None = None
    """None: the public function itself."""
    peers: Mapping[str, Callable[[], Callable]] = field(default_factory=dict)
    """Name → loader of a callable with the same arguments; ImportError names an absent package."""
    exact: Callable | None = None
    """What results are checked against, where `eager` cannot be (random numbers); None: `eager` in higher precision."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()

    def function(self) -> Callable | None:
        return (self.ours or getattr(ops, self.op)) if hasattr(ops, self.op) else None


# ---- bytes and FLOPs


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def one_read_one_write(x, *_) -> int:
    return 2 * size(x)


def two_reads_one_write(x, *_) -> int:
    """Also of a norm whose statistics need the whole tensor first."""
    return 3 * size(x)


def read_qkv_write_out(q, k, v, *_) -> int:
    return size(q, k, v, q)


def read_all_write_half(x, *_) -> int:
    return size(x) * 3 // 2


def to_bytes(x, *_) -> int:
    return size(x) + x.numel()


def from_bytes(x, dtype) -> int:
    return x.numel() * (1 + dtype.itemsize)


def euler_bytes(z, v, dt) -> int:
    return 2 * size(z) + size(v)


def noise_bytes(z, std, seeds) -> int:
    return size(z) + 4 * z.numel()


def upsample_bytes(x, weight, bias, folded) -> int:
    return size(x, folded) + 4 * size(x) * weight.shape[0] // weight.shape[1]


def upsample_flops(x, weight, bias, folded) -> int:
    """Four taps for each of four outputs a pixel; the plain form has nine taps."""
    return 2 * 4 * 4 * (x.numel() // x.shape[1]) * weight.shape[0] * weight.shape[1]


def output_bytes(x, norm_weight, eps, weight, bias, z, dt) -> int:
    return size(x) + 2 * size(z)


def output_flops(x, norm_weight, eps, weight, bias, z, dt) -> int:
    return 2 * x.numel() * weight.shape[0]


def attention_flops(q, *_) -> int:
    """(B, heads, L, D): q kᵀ and p v."""
    return 4 * q.numel() * q.shape[-2]


def neighborhood_flops(q, k, v, kernel_size) -> int:
    return 4 * q.numel() * kernel_size**2


def window_flops(x, bias, window_size, shift, mask) -> int:
    return 4 * x.numel() // 3 * window_size**2


# ---- PyTorch's compositions


def group_norm_silu(x, groups, weight, bias):
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-6))


def layer_norm(x, weight, bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)


def bias_silu(x, bias):
    return F.silu(x + bias[:, None, None])


def bias_residual(x, bias, residual):
    return x + bias[:, None, None] + residual


def ada_rms_norm(x, scale):
    y = F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    return y * (1 + scale[:, :, None, None])


def dwconv_rope_qkv(qkv, heads, weight, bias, cos, sin):
    h = F.conv2d(qkv, weight, bias, padding=1, groups=qkv.shape[1])
    q, k, v = h.permute(0, 2, 3, 1).unflatten(-1, (3, heads, -1)).unbind(3)
    return reference.rope(q, cos, sin), reference.rope(k, cos, sin), v


def dwconv_geglu(x, weight, bias):
    gate, value = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]).chunk(2, dim=1)
    return F.gelu(gate) * value


def partition(t, window):
    """(B, H, W, c) → (B · windows, tokens, c)."""
    B, H, W, c = t.shape
    t = t.view(B, H // window, window, W // window, window, c)
    return t.permute(0, 1, 3, 2, 4, 5).reshape(-1, window**2, c)


def shift_mask(size: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(windows, tokens, tokens): -100 between tokens that the shift brought together from two sides of the map."""
    edges = (slice(-window), slice(-window, -shift), slice(-shift, None))
    side = torch.zeros(1, size, size, 1, device=like.device)
    for i, rows in enumerate(edges):
        for j, columns in enumerate(edges):
            side[:, rows, columns] = 3 * i + j
    side = partition(side, window)
    return torch.where(side == side.transpose(1, 2), 0.0, -100.0).to(like.dtype)


def window_attention(x, bias, window, shift, mask):
    """Liu et al.'s: roll, partition, attention with bias and mask, merge, roll back."""
    B, H, W, _ = x.shape
    heads = bias.shape[0]
    x = x.roll((-shift, -shift), (1, 2)) if shift else x
    q, k, v = partition(x, window).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias
    if shift:
        logits = (logits.unflatten(0, (B, -1)) + mask[:, None]).flatten(0, 1)
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = y.view(B, H // window, W // window, window, window, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)
    return y.roll((shift, shift), (1, 2)) if shift else y


def upsample_conv(x, weight, bias, folded):
    return reference.upsample_conv(x, weight, bias)


def output_euler(x, norm_weight, eps, weight, bias, z, dt):
    y = F.rms_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, eps).permute(0, 3, 1, 2)
    return z + dt * F.conv2d(y, weight, bias)


def to_uint8(x):
    return x.float().mul(255).clamp(0, 255).round().to(torch.uint8, memory_format=torch.channels_last)


def from_uint8(x, dtype):
    return (x.to(dtype) / 255).contiguous(memory_format=torch.channels_last)


def add_source_noise(z, noise_std, seeds):
    return z.float() + noise_std * torch.randn(z.shape, device=z.device)


# ---- peers


def flash_attn():
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def xformers():
    from xformers.ops import memory_efficient_attention

    return lambda q, k, v: memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def natten():
    from natten import na2d

    return lambda q, k, v, kernel_size: na2d(q, k, v, kernel_size=kernel_size)


def liger_layer_norm():
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def call(x, weight, bias):
        return LigerLayerNormFunction.apply(x.permute(0, 2, 3, 1), weight, bias, 1e-6).permute(0, 3, 1, 2)

    return call


def liger_group_norm():
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    def call(x, groups, weight, bias):
        return F.silu(LigerGroupNormFunction.apply(x.contiguous(), weight, bias, x.shape[1], groups, 1e-6))

    return call


def sdpa(backend: SDPBackend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return lambda: call


ATTENTION_PEERS = {
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": flash_attn,
    "xformers": xformers,
}


# ---- cases


def _angles(make: Maker, size: int, heads: int, depth: int) -> tuple[Tensor, Tensor]:
    theta = 3 * make.normal(size, size, heads, depth // 4, dtype=torch.float32)
    return theta.cos(), theta.sin()


def _group_norm(channels, size):
    return lambda make: (make.image(channels, size), 32, make.parameter(channels), make.parameter(channels))


def _layer_norm(channels, size):
    return lambda make: (make.image(channels, size), make.parameter(channels), make.parameter(channels))


def _qkv(make: Maker):
    heads, depth = 4, 64
    channels = 3 * heads * depth
    return (
        make.image(channels, 64),
        heads,
        make.parameter(channels, 1, 3, 3),
        make.parameter(channels),
        *_angles(make, 64, heads, depth),
    )


def _geglu(make: Maker):
    return make.image(1536, 64), make.parameter(1536, 1, 3, 3), make.parameter(1536)


def _attention(heads, tokens):
    return lambda make: tuple(make.normal(make.batch, heads, tokens, 64) for _ in range(3))


def _window(shift):
    def inputs(make):
        x, bias = make.normal(make.batch, 64, 64, 3 * 180), make.normal(6, 64, 64)
        return x, bias, 8, shift, shift_mask(64, 8, shift, x) if shift else None

    return inputs


def our_window_attention(x, bias, window, shift, mask):
    return ops.window_attention(x, bias, window, shift)  # which needs no mask


def _upsample(channels, out_channels, size):
    def inputs(make):
        weight = make.parameter(out_channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        return make.image(channels, size), weight, make.parameter(out_channels), ops.fold_upsample_weight(weight)

    return inputs


def _output(make: Maker):
    weight = make.parameter(16, 256, 1, 1)
    z = make.image(16, 64, torch.float32)
    return make.image(256, 64), make.parameter(256), 2.0**-23, weight, make.parameter(16), z, 0.04


CASES = [
    Case("group_norm_silu", "128 at 512", _group_norm(128, 512), group_norm_silu, two_reads_one_write,
         peers={"liger": liger_group_norm}),
    Case("group_norm_silu", "512 at 64", _group_norm(512, 64), group_norm_silu, two_reads_one_write,
         peers={"liger": liger_group_norm}),
    Case("layer_norm_2d", "128 at 512", _layer_norm(128, 512), layer_norm, one_read_one_write,
         peers={"liger": liger_layer_norm}),
    Case("layer_norm_2d", "512 at 64", _layer_norm(512, 64), layer_norm, one_read_one_write,
         peers={"liger": liger_layer_norm}),
    Case("bias_silu", "128 at 512", lambda m: (m.image(128, 512), m.parameter(128)), bias_silu, one_read_one_write),
    Case("bias_residual", "128 at 512", lambda m: (m.image(128, 512), m.parameter(128), m.image(128, 512)),
         bias_residual, two_reads_one_write),
    Case("ada_rms_norm_2d", "256 at 64", lambda m: (m.image(256, 64), m.normal(m.batch, 256)), ada_rms_norm,
         one_read_one_write),
    Case("dwconv_rope_qkv", "4 heads of 64 at 64", _qkv, dwconv_rope_qkv, one_read_one_write),
    Case("dwconv_geglu", "1536 at 64", _geglu, dwconv_geglu, read_all_write_half),
    Case("neighborhood_attention_2d", "7x7, 4 heads of 64 at 64",
         lambda m: (*(m.normal(m.batch, 64, 64, 4, 64) for _ in range(3)), 7), reference.neighborhood_attention_2d,
         read_qkv_write_out, neighborhood_flops, peers={"natten": natten}),
    Case("attention", "12 heads of 64, 256 tokens", _attention(12, 256), F.scaled_dot_product_attention,
         read_qkv_write_out, attention_flops, peers=ATTENTION_PEERS),
    Case("attention", "8 heads of 64, 1024 tokens", _attention(8, 1024), F.scaled_dot_product_attention,
         read_qkv_write_out, attention_flops, peers=ATTENTION_PEERS),
    Case("window_attention", "6 heads of 30 at 64", _window(0), window_attention, lambda x, *_: size(x) * 4 // 3,
         window_flops, our_window_attention),
    Case("window_attention", "the same, shifted", _window(4), window_attention, lambda x, *_: size(x) * 4 // 3,
         window_flops, our_window_attention),
    Case("upsample_conv", "512 to 256 at 128", _upsample(512, 256, 128), upsample_conv, upsample_bytes,
         upsample_flops),
    Case("upsample_conv", "128 to 64 at 128", _upsample(128, 64, 128), upsample_conv, upsample_bytes, upsample_flops),
    Case("output_euler", "256 to 16 at 64", _output, output_euler, output_bytes, output_flops),
    Case("euler_step", "16 at 64", lambda m: (m.image(16, 64, torch.float32), m.image(16, 64), 0.04),
         lambda z, v, dt: z + dt * v, euler_bytes),
    Case("add_source_noise", "16 at 64",
         lambda m: (m.image(16, 64, torch.float32), 0.1, torch.arange(m.batch, device=m.device)),
         add_source_noise, noise_bytes, exact=reference.add_source_noise),
    Case("to_uint8", "3 at 512, planes to pixels", lambda m: (m.normal(m.batch, 3, 512, 512).sigmoid(),), to_uint8,
         to_bytes, ours=lambda x: ops.to_uint8(x, memory_format=torch.channels_last)),
    Case("from_uint8", "3 at 512", lambda m: ((m.image(3, 512).sigmoid() * 255).to(torch.uint8), m.dtype), from_uint8,
         from_bytes, ours=lambda x, dtype: ops.from_uint8(x, dtype=dtype)),
]  # fmt: skip
