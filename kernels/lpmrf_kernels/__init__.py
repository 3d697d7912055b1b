"""Fused operations for face restoration: each is a torch op with a Triton, a C++ and a plain PyTorch backend.

`euler_step`, `add_source_noise`, `output_euler`, `to_uint8` and `from_uint8` have kernels; `upsample_conv` is a
transposed convolution of PyTorch's. `group_norm_silu`, `layer_norm_2d`, `ada_rms_norm_2d`, `attention`
and `neighborhood_attention_2d` have none yet: they are the reference, plain differentiable PyTorch, whatever backend
is asked for. `backends()` says so for each of them.
"""

from . import registry as _registry
from .add_source_noise import add_source_noise
from .euler_step import euler_step
from .output_euler import output_euler
from .reference import (
    ada_rms_norm_2d,
    attention,
    group_norm_silu,
    layer_norm_2d,
    neighborhood_attention_2d,
    source_noise,
)
from .registry import backends, fallbacks, use_backend
from .uint8 import from_uint8, to_uint8
from .upsample_conv import fold_upsample_weight, upsample_conv

__all__ = [
    "ada_rms_norm_2d",
    "add_source_noise",
    "attention",
    "backends",
    "euler_step",
    "fallbacks",
    "fold_upsample_weight",
    "from_uint8",
    "group_norm_silu",
    "layer_norm_2d",
    "neighborhood_attention_2d",
    "output_euler",
    "source_noise",
    "to_uint8",
    "upsample_conv",
    "use_backend",
]

for _op in (ada_rms_norm_2d, attention, group_norm_silu, layer_norm_2d, neighborhood_attention_2d):
    _note = "its kernel is not written yet"
    _registry.register(
        _registry.Op(_op.__name__, {"torch": _registry.Kernel(_op)}, notes={"forward": _note, "backward": _note})
    )
