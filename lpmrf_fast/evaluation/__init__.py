"""How good restored faces are: against the originals face by face, and how alike the two sets look.

`evaluate(restored, reference, ...)` makes a table out of folders; `psnr`, `sliced_wasserstein` and the rest of
`metrics` take tensors.
"""

from .metrics import laplacian_pyramid, psnr, sliced_wasserstein
from .scores import Report, evaluate

__all__ = ["Report", "evaluate", "laplacian_pyramid", "psnr", "sliced_wasserstein"]
