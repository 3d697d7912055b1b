"""Sim-VAE, the autoencoder of Latent-PMRF (arXiv 2507.00447; official class AutoencoderKLSim).

One norm a residual block, constant channels inside a block, no attention, no norm before the last convolution:
channels change only where the resolution does.
"""

import torch
from torch import Tensor, nn

import lpmrf_kernels as ops

from .config import records_config
from .layers import GroupNorm, LayerNorm2d, conv_residual, conv_silu, nearest_2x

PRESETS = {
    name: dict(
        down_block_types=["EncoderBlock2D"] * 4,
        up_block_types=["DecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        mid_block_out_channel=512,
        layers_per_block=2,
        layers_mid_block=3,
        latent_channels=channels,
    )
    for name, channels in (("sim-vae-c16", 16), ("sim-vae-c32", 32))
}


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)


class ResidualBlock(nn.Module):
    """pre_norm: x + conv2(SiLU(conv1(norm(x)))); post_norm: norm(x + conv2(SiLU(conv1(x))))."""

    def __init__(self, channels: int, norm_pos: str, norm_type: str):
        super().__init__()
        self.norm = LayerNorm2d(channels) if norm_type == "layer_norm" else GroupNorm(32, channels)
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        self.norm_pos = norm_pos

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_pos == "pre_norm":
            return conv_residual(self.conv2, conv_silu(self.conv1, self.norm(x)), x)
        return self.norm(conv_residual(self.conv2, conv_silu(self.conv1, x), x))


class Downsampler(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    """`interpolate`: nearest 2x, then convolution. `pixel_shuffle`: convolution to four times the channels, shuffle."""

    def __init__(self, in_channels: int, out_channels: int, method: str):
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels * (4 if method == "pixel_shuffle" else 1))
        self.method = method
        self.kept = None

    def forward(self, x: Tensor) -> Tensor:
        if self.method == "pixel_shuffle":
            return nn.functional.pixel_shuffle(self.conv(x), 2)
        if torch.is_grad_enabled():  # in training the weight changes every step
            return self.conv(nearest_2x(x))
        return ops.upsample_conv(x, self.conv.weight, self.conv.bias, self.folded())

    def folded(self) -> Tensor | None:
        """The convolution's folded weight, made anew whenever the weight is another one or was written to.

        In place where it can be: a captured CUDA graph reads it at its address.
        """
        weight = self.conv.weight
        if torch.compiler.is_compiling() or weight.is_inference():  # where changes cannot be seen
            return None
        key = weight.data_ptr(), weight._version, weight.dtype
        if self.kept is None or self.kept[0] != key:
            folded = ops.fold_upsample_weight(weight)
            if self.kept is not None and _alike(self.kept[1], folded):
                folded = self.kept[1].copy_(folded)
            # The weight is kept too: while it lives, no other one can have its address.
            self.kept = key, folded, weight.detach()
        return self.kept[1]


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


class Level(nn.Module):
    """Residual blocks, then the resampler under its official name (`downsampler` or `upsampler`), if any."""

    def __init__(self, layers: int, channels: int, norm_pos: str, norm_type: str, **resampler: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, norm_pos, norm_type) for _ in range(layers))
        self.resampler = next(iter(resampler), None)
        for name, module in resampler.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resampler is None else getattr(self, self.resampler)(x)


class Encoder(nn.Module):
    def __init__(self, in_channels, latent_channels, channels, layers, mid_layers, norm_pos, norm_type):
        super().__init__()
        self.conv_in = conv3x3(in_channels, channels[0])
        self.down_blocks = nn.ModuleList(
            Level(layers, c, norm_pos, norm_type, downsampler=Downsampler(c, after))
            for c, after in zip(channels[:-1], channels[1:])
        )
        self.down_blocks.append(Level(layers, channels[-1], norm_pos, norm_type))
        self.mid_block = Level(mid_layers, channels[-1], norm_pos, norm_type)
        self.conv_out = conv3x3(channels[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.mid_block(x))


class Decoder(nn.Module):
    def __init__(self, out_channels, latent_channels, channels, layers, mid_layers, norm_pos, norm_type, upsample):
        super().__init__()
        self.conv_in = conv3x3(latent_channels, channels[-1])
        self.mid_block = Level(mid_layers, channels[-1], norm_pos, norm_type)
        coarse_to_fine = channels[::-1]
        self.up_blocks = nn.ModuleList(
            Level(layers + 1, c, norm_pos, norm_type, upsampler=Upsampler(c, after, upsample))
            for c, after in zip(coarse_to_fine[:-1], coarse_to_fine[1:])
        )
        self.up_blocks.append(Level(layers + 1, channels[0], norm_pos, norm_type))
        self.conv_out = conv3x3(channels[0], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(z)


class SimVAE(nn.Module):
    """Images in [-1, 1]; no latent scaling inside. Arguments are the official ones.

    norm_pos: "pre_norm" or "post_norm". norm_type: "layer_norm" or "group_norm" (32 groups).
    upsample_method: "interpolate" or "pixel_shuffle". scaling_factor and shift_factor are only recorded: a pipeline
    applies them as (mean - shift) * scale. sample_size and force_upcast are bookkeeping of published files.
    """

    @records_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types=("EncoderBlock2D",),
        up_block_types=("DecoderBlock2D",),
        block_out_channels=(64,),
        mid_block_type: str = "Block2D",
        mid_block_out_channel: int | None = None,
        layers_per_block: int = 2,
        layers_mid_block: int = 3,
        norm_pos: str = "pre_norm",
        norm_type: str = "layer_norm",
        upsample_method: str = "interpolate",
        latent_channels: int = 4,
        sample_size: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        latents_mean=None,
        latents_std=None,
        force_upcast: bool = True,
    ):
        super().__init__()
        channels = list(block_out_channels)
        for name, value, known in (
            ("norm_pos", norm_pos, ("pre_norm", "post_norm")),
            ("norm_type", norm_type, ("layer_norm", "group_norm")),
            ("upsample_method", upsample_method, ("interpolate", "pixel_shuffle")),
            ("mid_block_type", mid_block_type, ("Block2D",)),
        ):
            if value not in known:
                raise ValueError(f"SimVAE: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, types in (("down_block_types", down_block_types), ("up_block_types", up_block_types)):
            if len(types) != len(channels):
                raise ValueError(f"SimVAE: {name} names {len(types)} blocks, block_out_channels {len(channels)}")
        if mid_block_out_channel not in (None, channels[-1]):
            raise ValueError(
                f"SimVAE: mid_block_out_channel {mid_block_out_channel} must equal the last of block_out_channels,"
                f" {channels[-1]}"
            )
        shared = (channels, layers_per_block, layers_mid_block, norm_pos, norm_type)
        self.encoder = Encoder(in_channels, latent_channels, *shared)
        self.decoder = Decoder(out_channels, latent_channels, *shared, upsample_method)
        self.multiple = 2 ** (len(channels) - 1)
        """Height and width of an image must be multiples of this; it is also the reduction of the latent."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → moments (B, 2 · latent_channels, H/f, W/f): mean, then unclamped log-variance.

        Raises ValueError when H or W is not a multiple of the reduction f.
        """
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(
                f"SimVAE.encode: height and width must be multiples of {self.multiple},"
                f" got {x.shape[-2]}x{x.shape[-1]}; pad the image"
            )
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w) → image (B, 3, h · f, w · f), about [-1, 1], unclipped."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction through the posterior mode."""
        return self.decode(self.encode(x).chunk(2, dim=1)[0])
