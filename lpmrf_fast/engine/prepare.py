"""An engine's own copy of a pipeline: the same weights, modules of its own.

Parameters are shared with the pipeline, not copied, and keep their official names. What follows from them (folded
weights: a module's `folded`) is made here, and made again in place when they change.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import checkpoint


def replica(pipeline, convert: Callable[[Tensor], Tensor]):
    """The pipeline with networks of its own whose parameters and buffers are `convert(tensor)`."""
    memo = {}
    for network in pipeline.modules.values():
        for tensor in (*network.parameters(), *network.buffers()):
            new = convert(tensor)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    twin = copy.copy(pipeline)
    for name, network in pipeline.modules.items():
        setattr(twin, name, copy.deepcopy(network, memo).eval())
    return twin


class Prepared:
    """`stages`: the replica. `networks`: its networks by name, with the official names of their parameters.

    compiled: networks to put through torch.compile, with its options.
    """

    def __init__(self, pipeline, compiled: Mapping[str, dict]):
        self.stages = replica(pipeline, Tensor.detach)
        self.networks = nn.ModuleDict(self.stages.modules)
        unknown = sorted(set(compiled) - set(self.networks))
        if unknown:
            raise ValueError(f"compile: no network is called {unknown[0]!r}; there are {', '.join(self.networks)}")
        for name, options in compiled.items():
            network = self.networks[name]
            # An autoencoder is called by encode and decode: its parts are what is called as modules.
            for module in network.children() if hasattr(network, "encode") else (network,):
                module.compile(**options)
        tensors = dict((*self.networks.named_parameters(), *self.networks.named_buffers()))
        self._tensors = [tensors[name] for name in self.networks.state_dict()]
        self._loads = 0
        self._fold()
        self.version = self._count()

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under their official names, `velocity.` and so on in front."""
        return self.networks.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights of the same names and shapes in place, so that captured graphs use them too.

        Raises CheckpointError, a ValueError, for those of another architecture.
        """
        checkpoint.load_tensors(self.networks, tensors)
        self._loads += 1

    def changed(self) -> bool:
        """Whether a weight was written in place since the last call; what follows from them is then new.

        By anyone; into weights that were made in inference mode, which PyTorch does not watch, by `load_state_dict`.
        """
        version = self._count()
        if version == self.version:
            return False
        self._fold()
        self.version = version
        return True

    def _count(self) -> int:
        return self._loads + sum(0 if t.is_inference() else t._version for t in self._tensors)

    def _fold(self) -> None:
        with torch.no_grad():
            for module in self.networks.modules():
                if hasattr(module, "folded"):
                    module.folded()
