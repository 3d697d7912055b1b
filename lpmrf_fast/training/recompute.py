"""Activation checkpointing: blocks forget what they computed and compute it again when the backward pass comes by."""

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(network: nn.Module) -> list[nn.Module]:
    """The innermost modules of the network's lists: residual blocks, transformer blocks, resamplers."""
    listed = (block for blocks in network.modules() if isinstance(blocks, nn.ModuleList) for block in blocks)
    return [block for block in listed if not any(isinstance(part, nn.ModuleList) for part in block.modules())]


def recompute(network: nn.Module) -> None:
    """From now on every block keeps its inputs alone for the backward pass. Gradients stay the same to the bit.

    Random numbers (dropout) and autocast are those of the first time. Names of parameters stay; do it after copying the
    network, whose copy would else run this one's blocks.
    """
    for block in blocks(network):
        block.forward = _twice(block.forward)


def _twice(forward):
    def recomputed(*args):
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputed
