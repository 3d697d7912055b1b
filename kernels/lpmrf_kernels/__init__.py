"""Fused operations for face restoration: each is a torch op with a Triton, a C++ and a plain PyTorch backend.

`attention` and `neighborhood_attention_2d` have no kernels yet: they are the reference, plain differentiable PyTorch,
whatever backend is asked for. `backends()` says so for each of them.
"""

from . import registry as _registry
from .ada_rms_norm_2d import ada_rms_norm_2d
from .add_source_noise import add_source_noise
from .euler_step import euler_step
from .group_norm_silu import group_norm_silu
from .layer_norm_2d import layer_norm_2d
from .reference import attention, neighborhood_attention_2d, source_noise
from .registry import backends, fallbacks, use_backend
from .rms_norm_2d import rms_norm_2d

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
    "rms_norm_2d",
    "source_noise",
    "use_backend",
]

for _op in (attention, neighborhood_attention_2d):
    _note = "its kernel is not written yet"
    _registry.register(
        _registry.Op(_op.__name__, {"torch": _registry.Kernel(_op)}, notes={"forward": _note, "backward": _note})
    )
