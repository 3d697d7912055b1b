"""The three stages of Latent-PMRF: what is trained, on which batches, towards which objective, and how it is judged.

Images come in as uint8 (B, 3, H, W). Sim-VAE and the flow see them in [-1, 1], SwinIR in [0, 1].
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpmrf_kernels import from_uint8

from .. import flow, models
from ..checkpoint import load_model
from ..models import AutoencoderKL, HDiT, LooUFormer, SimVAE, SwinIR
from ..perceptual import LPIPS
from .cache import LatentCache
from .config import ConfigError, TrainConfig
from .data import Faces, at_once, degraded_crops, find_images
from .losses import PatchCritic, PerceptualLoss, balanced, hinge_loss, kl_divergence

CLASSES = {name: getattr(models, name) for name in models.__all__ if isinstance(getattr(models, name), type)}
VALIDATION_SEED = 7


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the PSNR in dB; (B, 3, H, W) in [0, 1]."""
    mse = (a.clamp(0, 1) - b).square().flatten(1).mean(1)
    return float((-10 * mse.clamp(min=1e-10).log10()).mean())


def unit(x: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1], channels-last."""
    return from_uint8(x, memory_format=torch.channels_last)


class Draws:
    """Random numbers for samples `part` of a batch of `batch`: each has its own, however the batch is shared out.

    They follow from (seed, number of the sample) and the kind of device, on which they are drawn.
    """

    def __init__(self, seed: tuple[int, ...], part: range, batch: int, device="cpu"):
        # Mixed, because torch's generator on CPUs looks at the lower half of a seed alone.
        seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(batch + 1, np.uint64)]
        self.part, self.batch, self.device = slice(part.start, part.stop), batch, torch.device(device)
        self.common, *self.each = (torch.Generator(device).manual_seed(s) for s in [*seeds[-1:], *seeds[self.part]])

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of a tensor's shape, (samples, ...)."""
        return torch.stack([torch.randn(like.shape[1:], generator=g, device=self.device) for g in self.each]).to(like)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (samples, *shape)."""
        return torch.rand(self.batch, *shape, generator=self.common, device=self.device)[self.part]

    def times(self, mode: str) -> Tensor:
        """(samples,) times to train at: see `flow.sample_times`."""
        return flow.sample_times(self.batch, mode, self.common)[self.part]


class Stage:
    """What the trainer asks of a stage. `model` is the trained network; frozen ones live beside it."""

    critic: nn.Module | None = None
    """A second network that judges the first while both train; `critic_loss` is its objective."""
    trains: tuple[type, ...]
    """What the network may be; the first is meant where the settings name none."""
    degrades = True
    """Whether batches are (clean, degraded) pairs or clean images alone."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.model = self._model().to(device, memory_format=torch.channels_last)

    def _model(self) -> nn.Module:
        model = load_model(self.config.init).float() if self.config.init else self._new_model()
        self._check("init" if self.config.init else "model", model, self.trains)
        return model

    @staticmethod
    def _check(key: str, network: nn.Module, classes: tuple) -> None:
        if not isinstance(network, classes):
            names = " or ".join(c.__name__ for c in classes)
            raise ConfigError(f"{key}: expected a network of the class {names}, got {type(network).__name__}")

    def _new_model(self) -> nn.Module:
        options = dict(self.config.model)
        preset, cls = options.pop("preset", None), options.pop("class", self.trains[0].__name__)
        if cls not in CLASSES:
            raise ConfigError(f"model.class must be one of {', '.join(CLASSES)}, got {cls!r}")
        try:
            return models.build(preset, **options) if preset else CLASSES[cls](**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from None

    def compile(self) -> None:
        """Let torch compile what the loss calls; names of parameters stay."""
        self.model.compile()

    def dataset(self, samples: int):
        c = self.config
        return Faces(
            find_images(c.train),
            c.size,
            samples,
            c.seed,
            c.ranges if self.degrades else None,
            c.crop,
            c.flip,
            jitter=c.jitter,
            applied=c.degrade_on == "cpu",
            unusable=self.left_out,
        )

    @property
    def left_out(self) -> Path:
        """Where images that cannot be used are listed."""
        return Path(self.config.out) / "left-out.txt"

    def prepare(self, batch):
        """A batch of the loader, on the device → what `loss` takes."""
        drawn = isinstance(batch, list) and isinstance(batch[1], list)
        return degraded_crops(*batch) if drawn else batch

    def validation(self) -> tuple[Tensor, Tensor] | None:
        """(clean, degraded) uint8 of the first validation faces, degraded alike in every run; None without a folder."""
        c = self.config
        if c.val is None:
            return None
        paths = find_images(c.val)[: c.val_images]
        faces = Faces(paths, c.size, len(paths), VALIDATION_SEED, c.ranges, shuffle=False, unusable=self.left_out)
        return tuple(torch.stack(column) for column in zip(*(faces[i] for i in range(len(faces)))))

    def loss(self, batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of one batch and its named terms."""
        raise NotImplementedError

    def critic_loss(self) -> Tensor:
        """The critic's objective on the batch that `loss` saw last."""
        raise NotImplementedError

    def judge(self, model: nn.Module, clean: Tensor, degraded: Tensor) -> tuple[dict, list[Tensor]]:
        """Scores on validation faces, and rows of pictures in [0, 1] to look at."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> None:
        """What is left to do with the trained weights after the last step."""


class VAEStage(Stage):
    """L1 + kl_weight · KL + perceptual_weight · VGG19 distance (Sim-VAE's objective); on wish LPIPS, a patch critic."""

    trains, degrades = (SimVAE, AutoencoderKL), False

    def __init__(self, config, device):
        super().__init__(config, device)
        self.perceptual = PerceptualLoss(config.vgg_weights).to(device) if config.vgg_weights else None
        self.lpips = LPIPS(config.lpips_weights).to(device) if config.lpips_weight else None
        self.critic = PatchCritic().to(device) if config.adversarial_weight else None
        if config.frozen_encoder:
            self.model.encoder.requires_grad_(False)

    def loss(self, batch, draws):
        c = self.config
        x = self._recoloured(unit(batch), draws) * 2 - 1
        mean, logvar = self.model.encode(x).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + draws.normal(mean) * (logvar / 2).exp()
        if c.latent_noise:
            share = c.latent_noise * draws.uniform(1, 1, 1).to(z)
            z = z + share * mean.detach().std() * draws.normal(z)
        y = self.model.decode(z).float()
        terms = {"l1": F.l1_loss(y, x), "kl": kl_divergence(mean, logvar)}
        total = terms["l1"] + c.kl_weight * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(y, x)
            total = total + c.perceptual_weight * terms["perceptual"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(y, x).mean()
            total = total + c.lpips_weight * terms["lpips"]
        if self.critic is not None:
            self.critic.requires_grad_(False)
            terms["adversarial"] = -self.critic(y).mean()
            self.critic.requires_grad_(True)
            last = self.model.decoder.conv_out.weight
            total = total + balanced(terms["adversarial"], terms["l1"], last, c.adversarial_weight)
            self.seen = x, y.detach()
        return total, terms

    def compile(self):
        self.model.encoder.compile()
        self.model.decoder.compile()

    def critic_loss(self):
        real, fake = self.critic(torch.cat(self.seen)).float().chunk(2)
        return hinge_loss(real, fake)

    def _recoloured(self, x: Tensor, draws: Draws) -> Tensor:
        """Some images with their colour channels in another order: portraits have few greens, and a VAE that has not
        seen a colour turns it into another."""
        if not self.config.recolour:
            return x
        drawn = draws.uniform(4).to(x)
        kept = torch.arange(3, device=x.device).expand(len(x), 3)
        order = torch.where(drawn[:, :1] < self.config.recolour, drawn[:, 1:].argsort(1), kept)
        order = order[:, :, None, None].expand(x.shape)
        return x.gather(1, order).contiguous(memory_format=torch.channels_last)

    def judge(self, model, clean, degraded):
        x = unit(clean)
        z = model.encode(x * 2 - 1).float().chunk(2, dim=1)[0]
        y = model.decode(z).float() / 2 + 0.5
        return {"psnr": psnr(y, x), "latent_mean": float(z.mean()), "latent_std": float(z.std())}, [x, y]

    @torch.no_grad()
    def finish(self, model):
        """Record shift and scale of the latents, measured on training faces: the flow sees mean 0 and deviation 1."""
        if self.config.frozen_encoder:
            return
        paths = find_images(self.config.train)[:64]
        faces = Faces(paths, self.config.size, len(paths), self.config.seed, shuffle=False, unusable=self.left_out)
        means = [model.encode(unit(faces[i][None]).to(self.device) * 2 - 1).float() for i in range(len(faces))]
        z = torch.cat(means).chunk(2, dim=1)[0]
        model.config.update(shift_factor=round(float(z.mean()), 6), scaling_factor=round(float(1 / z.std()), 6))


class PosteriorMeanStage(Stage):
    """Squared error in pixels: its minimiser is the posterior mean.

    `objective: psnr` minimises the logarithm of each face's mean squared error (HINet's PSNR loss, arXiv 2105.06086),
    so that hopeless faces do not drown those with little error. In so many dimensions the error of a face varies
    little around what its degradation allows: the minimiser stays close to the posterior mean.
    """

    trains = (SwinIR, LooUFormer, HDiT)

    def _model(self):
        model = super()._model()
        if self.config.identity_init and not self.config.init:
            start_from_identity(model)
        return model

    def loss(self, batch, draws):
        clean, degraded = batch
        mse = (self.model(unit(degraded)).float() - unit(clean)).square().flatten(1).mean(1)
        loss = mse.mean() if self.config.objective == "mse" else (mse + 1e-6).log().mean()
        return loss, {"mse": mse.mean(), "psnr": -10 * mse.log10().mean()}

    def judge(self, model, clean, degraded):
        x, y = unit(clean), unit(degraded)
        mean = torch.cat([model(part).float() for part in y.split(4)])
        scores = {"psnr": psnr(mean, x), "psnr_degraded": psnr(y, x)}
        return scores | {"gain": scores["psnr"] - scores["psnr_degraded"]}, [y, mean, x]


class FlowStage(Stage):
    """Velocity matching between a source and E(clean), in the VAE's latents, or without one in [0, 1] pixels (PMRF).

    The source is E(posterior mean) + noise_std · ε; or E(degraded) + noise_std · ε, the naive flow; or ε alone, while
    the network sees E(posterior mean) or E(degraded) as further channels. `start` is E(...) in all. A cache, where
    asked for, holds start and target of `cache` degradations of every face and of its mirror image.
    """

    trains = (LooUFormer, HDiT)

    def __init__(self, config, device):
        super().__init__(config, device)
        self.starts_from = config.condition or config.source
        self.posterior_mean = None
        if self.starts_from == "posterior-mean":
            if config.posterior_mean is None:
                raise ConfigError("flow: posterior_mean must name the checkpoint of the posterior-mean network")
            self.posterior_mean = self._frozen("posterior_mean", PosteriorMeanStage.trains)
        self.vae = self._frozen("vae", VAEStage.trains) if config.vae else None
        if config.crop is not None:
            raise ConfigError("flow: crop must be left out, faces are trained whole")
        self.shift, self.scale = 0.0, 1.0
        if self.vae is not None:
            self.shift = self.vae.config.get("shift_factor") or 0.0
            self.scale = self.vae.config.get("scaling_factor") or 1.0

    def _frozen(self, key: str, classes: tuple) -> nn.Module:
        model = load_model(getattr(self.config, key)).float().eval().requires_grad_(False)
        self._check(key, model, classes)
        return model.to(self.device, memory_format=torch.channels_last)

    def dataset(self, samples):
        if not self.config.cache:
            return super().dataset(samples)
        faces, folder = find_images(self.config.train), Path(self.config.latents or f"{self.config.out}/latents")
        return LatentCache(folder, faces, self.config, self.ends, self.device).dataset(samples)

    def encode(self, x: Tensor) -> Tensor:
        """[0, 1] pixels → the space of the flow: scaled latents, or the pixels themselves."""
        if self.vae is None:
            return x
        return (self.vae.encode(x * 2 - 1).float().chunk(2, dim=1)[0] - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        return z if self.vae is None else self.vae.decode(z / self.scale + self.shift).float() / 2 + 0.5

    def first_guess(self, y: Tensor) -> Tensor:
        """Degraded [0, 1] pixels → those that the flow starts from or is told about."""
        return y if self.posterior_mean is None else self.posterior_mean(y).float().clamp(0, 1)

    @torch.no_grad()
    def ends(self, clean: Tensor, degraded: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pairs → (noise-free start, target) of the flow."""
        return self.encode(self.first_guess(unit(degraded))), self.encode(unit(clean))

    def source(self, start: Tensor, draws: Draws) -> Tensor:
        noise = draws.normal(start)
        return noise if self.config.source == "noise" else start + self.config.noise_std * noise

    def velocity(self, model, start: Tensor):
        """v(z, t) of a network that sees `start` as well, where it is a condition."""

        def seen(z):
            z = torch.cat([z, start], 1) if self.config.condition else z
            return z.contiguous(memory_format=torch.channels_last)

        return lambda z, t: flow.velocity(model, seen(z), t).float()

    def loss(self, batch, draws):
        start, target = (b.to(self.device).float() for b in batch) if self.config.cache else self.ends(*batch)
        source, t = self.source(start, draws), draws.times(self.config.time_sampling).to(start)
        z = flow.interpolant(source, target, t)
        loss = F.mse_loss(self.velocity(self.model, start)(z, t), flow.velocity_target(source, target))
        return loss, {"velocity": loss}

    def judge(self, model, clean, degraded):
        x, y = unit(clean), unit(degraded)
        rows, at = [], 0
        for part in y.split(at_once(self.config.size)):
            draws = Draws((VALIDATION_SEED,), range(at, at := at + len(part)), len(y))
            guess = self.first_guess(part)
            start = self.encode(guess)
            restored = flow.sample(self.velocity(model, start), self.source(start, draws), 25)
            rows.append((guess, self.decode(restored)))
        guess, restored = (torch.cat(column) for column in zip(*rows))
        scores = {"psnr": psnr(restored, x), "psnr_degraded": psnr(y, x)}
        if self.posterior_mean is None:
            return scores, [y, restored, x]
        return scores | {"psnr_mean": psnr(guess, x)}, [y, guess, restored, x]


STAGES = {"vae": VAEStage, "posterior-mean": PosteriorMeanStage, "flow": FlowStage}


def start_from_identity(model: SwinIR) -> None:
    """Make an untrained SwinIR with unshuffle and `pixelshuffledirect` copy the low frequencies of its input.

    Both outer convolutions start as a truncated DCT of each unshuffled patch and its transpose, the body as zero, so
    that training starts at the input's own error and not at that of a random picture.
    Raises ConfigError for another form of SwinIR.
    """
    if not isinstance(model, SwinIR) or model.upsampler != "pixelshuffledirect" or model.unshuffle_scale == 1:
        raise ConfigError('identity_init needs a SwinIR with unshuffle and upsampler "pixelshuffledirect"')
    n, first, last = model.unshuffle_scale, model.conv_first[1], model.upsample[0]
    basis, spread = dct_basis(n, first.out_channels)
    with torch.no_grad():
        for conv, matrix in ((first, basis / spread[:, None]), (last, basis.T * spread)):
            conv.weight.zero_()
            conv.weight[:, :, 1, 1] = matrix
            conv.bias.zero_()
        for parameter in model.conv_after_body.parameters():
            parameter.zero_()


def dct_basis(n: int, size: int) -> tuple[Tensor, Tensor]:
    """The `size` lowest functions of an orthonormal luminance-chrominance DCT of n x n x 3 patches: (size, 3 · n²).

    Luminance keeps twice as many as each chrominance; more than 3 · n² functions: the rest is zero. With them comes the
    spread (size,) that their coefficients have in photographs of range [0, 1], roughly: amplitudes fall with frequency.
    Dividing by it shows the body all of them alike; its layer norm would else see little but the mean of a patch.
    """
    k, i = torch.arange(n)[:, None], torch.arange(n)
    dct = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    dct[0] /= math.sqrt(2)
    order = sorted(((u, v) for u in range(n) for v in range(n)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    colour = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    colour = colour / colour.norm(dim=1, keepdim=True)
    basis, spread = torch.zeros(size, 3 * n * n), torch.ones(size)
    ranked = sorted((2 * j if c else j, c, f) for c in range(3) for j, f in enumerate(order))
    for row, (_, c, (u, v)) in enumerate(ranked[:size]):
        basis[row] = torch.outer(colour[c], torch.outer(dct[u], dct[v]).flatten()).flatten()
        amplitude = (0.3 if c else 1.0) * (0.5 / math.hypot(u, v) ** 1.3 if u or v else n / 4)
        spread[row] = math.hypot(amplitude, 0.04)  # not below the noise
    return basis, spread
