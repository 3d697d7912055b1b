"""Terms of the objectives that are more than one line."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        state = torch.load(path, map_location="cpu", weights_only=True)
        modules, channels = [], 3
        for width in (
            64,
            64,
            "M",
            128,
            128,
            "M",
            256,
            256,
            256,
            256,
            "M",
            512,
            512,
            512,
            512,
            "M",
            *(512,) * 4,
        ):
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
