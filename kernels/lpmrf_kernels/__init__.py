"""Fused operations for face restoration: each is a torch op with a Triton, a C++ and a plain PyTorch backend.

`group_norm_silu`, `layer_norm_2d`, `ada_rms_norm_2d`, `attention` and `neighborhood_attention_2d` have no kernels yet:
they are the reference, plain differentiable PyTorch, whatever backend is asked for. `backends()` says so for each.
"""

from . import registry as _registry
from .add_source_noise import add_source_noise
from .conv_epilogue import bias_residual, bias_silu
from .dwconv_geglu import dwconv_geglu, geglu
from .dwconv_rope_qkv import dwconv_rope_qkv
from .euler_step import euler_step
from .reference import (
    ada_rms_norm_2d,
    attention,
    group_norm_silu,
    layer_norm_2d,
    neighborhood_attention_2d,
    source_noise,
)
from .registry import backends, fallbacks, use_backend

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
    "geglu",
    "group_norm_silu",
    "layer_norm_2d",
    "neighborhood_attention_2d",
    "source_noise",
    "use_backend",
]

for _op in (ada_rms_norm_2d, attention, group_norm_silu, layer_norm_2d, neighborhood_attention_2d):
    _note = "its kernel is not written yet"
    _registry.register(
        _registry.Op(_op.__name__, {"torch": _registry.Kernel(_op)}, notes={"forward": _note, "backward": _note})
    )
