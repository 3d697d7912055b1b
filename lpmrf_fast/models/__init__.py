"""The networks, with official constructor arguments, parameter names and shapes."""

from . import autoencoder_kl, hdit, loouformer, sim_vae, swinir
from .autoencoder_kl import AutoencoderKL
from .hdit import HDiT
from .loouformer import LooUFormer
from .sim_vae import SimVAE
from .swinir import SwinIR

__all__ = ["PRESETS", "AutoencoderKL", "HDiT", "LooUFormer", "SimVAE", "SwinIR", "build"]

PRESETS = {
    name: (cls, config)
    for cls, module in (
        (SimVAE, sim_vae),
        (AutoencoderKL, autoencoder_kl),
        (SwinIR, swinir),
        (LooUFormer, loouformer),
        (HDiT, hdit),
    )
    for name, config in module.PRESETS.items()
}
"""name → (class, constructor arguments) of the published configurations and of ours."""


def build(name: str, **changes):
    """A freshly initialised network of a preset, e.g. build("sim-vae-c32") or build("loouformer", in_channels=16)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    cls, config = PRESETS[name]
    return cls(**{**config, **changes})
