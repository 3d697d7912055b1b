"""Fused operations for face restoration: each is a torch op with a Triton, a C++ and a plain PyTorch backend.

`backends()` says which of them serves an op, forward and backward, and why another does not.
"""

from .ada_rms_norm_2d import ada_rms_norm_2d
from .add_source_noise import add_source_noise
from .attention import attention, use_attention
from .conv_epilogue import bias_residual, bias_silu
from .dwconv_geglu import dwconv_geglu, geglu
from .dwconv_rope_qkv import dwconv_rope_qkv
from .euler_step import euler_step
from .group_norm_silu import group_norm_silu
from .layer_norm_2d import layer_norm_2d
from .neighborhood_attention_2d import neighborhood_attention_2d
from .output_euler import output_euler
from .reference import source_noise
from .registry import backends, fallbacks, use_backend
from .rms_norm_2d import rms_norm_2d
from .uint8 import from_uint8, to_uint8
from .upsample_conv import fold_upsample_weight, upsample_conv
from .window_attention import window_attention

__all__ = [
    "ada_rms_norm_2d",
    "add_source_noise",
    "attention",
    "backends",
    "bias_residual",
    "bias_silu",
    "dwconv_geglu",
    "dwconv_rope_qkv",
    "euler_step",
    "fallbacks",
    "fold_upsample_weight",
    "from_uint8",
    "geglu",
    "group_norm_silu",
    "layer_norm_2d",
    "neighborhood_attention_2d",
    "output_euler",
    "rms_norm_2d",
    "source_noise",
    "to_uint8",
    "upsample_conv",
    "use_attention",
    "use_backend",
    "window_attention",
]
