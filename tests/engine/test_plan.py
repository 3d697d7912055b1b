"""A plan says all that a captured graph depends on, refuses what cannot be, and is predicted before it runs."""

import dataclasses

import pytest
import torch

from lpmrf_fast.engine import Plan, estimate
from lpmrf_fast.engine.plan import bucket, buckets

PLAN = Plan(4, 512, 512, 25, "cuda:0", (("velocity", "bfloat16"),), "graph", backends=(("euler_step", "triton"),))


def test_it_is_a_key_and_can_be_read():
    assert PLAN == dataclasses.replace(PLAN) and hash(PLAN) == hash(dataclasses.replace(PLAN))
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.batch = 3
    text = "4 x 512x512, 25 steps, bfloat16, channels_last, cuda:0, graph\n  triton: euler_step"
    assert str(PLAN) == text
    changes = dict(batch=8, height=256, width=256, steps=None, device="cuda:1", dtypes=(), mode="step", backends=())
    assert all(dataclasses.replace(PLAN, **{name: value}) != PLAN for name, value in changes.items())
    assert "any number of steps" in str(dataclasses.replace(PLAN, steps=None))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(batch=0), ValueError, "batch must be at least 1, got 0"),
        (dict(height=-8), ValueError, "height must be at least 1"),
        (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
        (dict(steps=-3), ValueError, "steps must be at least 1, got -3"),
        (dict(steps=1.5), TypeError, "steps must be an int"),
        (dict(mode="fast"), ValueError, "mode must be one of graph, step, eager, got 'fast'"),
    ],
)
def test_what_cannot_be(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(PLAN, **change)


def test_batches_are_padded_to_powers_of_two_and_the_limit():
    assert buckets(1) == [1] and buckets(6) == [1, 2, 4, 6] and buckets(8) == [1, 2, 4, 8]
    assert [bucket(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def counted(pipe, batch=1, size=128, steps=25, device="cuda"):
    return estimate(pipe, Plan(batch, size, size, steps, device, ()))


def test_an_estimate_grows_with_what_it_should(pipe):
    one, four, step = counted(pipe), counted(pipe, batch=4), counted(pipe, steps=1)
    for name, cost in one.stages.items():
        more = four.stages[name]
        assert more.flops == pytest.approx(4 * cost.flops, rel=0.05, abs=1e6)  # what belongs to no photo is little
    assert four.peak == pytest.approx(4 * one.peak, rel=0.3)
    assert one.stages["velocity, 25 steps"].flops == 25 * step.stages["velocity"].flops
    assert one.stages["decode"].flops == step.stages["decode"].flops
    assert one.weights == sum(t.nbytes for m in pipe.modules.values() for t in (*m.parameters(), *m.buffers()))
    text = str(one)
    assert "velocity, 25 steps" in text and "GFLOP" in text and "of weights and about" in text


def test_a_convolution_costs_what_it_costs(pipe):
    """The counted decoder against the convolutions of a real run."""
    decode = counted(pipe, steps=1, size=64).stages["decode"]
    flops = 0

    def add(module, args, out):
        nonlocal flops
        flops += 2 * out.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in pipe.vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        side = 64 // pipe.vae.multiple
        pipe.decode(torch.zeros(1, pipe.vae.config["latent_channels"], side, side))
    for hook in hooks:
        hook.remove()
    assert decode.flops == pytest.approx(flops, rel=0.6)  # an upsampling convolution may do with 4/9
    assert decode.flops <= flops * 1.01


def test_memory_is_what_lives_at_once(pipe):
    """Of the decoder: at least input and output of a convolution at full size, at most all that it ever makes."""
    decode = counted(pipe, steps=1).stages["decode"]
    channel = 128 * 128 * 4
    widest = max(m.weight.shape[0] for m in pipe.vae.decoder.up_blocks[-1].modules() if hasattr(m, "out_channels"))
    assert 2 * widest * channel <= decode.peak < decode.moved / 4
