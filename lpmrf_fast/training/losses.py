"""Terms of the objectives that are more than one line."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..perceptual import read_state


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the latent and averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


class PerceptualLoss(nn.Module):
    """L1 between VGG19 features before the activations named in `LAYERS`, weighted; images in [-1, 1].

    `path` is a state dict of torchvision's VGG19 (keys `features.N.weight`), read with weights_only. Layers and weights
    are those of basicsr's PerceptualLoss, which the Sim-VAE training options name.
    """

    LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}  # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4

    def __init__(self, path: str):
        super().__init__()
        state = read_state(path)
        modules, channels = [], 3
        for width in (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4):
            if width == "M":
                modules.append(nn.MaxPool2d(2))
            else:
                modules += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*modules)
        self.features.load_state_dict(
            {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")},
            strict=True,
        )
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        a, b = (((t + 1) / 2 - self.mean) / self.std for t in (x, target))
        loss = 0.0
        for i, module in enumerate(self.features):
            a, b = module(a), module(b)
            if i in self.LAYERS:
                loss = loss + self.LAYERS[i] * F.l1_loss(a, b)
        return loss


class PatchCritic(nn.Module):
    """Scores every patch of (B, 3, H, W) images in [-1, 1], high for real ones: (B, 1, H/4 - 2, W/4 - 2) or so.

    A small PatchGAN (Isola et al. 2017, arXiv 1611.07004) with spectral normalisation in place of batch norm.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(2 * width, 4 * width, 3, padding=1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(4 * width, 1, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises: scores of real images above 1, of others below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def balanced(term: Tensor, anchor: Tensor, parameter: nn.Parameter, share: float) -> Tensor:
    """`term` scaled so that its gradient on `parameter` is `share` of the anchor's (VQGAN's adaptive weight)."""
    norms = [torch.autograd.grad(t, parameter, retain_graph=True)[0].norm() for t in (anchor, term)]
    return share * (norms[0] / norms[1].clamp(min=1e-8)).clamp(max=1e4).detach() * term
