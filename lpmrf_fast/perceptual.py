"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) from weight files: a score in evaluation, a term in training.

Files are read with weights_only; nothing here needs torchvision or downloads anything.
"""

import importlib.util
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (index of the convolution in torchvision's `features`, stride, padding, max-pool in front, is its ReLU compared)
ALEX = [(0, 4, 2, 0, 1), (3, 1, 2, 3, 1), (6, 1, 1, 3, 1), (8, 1, 1, 0, 1), (10, 1, 1, 0, 1)]
VGG = [
    (index, 1, 1, pool, compared)
    for index, pool, compared in (
        *((0, 0, 0), (2, 0, 1), (5, 2, 0), (7, 0, 1), (10, 2, 0), (12, 0, 0), (14, 0, 1)),
        *((17, 2, 0), (19, 0, 0), (21, 0, 1), (24, 2, 0), (26, 0, 0), (28, 0, 1)),
    )
]


def read_state(path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU. Raises ValueError, one line, for a file that is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "no state dict, or a damaged one"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: not a state dict of tensors")
    return state


class LPIPS(nn.Module):
    """Distance of each pair of images, (B, 3, H, W) in [-1, 1] twice → (B,); 0 for equal ones, differentiable.

    backbone: file with torchvision's AlexNet or VGG16 (keys `features.N.weight`; which one is seen from its shapes).
    linear: file with the authors' linear weights, version 0.1 (keys `linN.model.1.weight`); None: those that
    torchmetrics ships. Raises ValueError for other files, ImportError where linear is None and torchmetrics absent.
    """

    def __init__(self, backbone, linear=None):
        super().__init__()
        state = read_state(backbone)
        kernel = state["features.0.weight"].shape[-1] if "features.0.weight" in state else 0
        self.net, self.layers = {11: ("alex", ALEX), 3: ("vgg", VGG)}.get(kernel, (None, []))
        names = [f"features.{layer[0]}.{part}" for layer in self.layers for part in ("weight", "bias")]
        if not names or any(n not in state for n in names) or any(n.startswith("features.34") for n in state):
            raise ValueError(f"{backbone}: neither AlexNet nor VGG16 in torchvision's layout (features.N.weight)")
        lines = read_state(linear or shipped_linear_weights(self.net))
        compared = [state[f"features.{layer[0]}.weight"].shape[0] for layer in self.layers if layer[-1]]
        for i, width in enumerate(compared):
            line = lines.get(f"lin{i}.model.1.weight")
            if line is None or line.shape != (1, width, 1, 1):
                raise ValueError(f"{linear}: not LPIPS's linear weights for {self.net} (lin{i}.model.1.weight)")
            self.register_buffer(f"line{i}", line.float())
        for name in names:
            self.register_buffer(name.replace(".", "_"), state[name].float())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations that are compared, each pixel scaled to length one over its channels."""
        x, found = (x - self.shift) / self.scale, []
        for index, stride, padding, pool, compared in self.layers:
            if pool:
                x = F.max_pool2d(x, pool, 2)
            weight, bias = (getattr(self, f"features_{index}_{part}") for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            if compared:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(target))
        return sum(
            F.conv2d((a - b).square(), getattr(self, f"line{i}")).mean((1, 2, 3)) for i, (a, b) in enumerate(pairs)
        )


def shipped_linear_weights(net: str) -> Path:
    """The linear weights inside torchmetrics. Raises ImportError without it."""
    found = importlib.util.find_spec("torchmetrics")
    path = Path(found.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth" if found else None
    if path is None or not path.exists():
        raise ImportError('LPIPS needs its linear weights: name the file, or pip install "lpmrf-fast[eval]"')
    return path
