"""What the attention kernels share: how a tile is loaded.

Their products of float32 ask for IEEE precision: TF32, which is Triton's default, keeps 10 bits.
"""

import torch

from ._triton import INTERPRETED, jit, tl

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@jit
def load_tile(ptr, offs, mask, UPCAST: tl.constexpr):
    """Zeros where the mask is false: 0 times whatever lies there could be NaN."""
    tile = tl.load(ptr + offs, mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


def upcast(dtype: torch.dtype) -> bool:
    """Whether a tile must become float32 at the load: the interpreter cannot multiply bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def tile_size(n: int) -> int:
    """The power of two that holds n, of at least the 16 that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())
