"""Muon for matrices, AdamW for the rest."""

import pytest
import torch
from torch import nn

pytest.importorskip("yaml")
from lpmrf_fast.models import LooUFormer, SwinIR
from lpmrf_fast.training.config import ConfigError, TrainConfig
from lpmrf_fast.training.optimizers import build_optimizers, matrices

SWINIR = dict(img_size=8, embed_dim=16, depths=[1], num_heads=[2], window_size=4, sf=1, upsampler="")


def config(**options):
    return TrainConfig(**{"out": "unused", "model": {}, "lr": 1e-2, "weight_decay": 0.1, **options})


@pytest.fixture(params=["linear", "convolution"])
def network(request):
    torch.manual_seed(0)
    if request.param == "linear":
        return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40))
    return nn.Sequential(nn.Conv2d(24, 40, 1), nn.Conv2d(40, 8, 3)).to(memory_format=torch.channels_last)


def test_every_weight_is_trained_once(network):
    groups = [g for o in build_optimizers(network, config(optimizer="muon")).values() for g in o.param_groups]
    places = sorted(p.data_ptr() for g in groups for p in g["params"])
    assert places == sorted(p.data_ptr() for p in network.parameters())
    assert all(g["weight_decay"] == 0.1 for g in groups if any(p.dim() > 1 for p in g["params"]))
    assert all(g["weight_decay"] == 0 for g in groups if any(p.dim() <= 1 for p in g["params"]))


def test_update_is_an_orthogonal_matrix_of_adamws_size(network):
    """Without decay the step is lr · 0.2 · sqrt(max(n, m)) times a matrix whose singular values are near one."""
    weight = network[0].weight
    before = weight.detach().clone()
    optimizers = build_optimizers(network, config(optimizer="muon", weight_decay=0.0))
    weight.grad = torch.randn_like(weight)
    optimizers["muon"].step()
    step = (before - weight.detach()).flatten(1)
    singular = torch.linalg.svdvals(step / (1e-2 * 0.2 * max(step.shape) ** 0.5))
    assert 0.6 < singular.min() and singular.max() < 1.3  # five Newton-Schulz steps, in bfloat16
    alignment = (step * weight.grad.flatten(1)).sum() / (step.norm() * weight.grad.norm())
    assert alignment > 0.8  # downhill


def test_frozen_weights_and_missing_gradients_stay(network):
    network[1].requires_grad_(False)
    optimizers = build_optimizers(network, config(optimizer="muon"))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    for optimizer in optimizers.values():
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_matrices_of_the_networks():
    found = {id(w) for w in matrices(SwinIR(**SWINIR))}
    assert found
    network = SwinIR(**SWINIR)
    named = {n for n, p in network.named_parameters() if id(p) in {id(w) for w in matrices(network)}}
    assert named and all(n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) for n in named)
    flow = LooUFormer(4, 4, (1, 1), (32,), (1,), ("global",), (7,), (16,), time_embed_dim=16)
    assert all(min(w.shape[:2]) > 1 for w in matrices(flow))


def test_adamw_alone_by_default(network):
    assert list(build_optimizers(network, config())) == ["optimizer"]


def test_unknown_name_and_fsdp():
    with pytest.raises(ConfigError, match='optimizer must be one of "adamw", "muon"'):
        config(optimizer="sgd")
    with pytest.raises(ConfigError, match="whole matrices"):
        config(optimizer="muon", fsdp=True)
