"""An engine's modules over a pipeline's weights: shared, official names, and new values take effect."""

import pytest
import torch
from torch import nn

from lpmrf_fast.checkpoint import CheckpointError
from lpmrf_fast.engine.prepare import Prepared
from lpmrf_fast.pipeline import PMRFPipeline


class Folded(nn.Module):
    """A network whose forward uses a product of its weights, made by `fold`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.25))
        self.register_buffer("twice", torch.zeros(()), persistent=False)

    def fold(self):
        self.twice.copy_(2 * self.weight)

    def forward(self, x, t):
        return self.twice - x


class Same(nn.Module):
    def forward(self, y):
        return y


def test_weights_are_shared_and_modules_are_not(pipe):
    prepared = Prepared(pipe)
    assert prepared.stages is not pipe and prepared.stages.velocity is not pipe.velocity
    for name, network in pipe.modules.items():
        for a, b in zip(network.parameters(), prepared.networks[name].parameters()):
            assert a is not b and a.data_ptr() == b.data_ptr() and not b.requires_grad
    expected = {f"{name}.{key}" for name, network in pipe.modules.items() for key in network.state_dict()}
    assert set(prepared.state_dict()) == expected


def test_moving_or_casting_the_pipeline_leaves_it_as_it_is(pipe):
    prepared = Prepared(pipe)
    before = {key: t.clone() for key, t in prepared.state_dict().items()}
    pipe.to(dtype=torch.float64)
    with torch.no_grad():
        for p in pipe.velocity.parameters():
            p.zero_()
    after = prepared.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_written_anywhere_are_noticed_and_folds_made_again():
    pipe = PMRFPipeline(Same(), Folded())
    prepared = Prepared(pipe)
    assert prepared.stages.velocity.twice == 0.5 and not prepared.changed()
    with torch.no_grad():
        pipe.velocity.weight.fill_(0.5)
    assert prepared.changed() and prepared.stages.velocity.twice == 1.0 and not prepared.changed()
    address = prepared.stages.velocity.twice.data_ptr()
    prepared.load_state_dict({"velocity.weight": torch.tensor(0.125)})
    assert prepared.changed() and prepared.stages.velocity.twice == 0.25
    assert prepared.stages.velocity.twice.data_ptr() == address and pipe.velocity.weight == 0.125


def test_weights_of_another_architecture_are_one_clear_error(pipe):
    prepared = Prepared(pipe)
    state = prepared.state_dict()
    name = "vae.decoder.conv_in.weight"
    wrong = {**state, name: torch.zeros(1, 2), "velocity.extra": torch.zeros(1)}
    del wrong["posterior_mean.conv_last.bias"]
    before = state[name].clone()
    with pytest.raises(CheckpointError, match="1 missing .* 1 unexpected .* 1 of another shape") as caught:
        prepared.load_state_dict(wrong)
    assert "\n" not in str(caught.value) and torch.equal(prepared.state_dict()[name], before)


def test_networks_are_compiled_by_name(pipe, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    Prepared(pipe, ["velocity", "vae"])
    assert compiled == ["LooUFormer", "Encoder", "Decoder"]
    with pytest.raises(ValueError, match="no network is called 'vea'; there are posterior_mean, vae, velocity"):
        Prepared(pipe, ["vea"])
