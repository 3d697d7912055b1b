"""Images in, images out: Latent-PMRF (arXiv 2507.00447) and PMRF (arXiv 2410.00418) face restoration.

Four stages, each a method over tensors:

    x̄ = predict_mean(y)          posterior mean, [0, 1]
    z = add_noise(encode(x̄))     source of the flow
    z = sample(z)                Euler steps along velocity_at(z, t), t from 0 (source) to 1 (clean)
    x̂ = decode(z)                [0, 1]

PMRF is the same chain with encode and decode the identity, so that its source is an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

import lpmrf_kernels as ops

from . import checkpoint, flow
from .checkpoint import CheckpointError
from .devices import DTYPES, DeviceError, default_device, default_dtype
from .engine import Engine
from .engine.tiles import reflected as _reflected

__all__ = [
    "DTYPES",
    "DeviceError",
    "LatentPMRFPipeline",
    "NonFiniteError",
    "PMRFPipeline",
    "Pipeline",
    "Restoration",
    "default_device",
    "default_dtype",
]

OUTPUT_TYPES = ("pil", "np", "pt")
PIL_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV")
"""8-bit modes, all of which PIL converts to RGB; it cuts off the others (16 bits, floats)."""


@dataclass
class Restoration:
    """What a pipeline returns; all lists are in the order of the input."""

    images: list | Tensor
    """Restored photos in the form that `output_type` asked for."""
    posterior_means: list | Tensor
    """Minimum-error estimates from which the flow started, in the same form."""
    failed: list[int] = field(default_factory=list)
    """Photos whose result is not finite: None in the lists above, or NaN in a tensor."""


class NonFiniteError(RuntimeError):
    """Some photos came out as NaN or infinite; `result` is the Restoration, with the other photos in it."""

    def __init__(self, result: Restoration, count: int):
        self.result = result
        self.failed = result.failed
        which = ", ".join(map(str, result.failed[:5])) + (", ..." if len(result.failed) > 5 else "")
        super().__init__(
            f"{len(result.failed)} of {count} images came out non-finite (index {which}); use dtype='float32', or check"
            " the checkpoint"
        )


# ---- pipelines


class Pipeline:
    """What both pipelines share: loading, saving, and the way from images to images.

    `Pipeline.from_pretrained` picks the class that the checkpoint names. Subclasses name their networks and settings,
    which are also their constructor's arguments, and say what source space is.
    """

    networks: tuple[str, ...]
    settings: tuple[str, ...]
    time_runs_down: bool
    """Convention of a velocity network that does not name its own, see `flow.velocity`."""
    eps = 0.0
    card: dict | None = None
    """What the checkpoint says about itself: data, training, scores."""

    def __init__(self, **networks: nn.Module):
        for name, network in networks.items():
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
            setattr(self, name, network.eval())
        self.to()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {name: getattr(self, name) for name in self.networks}

    @property
    def device(self) -> torch.device:
        return next((p.device for m in self.modules.values() for p in m.parameters()), torch.device("cpu"))

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of images and of the flow's state between the networks: float32, or float64 where a network is."""
        dtypes = {_dtype_of(network) for network in self.modules.values()}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def __repr__(self) -> str:
        networks = (
            f"{name}={type(m).__name__}({sum(p.numel() for p in m.parameters()) / 1e6:.1f} M, {_dtype_of(m)})"
            for name, m in self.modules.items()
        )
        settings = (f"{name}={getattr(self, name)}" for name in self.settings)
        return f"{type(self).__name__}({', '.join((*networks, *settings))}, device={self.device})"

    # ---- loading and saving

    @classmethod
    def from_pretrained(
        cls, name_or_path=None, dtype="auto", device="auto", revision: str | None = None, local_files_only: bool = False
    ):
        """The pipeline of a checkpoint, ours or published PMRF weights: a folder, a file, a bundled name, or
        `owner/name` on the hub.

        No name: the bundled checkpoint. dtype: of the networks, see `default_dtype`; None: as stored, at least float32.
        device: see `default_device`. Raises CheckpointError (a ValueError) for a checkpoint that cannot be used.
        """
        device = default_device(device)
        dtype = dtype if dtype is None else default_dtype(dtype, device)
        config, networks = checkpoint.load(name_or_path, revision, local_files_only)
        which = checkpoint.DEFAULT_NAME if name_or_path is None else name_or_path
        classes = {c.__name__: c for c in (LatentPMRFPipeline, PMRFPipeline)}
        found = classes.get(str(config["pipeline"]))
        if found is None:
            raise CheckpointError(f"{which}: unknown pipeline {config['pipeline']!r}; there are {', '.join(classes)}")
        if not issubclass(found, cls):
            raise CheckpointError(f"{which}: a checkpoint of {found.__name__}; use that class or Pipeline")
        if set(networks) != set(found.networks):
            raise CheckpointError(
                f"{which}: a {found.__name__} has the modules {', '.join(found.networks)}, got {', '.join(networks)}"
            )
        try:
            pipe = found(**networks, **config["settings"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{which}: settings that do not fit: {error}") from error
        pipe.card = config.get("card")
        return pipe.to(device, dtype)

    def save_pretrained(self, folder, dtype: str | torch.dtype | None = None, card: dict | None = None):
        """Write config.json and model.safetensors; returns the folder.

        dtype: how parameters are stored, None: as they are. card: replaces the pipeline's own. Raises CheckpointError.
        """
        if isinstance(dtype, str):
            dtype = default_dtype(dtype, torch.device("meta"))
        settings = {name: getattr(self, name) for name in self.settings}
        card = self.card if card is None else card
        return checkpoint.save(folder, type(self).__name__, settings, self.modules, dtype, card)

    def to(self, device=None, dtype=None):
        """Move and cast the networks in place, channels-last; None keeps what there is. Returns the pipeline."""
        device = self.device if device is None else default_device(device)
        dtype = dtype if dtype is None else default_dtype(dtype, device)
        for network in self.modules.values():
            network.to(device, dtype, memory_format=torch.channels_last)
        return self

    # ---- the stages, over batches of one size

    def predict_mean(self, y: Tensor) -> Tensor:
        """Posterior mean x̄ = clip(f(y)): (B, 3, H, W) in [0, 1] → the same. Non-finite values become NaN.

        H and W must fit `padded_size`.
        """
        low, high = self.posterior_mean_range
        x = self._run(self.posterior_mean, y * (high - low) + low)
        if x.shape != y.shape:
            raise ValueError(
                f"posterior_mean turned {tuple(y.shape)} into {tuple(x.shape)}; it must keep the size of the image"
            )
        return _clip((x - low) / (high - low))

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] → its point in source space, before noise."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of `encode`: an image about [0, 1], unclipped."""
        raise NotImplementedError

    def velocity_at(self, z: Tensor, t: float | Tensor, tables=None, step: int | Tensor | None = None) -> Tensor:
        """v(z, t) = clean - source in the velocity network's dtype; t from 0 (source) to 1 (clean), or (B,) of them.

        tables: what `tables` made for several times, of which `step` is this one's index, an int or an int64 (1,).
        """
        x = self._velocity_input(z)
        if tables is not None:
            v = self.velocity(x, tables=tables, step=step)
            return -v if self._time_runs_down else v
        t = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(z.shape[0])  # never rounded to a network's dtype
        return flow.velocity(self.velocity, x, t, self.time_runs_down)

    def euler_step(self, z: Tensor, t: float | Tensor, dt: float, tables=None, step: int | None = None) -> Tensor:
        """z + dt · v(z, t), arguments as for `velocity_at`; with tables, one pass with the network's last layers where
        it can (`fuses_euler`).
        """
        if tables is None or not getattr(self.velocity, "fuses_euler", False):
            return ops.euler_step(z, self.velocity_at(z, t, tables, step), dt)
        euler = (z, -dt if self._time_runs_down else dt)
        return self.velocity(self._velocity_input(z), tables=tables, step=step, euler=euler)

    def _velocity_input(self, z: Tensor) -> Tensor:
        return z.to(_dtype_of(self.velocity), memory_format=torch.channels_last)

    def tables(self, times: Tensor, height: int, width: int):
        """What the velocity network knows from times (K,) and the size of the state alone, for `velocity_at`.

        None where it has no `prepare` (see `models.tables`).
        """
        network = self.velocity
        if not hasattr(network, "prepare"):
            return None
        timed = getattr(network, "time_embed_dim", 0) is not None
        return network.prepare((1 - times if self._time_runs_down else times) if timed else None, height, width)

    @property
    def _time_runs_down(self) -> bool:
        return getattr(self.velocity, "time_runs_down", self.time_runs_down)

    def add_noise(self, z: Tensor, seeds: Sequence[int] | Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """z + noise_std · noise, the noise given (unit variance, z's shape) or drawn from one seed a photo (None: 0s).

        Drawn noise is counted by the position in the padded (C, H, W), so that a photo gets the same noise in any batch
        and place, but one padded to another size would not. At least float32.
        """
        if noise is not None:
            if noise.shape != z.shape:
                raise ValueError(
                    f"noise must have the shape of the padded source, {tuple(z.shape[1:])} a photo here, got"
                    f" {tuple(noise.shape[1:])}"
                )
            return z + self.noise_std * noise.to(z)
        seeds = torch.as_tensor([0] * len(z) if seeds is None else seeds, dtype=torch.int64, device=z.device)
        if z.dtype == torch.float64:
            return z + self.noise_std * ops.source_noise(z.shape, seeds).double()
        return ops.add_source_noise(z, self.noise_std, seeds)

    def sample(self, z: Tensor, num_inference_steps: int = 25, callback_on_step_end=None) -> Tensor:
        """Euler steps from the source z at t = eps to t = 1; the state is at least float32.

        What the velocity network knows from the times and the size alone is computed before the first step, where it
        has a `prepare` (see `models.tables`).
        """
        times = flow.time_grid(num_inference_steps, self.eps)[:-1]
        tables = self.tables(torch.tensor(times, dtype=z.dtype, device=z.device), *z.shape[-2:])
        step = lambda k, z, t, dt: self.euler_step(z, t, dt, tables, k)
        return flow.integrate(step, z, num_inference_steps, self.eps, callback_on_step_end)

    def restore(
        self,
        y: Tensor,
        num_inference_steps: int = 25,
        seeds: Sequence[int] | None = None,
        noise: Tensor | None = None,
        callback_on_step_end=None,
    ) -> tuple[Tensor, Tensor]:
        """All stages over a batch of one padded size: y (B, 3, H, W) in [0, 1] → (x̂, x̄), both clipped to [0, 1].

        Where something is not finite, x̂ is NaN.
        """
        mean = self.predict_mean(y)
        z = self.add_noise(self.encode(mean), seeds, noise)
        return _clip(self.decode(self.sample(z, num_inference_steps, callback_on_step_end))), mean

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which an image is padded, on its lower and right side, for the networks' sake."""
        posterior_mean, velocity = _pair(self.posterior_mean, "multiple"), _pair(self.velocity, "multiple")
        minimum = _pair(self.velocity, "minimum")
        source = _pair(self.vae, "multiple") if "vae" in self.networks else (1, 1)  # pixels a source element
        sizes = []
        for axis, size in enumerate((height, width)):
            multiple = math.lcm(posterior_mean[axis], source[axis] * velocity[axis])
            sizes.append(math.ceil(max(size, source[axis] * minimum[axis]) / multiple) * multiple)
        return tuple(sizes)

    def _run(self, network: Callable, x: Tensor, *args) -> Tensor:
        """A network between two stage borders: its own dtype and channels-last inside, `state_dtype` outside."""
        x = x.to(_dtype_of(network), memory_format=torch.channels_last)
        return network(x, *args).to(self.state_dtype)

    # ---- images in, images out

    @torch.no_grad()
    def __call__(
        self,
        images,
        num_inference_steps: int = 25,
        seed: int | Sequence[int] = 0,
        noise: Tensor | Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[int, float, Tensor], None] | None = None,
        batch_size: int | None = None,
    ):
        """Restore faces.

        images: one or a list of PIL images, numpy arrays (H, W, 3) or (N, H, W, 3), or torch tensors (3, H, W) or
            (N, 3, H, W); arrays and tensors uint8, or float in [0, 1]. Sizes may differ: each photo is padded by
            reflection on its lower and right side (`padded_size`) and cropped back, whatever else is in the list.
        num_inference_steps: Euler steps K.
        seed: one int for every photo alike, or a list of one a photo (int64).
        noise: unit-variance noise in source space, padded size (latents, or pixels for PMRF): (N, C, h, w), or a list
            of (C, h, w) where sizes differ. Multiplied by noise_std; overrides seed.
        output_type: "pil", "np" (float32 (H, W, 3) in [0, 1]) or "pt" (float32 (N, 3, H, W) in [0, 1] on the pipeline's
            device, a list where sizes differ).
        return_dict: False returns the tuple (images, posterior_means) in place of a Restoration.
        callback_on_step_end: called as (k, t, z) after each Euler step of each batch, k from 0: the state and its time.
        batch_size: photos of one padded size that run together; None: as many as fill eight of 512x512.

        Raises ValueError or TypeError for unusable arguments, and NonFiniteError, after all photos are done, when some
        came out as NaN: its `result` holds the others.
        """
        flow.time_grid(num_inference_steps)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if batch_size is not None and (not _is_int(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        photos = [_photo(image, i) for i, image in enumerate(_listed(images))]
        seeds = _seeds(seed, len(photos))
        noises = None if noise is None else _noises(noise, len(photos))

        restored, means, failed = [None] * len(photos), [None] * len(photos), []
        for size, indices in self._batches(photos, batch_size):
            results = self.restore(
                torch.stack([self._padded(photos[i], size) for i in indices]),
                num_inference_steps,
                [seeds[i] for i in indices],
                None if noises is None else torch.stack([noises[i] for i in indices]),
                callback_on_step_end,
            )
            crops = [
                [x[..., : photos[i].shape[-2], : photos[i].shape[-1]] for x in photo]
                for i, photo in zip(indices, zip(*results))
            ]
            finite = torch.stack([torch.stack([x.isfinite().all() for x in crop]).all() for crop in crops]).tolist()
            for i, crop, good in zip(indices, crops, finite):
                if not good:
                    failed.append(i)
                if good or output_type == "pt":
                    restored[i], means[i] = (_converted(x, output_type) for x in crop)
        if output_type == "pt" and len({photo.shape for photo in photos}) == 1:
            restored, means = torch.stack(restored), torch.stack(means)
        result = Restoration(restored, means, sorted(failed))
        if failed:
            raise NonFiniteError(result, len(photos))
        return result if return_dict else (result.images, result.posterior_means)

    def engine(self, **options) -> Engine:
        """This pipeline made fast, for many photos: an `engine.Engine` on the device and in the dtypes of now.

        It takes uint8 tensors, captures CUDA graphs on a GPU, and shares the weights. Options are those of Engine.
        """
        return Engine(self, **options)

    def _batches(self, photos: list[Tensor], batch_size: int | None):
        """(padded size, indices) of the batches: photos of one padded size together, in order."""
        groups = {}
        for i, photo in enumerate(photos):
            groups.setdefault(self.padded_size(*photo.shape[-2:]), []).append(i)
        for (H, W), indices in groups.items():
            step = batch_size or max(1, min(8, 8 * 512 * 512 // (H * W)))
            for first in range(0, len(indices), step):
                yield (H, W), indices[first : first + step]

    def _padded(self, photo: Tensor, size: tuple[int, int]) -> Tensor:
        """(3, h, w) uint8 or float → (3, H, W) in [0, 1] on the pipeline's device."""
        x = photo.to(self.device)
        x = ops.from_uint8(x[None], dtype=self.state_dtype)[0] if x.dtype == torch.uint8 else x.to(self.state_dtype)
        rows, columns = (_reflected(n, size[axis], x.device) for axis, n in enumerate(x.shape[-2:]))
        return x[:, rows[:, None], columns]


class LatentPMRFPipeline(Pipeline):
    """Latent-PMRF: the flow runs in a VAE's latent space.

    posterior_mean: network (B, 3, H, W) → the same. vae: `encode(x)` → moments, `decode(z)`, images in [-1, 1].
    velocity: network (z, sigma) of the official convention, sigma = 1 - t and v = source - clean (LooUFormer), or one
    that names its own, see `flow.velocity`.
    noise_std: of the source's noise, in units of the scaled latent. latent_shift, latent_scale: the flow's latent is
    (mean - shift) · scale; None: the VAE config's shift_factor and scaling_factor, and 0 and 1 where it has none.
    posterior_mean_range: the range of images that the posterior-mean network works in; in and out are [0, 1] anyway.
    The networks are put in eval mode and channels-last.
    """

    networks = ("posterior_mean", "vae", "velocity")
    settings = ("noise_std", "latent_shift", "latent_scale", "posterior_mean_range")
    time_runs_down = True

    def __init__(
        self,
        posterior_mean: nn.Module,
        vae: nn.Module,
        velocity: nn.Module,
        noise_std: float = 0.1,
        latent_shift: float | None = None,
        latent_scale: float | None = None,
        *,
        posterior_mean_range: Sequence[float] = (0.0, 1.0),
    ):
        super().__init__(posterior_mean=posterior_mean, vae=vae, velocity=velocity)
        config = getattr(vae, "config", {})
        shift = config.get("shift_factor") if latent_shift is None else latent_shift
        scale = config.get("scaling_factor") if latent_scale is None else latent_scale
        self.noise_std = _number("noise_std", noise_std, at_least=0)
        self.latent_shift = 0.0 if shift is None else _number("latent_shift", shift)
        self.latent_scale = 1.0 if scale is None else _number("latent_scale", scale)
        if self.latent_scale == 0:
            raise ValueError("latent_scale must not be 0; use 1 for unscaled latents")
        self.posterior_mean_range = _range("posterior_mean_range", posterior_mean_range)

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] → (posterior mode - shift) · scale, (B, C, h, w)."""
        mean = self._run(self.vae.encode, x * 2 - 1).chunk(2, dim=1)[0]
        return (mean - self.latent_shift) * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, C, h, w) of the flow → image (B, 3, H, W), about [0, 1], unclipped."""
        return self._run(self.vae.decode, z / self.latent_scale + self.latent_shift) / 2 + 0.5


class PMRFPipeline(Pipeline):
    """PMRF: the flow runs in pixels, [0, 1] throughout.

    posterior_mean: network (B, 3, H, W) → the same. velocity: network (x, t), v = clean - source (HDiT), or one that
    names its own convention, see `flow.velocity`.
    noise_std: of the source's noise, in pixel units. eps: the first time of the flow. posterior_mean_range: the range
    of images that the posterior-mean network works in. The networks are put in eval mode and channels-last.
    """

    networks = ("posterior_mean", "velocity")
    settings = ("noise_std", "eps", "posterior_mean_range")
    time_runs_down = False

    def __init__(
        self,
        posterior_mean: nn.Module,
        velocity: nn.Module,
        noise_std: float = 0.1,
        eps: float = 0.0,
        *,
        posterior_mean_range: Sequence[float] = (0.0, 1.0),
    ):
        super().__init__(posterior_mean=posterior_mean, velocity=velocity)
        self.noise_std = _number("noise_std", noise_std, at_least=0)
        self.eps = _number("eps", eps, at_least=0)
        flow.time_grid(1, self.eps)
        self.posterior_mean_range = _range("posterior_mean_range", posterior_mean_range)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


# ---- helpers


def _dtype_of(network) -> torch.dtype:
    """Dtype of a network's parameters, of a bound method's network too; float32 where it has none."""
    network = getattr(network, "__self__", network)
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _clip(x: Tensor) -> Tensor:
    """x within [0, 1]; infinities become NaN rather than black or white pixels."""
    return x.clamp(0, 1).masked_fill(~x.isfinite(), math.nan)


def _pair(network, name: str) -> tuple[int, int]:
    """A network's `multiple` or `minimum` for (height, width); 1 where it names none."""
    value = getattr(network, name, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


def _is_int(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(name: str, value, at_least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < at_least:
        raise ValueError(
            f"{name} must be finite{f' and at least {at_least}' if at_least > -math.inf else ''}, got {value}"
        )
    return float(value)


def _range(name: str, value) -> list[float]:
    try:
        low, high = (_number(name, v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers such as (0, 1) or (-1, 1), got {value!r}") from None
    if low >= high:
        raise ValueError(f"{name} must increase, got {value!r}")
    return [low, high]


# ---- images, seeds and noise as people give them


def _listed(images) -> list:
    if isinstance(images, (np.ndarray, Tensor)):
        if images.ndim not in (3, 4):
            form = "(3, H, W) or (N, 3, H, W)" if isinstance(images, Tensor) else "(H, W, 3) or (N, H, W, 3)"
            raise ValueError(f"images must be {form}, got the shape {tuple(images.shape)}")
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, PIL.Image.Image):
        images = [images]
    elif not isinstance(images, (list, tuple)):
        raise TypeError(
            "images must be PIL images, numpy arrays or torch tensors, or a list of them, got"
            f" {type(images).__name__}; open files with PIL.Image.open, or use lpmrf-fast restore"
        )
    if not len(images):
        raise ValueError("there are no images; give at least one")
    return list(images)


def _photo(image, index: int) -> Tensor:
    """One image as (3, H, W): uint8, or float in [0, 1]."""
    where = f"image {index}"
    if isinstance(image, PIL.Image.Image):
        if image.mode not in PIL_MODES:
            raise ValueError(f"{where}: PIL mode {image.mode!r} has more than 8 bits; scale it to 8-bit RGB first")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise TypeError(f"{where}: arrays must be uint8, or float in [0, 1], got {image.dtype}")
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"{where}: arrays must be (H, W, 3), RGB, got the shape {image.shape}")
        kind = image.dtype if image.dtype in (np.uint8, np.float64) else np.float32
        photo = torch.from_numpy(np.array(image, dtype=np.dtype(kind).newbyteorder("="))).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"{where}: tensors must be uint8, or float in [0, 1], got {image.dtype}")
        if image.dim() != 3 or image.shape[0] != 3:
            hint = "; call permute(2, 0, 1)" if image.dim() == 3 and image.shape[-1] == 3 else ""
            raise ValueError(f"{where}: tensors must be (3, H, W), RGB, got the shape {tuple(image.shape)}{hint}")
        photo = image.detach()
    else:
        raise TypeError(f"{where}: expected a PIL image, numpy array or torch tensor, got {type(image).__name__}")
    if photo.numel() == 0:
        raise ValueError(f"{where}: has no pixels, its shape is {tuple(image.shape)}")
    if photo.is_floating_point():
        low, high = (float(v) for v in photo.aminmax())
        if math.isnan(low):
            raise ValueError(f"{where}: has NaN pixels; replace them first")
        if low < 0 or high > 1:
            raise ValueError(
                f"{where}: float pixels must be in [0, 1], got {low:g} to {high:g}; divide by 255, or map [-1, 1] by"
                " x / 2 + 0.5, or clip"
            )
    return photo


def _seeds(seed, count: int) -> list[int]:
    seeds = [seed] * count if _is_int(seed) else seed
    if isinstance(seeds, (np.ndarray, Tensor)):
        seeds = seeds.tolist()
    if not isinstance(seeds, (list, tuple)) or not all(_is_int(s) for s in seeds):
        raise TypeError(f"seed must be an int, or a list of one int a photo, got {seed!r}")
    if len(seeds) != count:
        raise ValueError(f"seed: {len(seeds)} seeds for {count} images; give one int, or one a photo")
    for s in seeds:
        if not -(2**63) <= s < 2**63:
            raise ValueError(f"seed {s} does not fit 64 bits; use one in [0, 2**63)")
    return [int(s) for s in seeds]


def _noises(noise, count: int) -> list[Tensor]:
    noises = [noise] if isinstance(noise, Tensor) and noise.dim() == 3 else noise
    if not isinstance(noises, (Tensor, list, tuple)) or not all(isinstance(n, Tensor) for n in noises):
        raise TypeError(
            f"noise must be a tensor (N, C, h, w) or a list of tensors (C, h, w), got {type(noise).__name__}"
        )
    if len(noises) != count or any(n.dim() != 3 for n in noises):
        shapes = [tuple(n.shape) for n in noises][:3]
        raise ValueError(f"noise must be {count} of (C, h, w), one a photo, got {len(noises)}, shaped {shapes}")
    if not all(n.is_floating_point() and n.isfinite().all() for n in noises):
        raise ValueError("noise must be finite floats of unit variance")
    return list(noises)


def _converted(x: Tensor, output_type: str):
    """(3, H, W) in [0, 1] → a PIL image, a float32 array (H, W, 3), or a float32 tensor of its own memory."""
    if output_type == "pt":
        return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if output_type == "np":
        return x.permute(1, 2, 0).float().cpu().contiguous().numpy()
    picture = ops.to_uint8(x[None], memory_format=torch.channels_last)[0]
    return PIL.Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
