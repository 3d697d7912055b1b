"""One frozen dataclass holds all that a training run depends on; a YAML file fills it, `--set key=value` changes it."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from .degradation import PRESETS as DEGRADATIONS
from .degradation import Ranges

try:
    import yaml
except ImportError as error:
    raise ImportError('training needs PyYAML: pip install "lpmrf-fast[train]"') from error

STAGES = ("vae", "posterior-mean", "flow")


class ConfigError(ValueError):
    """A training configuration that cannot be used; the message names the key and the way out."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one stage. Lengths in steps count optimiser steps; sizes in pixels of the image."""

    # what is trained
    out: str
    """Run folder: checkpoint, log and pictures."""
    model: dict
    """`preset: NAME` and/or constructor arguments; `class` (SimVAE, SwinIR, LooUFormer, HDiT) where there is none."""
    posterior_mean: str | None = None
    """flow: checkpoint of the posterior-mean network: a run's `model` folder, or published weights (DifFace's .pth)."""
    vae: str | None = None
    """flow: checkpoint of the VAE, likewise (Sim-VAE's folder). Without one the flow lives in pixels, as PMRF's."""

    # data
    train: str = "data/train"
    """Folder of clean faces, searched recursively."""
    val: str | None = None
    """Folder of clean faces for validation; degraded once and for all by the seed."""
    size: int = 512
    """Faces are resized to this many pixels on both sides."""
    crop: int | None = None
    """Side of random crops; none: whole faces."""
    flip: bool = True
    degradation: str | dict = "blind-face"
    """A preset's name, or ranges: sigma, r, delta, q (pairs), kernel_size."""
    cache: int = 0
    """flow: degradations a face (and its mirror image) whose latents are computed once and kept; 0: computed live."""
    workers: int = 2

    # objective
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.05
    vgg_weights: str | None = None
    """File with VGG19 weights for the perceptual term, which is left out without it."""
    recolour: float = 0.0
    """vae: share of images whose colour channels are put in another order."""
    frozen_encoder: bool = False
    """vae: train the decoder alone, so that latents, and a flow trained on them, stay valid."""
    latent_noise: float = 0.0
    """vae: the decoder sees latents with noise of up to this many of their deviations: it learns to forgive a flow."""
    adversarial_weight: float = 0.0
    """vae: gradient of the patch critic's term on the last layer, as a share of the L1 term's."""
    noise_std: float = 0.1
    time_sampling: str = "uniform"
    objective: str = "mse"
    """posterior-mean: "mse", or "psnr" for the logarithm of each face's squared error."""
    identity_init: bool = False
    """posterior-mean with `pixelshuffledirect`: start as a low-pass copy of the input."""
    init: str | None = None
    """Folder of a trained model to start from."""

    # optimisation
    steps: int = 100_000
    batch_size: int = 8
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-2
    warmup: int = 100
    decay: float = 0.2
    """The learning rate is constant, then falls linearly to zero over this last share of the steps."""
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    seed: int = 0
    device: str = "auto"

    # reporting
    log_every: int = 50
    save_every: int = 500
    val_every: int = 500
    val_images: int = 8

    ranges: Ranges = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "ranges", _ranges(self.degradation))
        for name in ("steps", "batch_size", "size", "log_every", "save_every", "val_every", "val_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.objective not in ("mse", "psnr"):
            raise ConfigError(f'objective must be "mse" or "psnr", got {self.objective!r}')
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f'precision must be "bf16" or "fp32", got {self.precision!r}')
        if self.crop is not None and self.crop > self.size:
            raise ConfigError(f"crop {self.crop} is larger than size {self.size}")
        if not 0 <= self.decay <= 1 or not 0 <= self.ema_decay < 1 or self.lr <= 0:
            raise ConfigError("decay must be in [0, 1], ema_decay in [0, 1) and lr positive")


def _ranges(value) -> Ranges:
    if isinstance(value, str):
        if value not in DEGRADATIONS:
            raise ConfigError(f"no degradation preset {value!r}; there are {', '.join(DEGRADATIONS)}")
        return DEGRADATIONS[value]
    return Ranges(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in _known(value, Ranges, "degradation").items()}
    )


def _known(values: dict, cls, where: str) -> dict:
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise ConfigError(f"{where}: no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def load_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key=value` overrides (values are YAML too; `model.x=1` reaches into a mapping).

    Raises ConfigError naming the file and the key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected key=value")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(text)
    values = _known(values, TrainConfig, str(path))
    for f in dataclasses.fields(TrainConfig):
        value = values.get(f.name)
        # YAML 1.1 reads 1e-4 as text.
        if isinstance(value, str) and f.type in (float, int):
            try:
                values[f.name] = f.type(float(value))
            except ValueError:
                raise ConfigError(f"{path}: {f.name} must be a number, got {value!r}") from None
        if isinstance(value, list):
            values[f.name] = tuple(value)
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).replace('TrainConfig.__init__() ', '')}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
