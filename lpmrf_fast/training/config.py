"""One frozen dataclass holds all that a training run depends on; a YAML file fills it, `--set key=value` changes it."""

import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ..flow import TIME_SAMPLINGS
from .degradation import PRESETS as DEGRADATIONS
from .degradation import Ranges, TwoStage
from .log import TRACKERS

try:
    import yaml
except ImportError as error:
    raise ImportError('training needs PyYAML: pip install "lpmrf-fast[train]"') from error

STAGES = ("vae", "posterior-mean", "flow")
PRESETS = Path(__file__).parent / "presets"
CHOICES = {
    "objective": ("mse", "psnr"),
    "optimizer": ("adamw", "muon"),
    "precision": ("bf16", "fp32"),
    "schedule": ("trapezoid", "constant", "cosine"),
    "time_sampling": TIME_SAMPLINGS,
    "source": ("posterior-mean", "degraded", "noise"),
    "condition": (None, "degraded", "posterior-mean"),
    "degrade_on": ("cpu", "device"),
    "tracker": TRACKERS,
}
LEAST = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "size", "crop", "cycle", "keep"), 1),
    **dict.fromkeys(("log_every", "save_every", "val_every", "val_images"), 1),
    **dict.fromkeys(("workers", "cache", "warmup", "warmup_from", "lr_min", "weight_decay", "kl_weight"), 0),
    **dict.fromkeys(("perceptual_weight", "lpips_weight", "adversarial_weight"), 0),
    **dict.fromkeys(("noise_std", "latent_noise", "recolour", "jitter", "seed"), 0),
}
KINDS = {
    str: "text",
    dict: "a mapping",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list",
    types.NoneType: "null",
}


class ConfigError(ValueError):
    """A training configuration that cannot be used; the message names the key and the way out."""

    exit_status = 2
    """Of the command line: an argument that cannot be used."""


def _is(value, kind) -> bool:
    """Whether a value is of an annotated type; whole numbers are numbers, true and false are none, paths are text."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is, value, parts))
    if isinstance(kind, types.UnionType):
        return any(_is(value, k) for k in typing.get_args(kind))
    known = {float: (float, int), str: (str, os.PathLike)}.get(kind, kind)
    return isinstance(value, known) and (kind is bool or not isinstance(value, bool))


def _called(kind) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    return KINDS[kind] if kind in KINDS else " or ".join(map(_called, typing.get_args(kind)))


def _check_types(settings, where: str = "") -> None:
    for f in dataclasses.fields(settings):
        if f.init and not _is(value := getattr(settings, f.name), f.type):
            raise ConfigError(f"{where}{f.name} must be {_called(f.type)}, got {value!r}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one stage. Lengths in steps count optimiser steps; sizes in pixels of the image."""

    # what is trained
    out: str
    """Run folder: checkpoints, log and pictures."""
    model: dict
    """`preset: NAME` and/or constructor arguments; `class` (SimVAE, SwinIR, LooUFormer, HDiT) where there is none."""
    posterior_mean: str | None = None
    """flow: checkpoint of the posterior-mean network: a run's `model` folder, or published weights (DifFace's .pth)."""
    vae: str | None = None
    """flow: checkpoint of the VAE, likewise (Sim-VAE's folder). Without one the flow lives in pixels, as PMRF's."""

    # data
    train: str = "data/train"
    """Clean faces: a folder, searched recursively, a .tar of the webdataset kind, or a pattern such as faces/*.tar."""
    val: str | None = None
    """Clean faces for validation, likewise; degraded once and for all by the seed."""
    size: int = 512
    """Faces are resized to this many pixels on both sides."""
    crop: int | None = None
    """Side of random crops; none: whole faces. Smaller images are left out and listed."""
    flip: bool = True
    jitter: float = 0.0
    """Faces are turned (radians), grown and moved (shares) by up to this, each drawn anew; small sets gain by it."""
    degradation: str | dict = "blind-face"
    """A preset's name, or ranges: sigma, r, delta, q (pairs), kernel_size; `preset: NAME` in them starts from one."""
    degrade_on: str = "cpu"
    """Where training images are degraded: "cpu", by the workers, or "device", by the GPU, one image after another."""
    cache: int = 0
    """flow: degradations a face (and its mirror image) whose latents are computed once and kept; 0: computed live."""
    latents: str | None = None
    """flow: folder of the cache, which runs of other seeds and velocity networks may share; none: `out`/latents."""
    workers: int = 2

    # objective
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.05
    vgg_weights: str | None = None
    """File with VGG19 weights for the perceptual term, which is left out without it."""
    lpips_weight: float = 0.0
    """vae: weight of LPIPS, beside or in place of the perceptual term."""
    lpips_weights: str | None = None
    """File with AlexNet's or VGG16's weights for LPIPS; its linear weights are torchmetrics'."""
    recolour: float = 0.0
    """vae: share of images whose colour channels are put in another order."""
    frozen_encoder: bool = False
    """vae: train the decoder alone, so that latents, and a flow trained on them, stay valid."""
    latent_noise: float = 0.0
    """vae: the decoder sees latents with noise of up to this many of their deviations: it learns to forgive a flow."""
    adversarial_weight: float = 0.0
    """vae: gradient of the patch critic's term on the last layer, as a share of the L1 term's."""
    source: str = "posterior-mean"
    """flow: where it starts: "posterior-mean" (PMRF), "degraded" (the naive flow), or "noise" of deviation one."""
    condition: str | None = None
    """flow from noise: what the network sees beside its state, "degraded" or "posterior-mean"."""
    noise_std: float = 0.1
    """flow: deviation of the noise on the source; not for the source "noise"."""
    time_sampling: str = "uniform"
    """flow: "uniform", "stratified" or "logit-normal"."""
    objective: str = "mse"
    """posterior-mean: "mse", or "psnr" for the logarithm of each face's squared error."""
    identity_init: bool = False
    """posterior-mean with `pixelshuffledirect`: start as a low-pass copy of the input."""
    init: str | None = None
    """Folder of a trained model to start from."""

    # optimisation
    optimizer: str = "adamw"
    """"adamw", or "muon" for weights of linear layers and 1x1 convolutions, AdamW for the rest; at the same lr."""
    steps: int = 100_000
    batch_size: int = 8
    """Images a step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a process takes a step in, one after another: the gradient of a batch that does not fit."""
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-2
    schedule: str = "trapezoid"
    """"trapezoid", "constant" or "cosine", behind the warm-up."""
    warmup: int = 100
    warmup_from: float = 0.0
    """Share of lr that the warm-up starts at."""
    decay: float = 0.2
    """trapezoid: constant, then falling linearly to zero over this last share of the steps."""
    cycle: int | None = None
    """cosine: steps from lr to lr_min; none: all that are left."""
    lr_min: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "bf16"
    """bf16 (autocast) or fp32."""
    compile: bool = False
    """Through torch.compile: minutes at the start, fewer milliseconds a step on a GPU."""
    activation_checkpointing: bool = False
    """Blocks keep their inputs alone and compute the rest again on the way back: larger batches in less memory, at the
    price of a second forward pass. Gradients stay the same."""
    fsdp: bool = False
    """Several processes share out parameters, gradients, optimiser and EMA (FSDP) where each would hold all (DDP)."""
    seed: int = 0
    device: str = "auto"

    # reporting
    tracker: str = "auto"
    """"tensorboard", "wandb" or "none", beside log.jsonl; "auto": TensorBoard where it is installed."""
    log_every: int = 50
    save_every: int = 500
    keep: int = 2
    """The last checkpoints that are kept."""
    val_every: int = 500
    val_images: int = 8

    ranges: Ranges | TwoStage = field(init=False)

    def __post_init__(self):
        _check_types(self)
        object.__setattr__(self, "ranges", _ranges(self.degradation))
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and not value >= least:  # also NaN
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                names = ", ".join(f'"{k}"' if k else "null" for k in known)
                raise ConfigError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if (self.source == "noise") != (self.condition is not None):
            raise ConfigError('a flow from "noise" needs a condition ("degraded" or "posterior-mean"), others none')
        if self.lpips_weight and not self.lpips_weights:
            raise ConfigError("lpips_weight needs lpips_weights, a file with AlexNet's or VGG16's weights")
        if self.fsdp and self.adversarial_weight:
            raise ConfigError("fsdp and adversarial_weight do not go together: the critic balances one whole gradient")
        if self.fsdp and self.optimizer == "muon":
            raise ConfigError('fsdp and optimizer "muon" do not go together: it needs whole matrices; use "adamw"')
        if self.crop is not None and self.crop > self.size:
            raise ConfigError(f"crop {self.crop} is larger than size {self.size}")
        if self.jitter > 0.5:
            raise ConfigError(f"jitter must be at most 0.5, got {self.jitter}")
        if not 0 <= self.decay <= 1 or not 0 <= self.ema_decay < 1 or not 0 < self.lr < math.inf:
            raise ConfigError("decay must be in [0, 1], ema_decay in [0, 1) and lr positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {list(self.betas)}")
        if not self.grad_clip > 0:
            raise ConfigError(f"grad_clip must be positive, got {self.grad_clip}; .inf clips nothing")


