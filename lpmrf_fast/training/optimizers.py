"""AdamW for all weights, or Muon for those that are matrices and AdamW for the rest."""

import torch
from torch import nn

from .config import TrainConfig


def matrices(network: nn.Module) -> list[nn.Parameter]:
    """Trained weights of linear layers and of 1x1 convolutions, (n, m) or (n, m, 1, 1)."""

    def is_matrix(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return module.kernel_size == (1, 1) and module.groups == 1
        return isinstance(module, nn.Linear)

    return [m.weight for m in network.modules() if is_matrix(m) and m.weight.requires_grad]


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv 2502.16982's scale: AdamW's learning rates do), for 1x1 convolutions too."""

    def __init__(self, weights: list[nn.Parameter], **options):
        # It takes nothing but (n, m): the views share the weights' memory.
        super().__init__([w.detach().view(w.shape[:2]) for w in weights], adjust_lr_fn="match_rms_adamw", **options)
        self.weights = weights

    def step(self, closure=None):
        for view, weight in zip(self.param_groups[0]["params"], self.weights):
            view.grad = None if weight.grad is None else weight.grad.view(view.shape)
        return super().step(closure)


def build_optimizers(network: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """What trains `network`, by the name of its state in a checkpoint.

    Weight decay is for weights of two or more axes, not for biases, norms and scales.
    """
    chosen = matrices(network) if config.optimizer == "muon" else []
    taken = {id(p) for p in chosen}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in taken]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() > 1]},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=tuple(config.betas),
        weight_decay=config.weight_decay,
    )
    if not chosen:
        return {"optimizer": adamw}
    return {"optimizer": adamw, "muon": Muon(chosen, lr=config.lr, weight_decay=config.weight_decay)}
