"""AutoencoderKL, the autoencoder of Stable Diffusion and FLUX, with the names and arguments of diffusers' class.

Sources: Rombach et al. 2022 (arXiv 2112.10752); the published configs of Stable Diffusion 1.5 and FLUX.1. Norm and
SiLU in front of every convolution are one op.
"""

from torch import Tensor, nn

import lpmrf_kernels as ops

from .config import records_config
from .layers import GroupNorm, nearest_2x

_PUBLISHED = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    act_fn="silu",
    norm_num_groups=32,
)
PRESETS = {
    "sd-vae": dict(**_PUBLISHED, latent_channels=4, sample_size=512, scaling_factor=0.18215),
    "flux-vae": dict(
        **_PUBLISHED,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) + x, which goes through a 1x1 convolution where channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, act="silu")
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, act="silu")
        self.conv2 = conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Attention(nn.Module):
    """x + attention(norm(x)): one head as wide as the channels, over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, pixels, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](ops.attention(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsampler(nn.Module):
    """Halves the size; a row and a column of zeros are added at the bottom and at the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


class Upsampler(nn.Module):
    """Nearest 2x, then convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nearest_2x(x))


class Level(nn.Module):
    """Residual blocks, the first of which changes the channels, then the resampler under its official name, if any."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, **resampler: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(out_channels if i else in_channels, out_channels, groups) for i in range(layers)
        )
        self.resampler = next(iter(resampler), None)
        for name, module in resampler.items():
            self.add_module(name, nn.ModuleList([module]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resampler is None else getattr(self, self.resampler)[0](x)


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, in_channels: int, latent_channels: int, channels: list, layers: int, groups: int, attend: bool):
        super().__init__()
        self.conv_in = conv3x3(in_channels, channels[0])
        self.down_blocks = nn.ModuleList()
        for before, after in zip(channels[:1] + channels, channels):
            last = len(self.down_blocks) == len(channels) - 1
            resampler = {} if last else {"downsamplers": Downsampler(after)}
            self.down_blocks.append(Level(before, after, layers, groups, **resampler))
        self.mid_block = MidBlock(channels[-1], groups, attend)
        self.conv_norm_out = GroupNorm(groups, channels[-1], act="silu")
        self.conv_out = conv3x3(channels[-1], 2 * latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, out_channels: int, latent_channels: int, channels: list, layers: int, groups: int, attend: bool):
        super().__init__()
        channels = channels[::-1]  # coarse to fine
        self.conv_in = conv3x3(latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups, attend)
        self.up_blocks = nn.ModuleList()
        for before, after in zip(channels[:1] + channels, channels):
            last = len(self.up_blocks) == len(channels) - 1
            resampler = {} if last else {"upsamplers": Upsampler(after)}
            self.up_blocks.append(Level(before, after, layers + 1, groups, **resampler))
        self.conv_norm_out = GroupNorm(groups, channels[-1], act="silu")
        self.conv_out = conv3x3(channels[-1], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(self.conv_norm_out(z))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1]; no latent scaling inside. Arguments are those of diffusers' AutoencoderKL.

    scaling_factor and shift_factor are only recorded: a pipeline applies them as (mean - shift) * scale. sample_size,
    force_upcast, latents_mean and latents_std are bookkeeping of published files.
    """

    @records_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | list | None = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean=None,
        latents_std=None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        channels = list(block_out_channels)
        for name, types, known in (
            ("down_block_types", down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", up_block_types, "UpDecoderBlock2D"),
        ):
            if len(types) != len(channels):
                raise ValueError(f"AutoencoderKL: {name} names {len(types)} blocks, block_out_channels {len(channels)}")
            if set(types) - {known}:
                raise ValueError(f"AutoencoderKL: {name} must all be {known}, got {', '.join(sorted(set(types)))}")
        if act_fn not in ("silu", "swish"):
            raise ValueError(f"AutoencoderKL: act_fn must be silu (or its other name, swish), got {act_fn!r}")
        shared = (channels, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, latent_channels, *shared)
        self.decoder = Decoder(out_channels, latent_channels, *shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.multiple = 2 ** (len(channels) - 1)
        """The reduction of the latent. A height or width that is no multiple of it is rounded down."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → moments (B, 2 · latent_channels, ⌊H/f⌋, ⌊W/f⌋): mean, then unclamped log-variance.

        Raises ValueError when H or W is less than the reduction f.
        """
        if min(x.shape[-2:]) < self.multiple:
            raise ValueError(
                f"AutoencoderKL.encode: height and width must be at least {self.multiple},"
                f" got {x.shape[-2]}x{x.shape[-1]}; pad the image"
            )
        moments = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: Tensor) -> Tensor:
        """(B, latent_channels, h, w) → image (B, 3, h · f, w · f), about [-1, 1], unclipped."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction through the posterior mode."""
        return self.decode(self.encode(x).chunk(2, dim=1)[0])
