"""FSDP: parameters, gradients, optimiser state and EMA shared out among the processes (torch's fully_shard).

On disk nothing is sharded: a run may go on with another number of processes, or with one.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, device: torch.device, processes: int) -> None:
    """Every block of a list on its own, and what is left with the network."""
    network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other; activations stay channels-last
    mesh = init_device_mesh(device.type, (processes,))
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)][::-1]  # inner ones first
    for block in (block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList)):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for method in ("encode", "decode"):
        if hasattr(network, method):
            register_fsdp_forward_method(network, method)


def gathered(tree):
    """The same (nested) dicts and lists with whole tensors; every process must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    return [gathered(value) for value in tree] if isinstance(tree, list) else tree


def whole(network: nn.Module) -> nn.Module:
    """A network of ours that is not sharded: itself, or a copy; every process must call it."""
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return network
    copy = type(network)(**network.config)
    copy.load_state_dict(gathered(network.state_dict()))
    return copy.eval()


def share_out(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimiser's whole state, each tensor placed as the parameter that it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value, parameter: Tensor):
        if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    states = {i: {k: placed(v, parameters[i]) for k, v in s.items()} for i, s in state["state"].items()}
    return {**state, "state": states}
