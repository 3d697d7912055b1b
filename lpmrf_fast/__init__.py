"""Latent-PMRF face restoration (arXiv 2507.00447): restores, trains and serves, on fused kernels.

from lpmrf_fast import LatentPMRFPipeline
restored = LatentPMRFPipeline.from_pretrained()(photo).images[0]
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {
    "LatentPMRFPipeline": ".pipeline",
    "PMRFPipeline": ".pipeline",
    "Pipeline": ".pipeline",
    "accelerate": ".backend",
    "restore_original": ".backend",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    # Late, because the command line sets variables that torch reads when it is imported, and answers --help without it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
