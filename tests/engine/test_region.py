"""The captured region: nothing in it that a CUDA graph cannot hold (on fake CUDA tensors), and rows stay apart."""

import pytest
import torch
from engine_stand_ins import Impure, Pure, fake
from torch import nn

from lpmrf_fast import models
from lpmrf_fast.engine.plan import Plan
from lpmrf_fast.engine.prepare import replica
from lpmrf_fast.engine.region import MAX_STEPS, Buffers, Region
from lpmrf_fast.pipeline import LatentPMRFPipeline, Pipeline, PMRFPipeline

HDIT = dict(
    in_channels=3,
    out_channels=3,
    widths=[64, 128],
    depths=[2, 2],
    patch_size=[4, 4],
    self_attns=[{"type": "neighborhood", "d_head": 64, "kernel_size": 7}, {"type": "global", "d_head": 64}],
    mapping_depth=1,
    mapping_width=64,
    dropout_rate=[0, 0],
    mapping_dropout_rate=0.0,
)


def full_size():
    """The published sizes, without weights."""
    networks = []
    for name in ("swinir-l", "sim-vae-c32", "loouformer"):
        cls, config = models.PRESETS[name]
        with torch.device("meta"):
            networks.append(cls(**config).bfloat16())
    return LatentPMRFPipeline(*networks)


def pixels():
    swinir = dict(img_size=8, embed_dim=24, depths=[2], num_heads=[3], window_size=8, sf=8)
    mean = models.SwinIR(**swinir, upsampler="nearest+conv", unshuffle=True, unshuffle_scale=8)
    return PMRFPipeline(mean.bfloat16(), models.HDiT(**HDIT).bfloat16())


def captured_purely(pipeline, steps: int | None, size: int = 512, batch: int = 2) -> int:
    """Run the region on fake CUDA tensors under Pure; the number of operations in all."""
    plan = Plan(batch, size, size, steps, "cuda", ())
    with torch.no_grad(), fake():
        stages = replica(pipeline, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        buffers = Buffers(plan, torch.device("cuda"), stages.state_dtype)
        segments = Region(stages).segments(plan, buffers)
        with Pure() as pure:
            for segment in segments:
                segment.run()
        assert all(t.device.type == "cuda" for t in (buffers.images, buffers.means, buffers.finite))
    return pure.count


@pytest.mark.parametrize(
    "load, steps, size",
    [
        (lambda: Pipeline.from_pretrained(dtype="bf16", device="cpu"), 2, 512),
        (full_size, None, 512),
        (pixels, 2, 128),
        (pixels, None, 128),
    ],
    ids=["bundled", "full size, one step", "pixels", "pixels, one step"],
)
def test_nothing_in_it_syncs_copies_or_depends_on_data(load, steps, size):
    assert captured_purely(load(), steps, size) > 100


@pytest.mark.parametrize(
    "trouble, message",
    [
        (lambda y: y * torch.tensor([2.0], device=y.device), "copy between host and device"),
        (lambda y: y.clamp(max=y.max().item()), "reads a value back"),
        (lambda y: y + y[y > 0.5].mean(), "depends on data"),
        (lambda y: y.cpu().to("cuda"), "copy between host and device"),
    ],
    ids=["constant", "item", "mask", "copy"],
)
def test_the_test_sees_what_a_capture_would_not_take(trouble, message):
    class Troubled(nn.Module):
        def forward(self, y):
            return trouble(y)

    class Velocity(nn.Module):
        def forward(self, x, t):
            return x

    with pytest.raises(Impure, match=message):
        captured_purely(PMRFPipeline(Troubled(), Velocity()), 1, size=8)


def run(pipe, plan, photos, seeds, steps=2):
    buffers = Buffers(plan, torch.device("cpu"), pipe.state_dtype)
    buffers.set_grid(steps, pipe.eps)
    buffers.pixels[: len(photos)] = torch.stack(photos)
    buffers.seeds[: len(seeds)] = torch.tensor(seeds)
    with torch.no_grad():
        for segment in Region(pipe).segments(plan, buffers):
            for _ in range(steps if segment.repeats else 1):
                segment.run()
    return buffers


def test_it_is_the_pipelines_restoration(pipe, photos, levels):
    pipe.to(dtype=torch.float64)
    images = photos((64, 64), (64, 64))
    expected = pipe(torch.stack(images), 2, seed=[5, 6], output_type="pt")
    for steps in (2, None):
        buffers = run(pipe, Plan(2, 64, 64, steps, "cpu", ()), images, [5, 6])
        assert buffers.finite.all()
        for ours, theirs in ((buffers.images, expected.images), (buffers.means, expected.posterior_means)):
            assert torch.equal(ours, (theirs * 255).round().to(torch.uint8))


def test_padding_rows_do_not_touch_their_neighbours(pipe, photos):
    """Whatever stands in the other rows, seeds included: not a bit of a photo changes, even beside NaN."""
    (photo,) = photos((64, 64))
    plan = Plan(4, 64, 64, 2, "cpu", ())
    alone = run(pipe, plan, [photo], [3])
    others = photos((64, 64), (64, 64), (64, 64), seed=1)
    beside = run(pipe, plan, [photo, *others], [3, 4, 5, -1])
    assert torch.equal(alone.images[0], beside.images[0]) and torch.equal(alone.means[0], beside.means[0])

    class Poisoned(nn.Module):
        multiple = pipe.posterior_mean.multiple

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, y):
            bright = y.flatten(1).amin(1) > 0.99
            return torch.where(bright[:, None, None, None], torch.nan, self.network(y))

    poisoned = LatentPMRFPipeline(Poisoned(pipe.posterior_mean), pipe.vae, pipe.velocity, noise_std=pipe.noise_std)
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    beside = run(poisoned, plan, [photo, white, white, white], [3, 4, 5, 6])
    assert beside.finite.tolist() == [True, False, False, False]
    assert torch.equal(alone.images[0], beside.images[0])


def test_steps_of_the_table_are_limited(pipe):
    buffers = Buffers(Plan(1, 64, 64, None, "cpu", ()), torch.device("cpu"), torch.float32)
    buffers.set_grid(MAX_STEPS, 0.0)
    assert buffers.times[-1] == pytest.approx(1 - 1 / MAX_STEPS)
    with pytest.raises(ValueError, match="at most 256 steps, got 257"):
        buffers.set_grid(MAX_STEPS + 1, 0.0)