def _ranges(value) -> Ranges | TwoStage:
    changes = dict(value) if isinstance(value, dict) else {"preset": value}
    name = changes.pop("preset", "blind-face")
    if name not in DEGRADATIONS:
        raise ConfigError(f"no degradation preset {name!r}; there are {', '.join(DEGRADATIONS)}")
    start = DEGRADATIONS[name]
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    ranges = dataclasses.replace(start, **_known(changes, type(start), "degradation"))
    _check_types(ranges, "degradation: ")
    try:
        ranges.check()
    except ValueError as error:
        raise ConfigError(f"degradation: {error}") from None
    return ranges


def _known(values: dict, cls, where: str) -> dict:
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise ConfigError(f"{where}: no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values


def load_config(path: str | Path, overrides: list[str] = ()) -> TrainConfig:
    """Read a YAML file and apply `key=value` overrides (values are YAML too; `model.x=1` reaches into a mapping).

    The name of a shipped preset does for a path. Raises ConfigError naming the file and the key.
    """
    shipped = PRESETS / f"{path}.yaml"
    if not Path(path).exists() and shipped.parent == PRESETS and shipped.exists():
        path = shipped
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); shipped presets: {known}") from None
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
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item}: {parent} is no mapping, it has no {last}")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item}: {text!r} is not valid YAML") from None
    values = _known(values, TrainConfig, str(path))
    for f in dataclasses.fields(TrainConfig):
        value = values.get(f.name)
        # YAML 1.1 reads 1e-4 as text.
        if isinstance(value, str) and f.type in (float, int):
            try:
                value = values[f.name] = float(value)
            except ValueError:
                raise ConfigError(f"{path}: {f.name} must be {KINDS[f.type]}, got {value!r}") from None
        if isinstance(value, float) and f.type is int and value.is_integer():
            values[f.name] = int(value)
        if isinstance(value, list):
            values[f.name] = tuple(value)
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {str(error).replace('TrainConfig.__init__() ', '')}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
