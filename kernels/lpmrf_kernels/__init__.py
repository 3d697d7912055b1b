"""Fused operations for face restoration: each is a torch op with a Triton, a C++ and a plain PyTorch backend.

`group_norm_silu`, `layer_norm_2d` and `ada_rms_norm_2d` have no kernels yet: they are the reference, plain
differentiable PyTorch, whatever backend is asked for. `backends()` says so for each of them.
"""

from . import registry as _registry
from .add_source_noise import add_source_noise
from .attention import attention, use_attention
from .euler_step import euler_step
from .neighborhood_attention_2d import neighborhood_attention_2d
from .reference import (
    ada_rms_norm_2d,
    group_norm_silu,
    layer_norm_2d,
    source_noise,
)
from .registry import backends, fallbacks, use_backend
from .window_attention import window_attention

__all__ = [
    "ada_rms_norm_2d",
    "add_source_noise",
    "attention",
    "backends",
    "euler_step",
    "fallbacks",
    "group_norm_silu",
    "layer_norm_2d",
    "neighborhood_attention_2d",
    "source_noise",
    "use_attention",
    "use_backend",
    "window_attention",
]

for _op in (ada_rms_norm_2d, group_norm_silu, layer_norm_2d):
    _note = "its kernel is not written yet"
    _registry.register(
        _registry.Op(_op.__name__, {"torch": _registry.Kernel(_op)}, notes={"forward": _note, "backward": _note})
    )
