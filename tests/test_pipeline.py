"""The pipelines: the golden chain stage by stage, images in every form, padding, seeds, failures, arguments."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lpmrf_kernels
from lpmrf_fast import flow, models
from lpmrf_fast import pipeline as module
from lpmrf_fast.models.layers import AxialRoPE
from lpmrf_fast.pipeline import (
    LatentPMRFPipeline,
    NonFiniteError,
    PMRFPipeline,
    default_device,
    default_dtype,
)


def photos(*sizes, seed=0):
    """Float photos (3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, h, w, generator=generator) for h, w in sizes]


class Same(nn.Module):
    """A posterior mean that is its input; keeps the shapes that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x


class Towards(nn.Module):
    """A PMRF velocity that leads to a constant image in any number of steps."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, t):
        return (self.value - x) / (1 - t).view(-1, 1, 1, 1)


def seen_by(monkeypatch, pipe, name):
    """Records the arguments of a network of the pipeline."""
    calls, forward = [], getattr(pipe, name).forward
    monkeypatch.setattr(
        getattr(pipe, name), "forward", lambda *args, **known: calls.append(args) or forward(*args, **known)
    )
    return calls


# ---- the golden chains


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_latent_chain(golden, pipe, dtype):
    """Every stored intermediate. The file's images are in [-1, 1], its time is sigma = 1 - t, its v source - clean."""
    fixture = golden("latent_pmrf_pipeline")
    close, out = fixture.assert_close, fixture.outputs
    y, noise = (fixture.inputs[k].to(dtype) for k in ("y", "noise"))
    y = (y + 1) / 2
    pipe.to(dtype=dtype)
    K = fixture.config["sampling"]["num_inference_steps"]

    with torch.no_grad():
        close(pipe.posterior_mean(y), "posterior_mean_raw")
        mean = pipe.predict_mean(y)
        close(mean * 2 - 1, "x_posterior_mean")
        latent = pipe.encode(mean)
        close(latent, "z_mode")
        close(latent, "z_posterior_mean")  # no shift, no scale in this file
        source = pipe.add_noise(latent, noise=noise)
        close(source, "z_source")
        close(pipe.velocity_at(source, 0.0), "v_step1", scale=-1.0)
        states = []
        end = pipe.sample(source, K, lambda k, t, z: states.append((k, t, z)))
        for k, t, z in states:
            close(z, f"z_step{k + 1}")
            assert t == pytest.approx(1 - out["scheduler_sigmas"][k + 1].item(), abs=1e-6)
        assert [k for k, *_ in states] == list(range(K))
        close(pipe.decode(end) * 2 - 1, "image_raw")

    states.clear()
    result = pipe(y, K, noise=noise, output_type="pt", callback_on_step_end=lambda k, t, z: states.append((k, t, z)))
    for k, _, z in states:
        assert z.dtype == dtype
        close(z, f"z_step{k + 1}")
    close(result.images, "image")
    close(result.posterior_means.double() * 2 - 1, "x_posterior_mean")


def pixel_pipe(fixture):
    networks = fixture.network(models.SwinIR, "mmse_model"), fixture.network(models.HDiT, "model")
    sampling = fixture.config["sampling"]
    return PMRFPipeline(*networks, noise_std=sampling["mmse_noise_std"], eps=sampling["eps"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_pixel_chain(golden, dtype, monkeypatch):
    """Every stored intermediate of PMRF: images in [0, 1], time runs up, v = clean - source."""
    fixture = golden("pmrf_pipeline")
    close, out = fixture.assert_close, fixture.outputs
    y, noise = (fixture.inputs[k].to(dtype) for k in ("y", "noise"))
    pipe = pixel_pipe(fixture).to(dtype=dtype)
    K = fixture.config["sampling"]["num_flow_steps"]

    with torch.no_grad():
        close(pipe.posterior_mean(y), "posterior_mean_raw")
        mean = pipe.predict_mean(y)
        close(mean, "x_posterior_mean")
        close(pipe.add_noise(pipe.encode(mean), noise=noise), "x_source")
    asked, states = [], []
    prepare = pipe.velocity.prepare
    monkeypatch.setattr(pipe.velocity, "prepare", lambda times, *size: asked.append(times) or prepare(times, *size))
    result = pipe(y, K, noise=noise, output_type="pt", callback_on_step_end=lambda k, t, z: states.append((k, t, z)))
    assert torch.cat(asked).tolist() == pytest.approx(out["t"].tolist(), abs=1e-7)
    assert [(k, t) for k, t, _ in states] == [(k, pytest.approx((k + 1) / K)) for k in range(K)]
    for k, _, z in states:
        assert z.dtype == dtype
        close(z, f"x_step{k + 1}")
    close(result.images, "image")
    close(result.posterior_means, "x_posterior_mean")


def test_a_velocity_network_says_which_way_its_time_runs(golden, pipe):
    """LooUFormer's and HDiT's conventions hold in either pipeline; one that names none has the pipeline's."""
    fixture = golden("pmrf_pipeline")
    hdit, mean = fixture.network(models.HDiT, "model"), fixture.network(models.SwinIR, "mmse_model")
    x, z = torch.stack(photos((32, 32))), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z3 = z[:, :3]
    untimed = models.LooUFormer(**{**pipe.velocity.config, "time_embed_dim": None})
    with torch.no_grad():
        assert torch.equal(LatentPMRFPipeline(mean, pipe.vae, hdit).velocity_at(x, 0.25), hdit(x, torch.tensor([0.25])))
        pixels = PMRFPipeline(mean, pipe.velocity).velocity_at(z, 0.25)
        assert torch.equal(pixels, -pipe.velocity(z, torch.tensor([0.75])))
        assert torch.equal(PMRFPipeline(mean, untimed).velocity_at(z, 0.25), -untimed(z))
        towards = Towards(0.5)
        expected = (0.5 - z3) / 0.75
        torch.testing.assert_close(PMRFPipeline(mean, towards).velocity_at(z3, 0.25), expected)
        torch.testing.assert_close(LatentPMRFPipeline(mean, pipe.vae, towards).velocity_at(z3, 0.75), -expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("down", [False, True])
def test_steps_are_fused_where_the_network_can(golden, dtype, down, monkeypatch):
    """PMRF's chain with the step inside the network, and with the two apart; either direction of time."""
    pipe = pixel_pipe(golden("pmrf_pipeline")).to(dtype=dtype)
    z = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    z = z.to(torch.promote_types(dtype, torch.float32))
    monkeypatch.setattr(models.HDiT, "time_runs_down", down)
    steps = []
    pipe.velocity.register_forward_pre_hook(lambda _, args, kwargs: steps.append(kwargs["euler"][1]), with_kwargs=True)
    with torch.no_grad():
        fused = pipe.sample(z, 3)
        assert steps == [pytest.approx(-1 / 3 if down else 1 / 3)] * 3
        monkeypatch.setattr(models.HDiT, "fuses_euler", False)
        pipe.velocity._forward_pre_hooks.clear()
        apart = pipe.sample(z, 3)
    assert fused.dtype == apart.dtype == z.dtype
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert 0 < (apart - z).abs().max() and (fused - apart).abs().max() <= bound * (apart - z).abs().max()


# ---- dtypes between and inside the networks


def test_networks_run_in_their_dtype_and_the_state_in_float32(pipe, monkeypatch):
    pipe.to(dtype="bf16")
    seen = {name: seen_by(monkeypatch, pipe, name) for name in ("posterior_mean", "velocity")}
    states, times = [], []
    prepare = pipe.velocity.prepare
    monkeypatch.setattr(pipe.velocity, "prepare", lambda sigmas, *size: times.append(sigmas) or prepare(sigmas, *size))
    pipe(photos((64, 64), (64, 64)), 3, callback_on_step_end=lambda k, t, z: states.append(z))
    assert {z.dtype for z in states} == {torch.float32}
    assert all(x.dtype == torch.bfloat16 for calls in seen.values() for x, *_ in calls)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for calls in seen.values() for x, *_ in calls)
    # Times are not rounded to bfloat16: 1 - k/3 has more digits than it holds.
    (sigmas,) = times
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, 1 - torch.tensor([0.0, 1 / 3, 2 / 3]), rtol=0, atol=1e-7)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in pipe.vae.parameters() if p.dim() == 4)


def test_bfloat16_restores_the_same_picture(pipe):
    images = photos((64, 64))
    exact = pipe(images, 4, output_type="pt").images
    low = pipe.to(dtype="bf16")(images, 4, output_type="pt").images
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().mean() < 0.02


def test_casting_is_the_callers_choice(pipe):
    pipe.to(dtype=torch.float64)
    assert pipe.state_dtype == torch.float64
    assert pipe.to() is pipe and pipe.state_dtype == torch.float64
    assert pipe(photos((64, 64)), 1, output_type="pt").images.dtype == torch.float32


def test_default_dtype(monkeypatch):
    cpu = torch.device("cpu")
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for bits in ((False, False), (True, False), (False, True)):
        for name, bit in zip(tests, bits):
            monkeypatch.setattr(torch.cpu, name, lambda bit=bit: bit, raising=False)
        assert default_dtype("auto", cpu) == (torch.bfloat16 if any(bits) else torch.float32)
    for name in tests:
        monkeypatch.delattr(torch.cpu, name)
    assert default_dtype("auto", cpu) == torch.float32
    assert default_dtype("bf16", cpu) == default_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert default_dtype("fp16", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="float16 is many times slower"):
        default_dtype("float16", cpu)
    with pytest.raises(ValueError, match="no dtype is called 'int8'; there are auto, fp32"):
        default_dtype("int8", cpu)
    with pytest.raises(TypeError, match="dtype must be"):
        default_dtype(torch.int8, cpu)


def test_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert default_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda': PyTorch sees 0 CUDA devices; use 'auto' or 'cpu'"):
        default_device("cuda")
    with pytest.raises(ValueError, match="no device is called 'gpu'"):
        default_device("gpu")
    with pytest.raises(TypeError, match="device must be a name"):
        default_device(torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_device() == torch.device("cuda") and default_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2': PyTorch sees 2 CUDA devices"):
        default_device("cuda:2")


# ---- one photo, whatever is around it


def test_a_photo_does_not_depend_on_its_neighbours(pipe):
    """Alone, in a batch, at another place, beside other sizes: the same picture, for the same seed."""
    pipe.to(dtype=torch.float64)
    a, b, c, d = photos((64, 64), (64, 64), (40, 50), (70, 20))
    alone = {i: pipe(x, 2, seed=5, output_type="pt").images[0] for i, x in enumerate((a, b, c, d))}
    for order in ([a, b, c, d], [d, c, b, a]):
        for batch_size in (None, 1, 3):
            images = pipe(order, 2, seed=5, output_type="pt", batch_size=batch_size).images
            for x, image in zip(order, images):
                which = next(i for i, other in enumerate((a, b, c, d)) if other is x)
                torch.testing.assert_close(image, alone[which], rtol=0, atol=1e-6)


def test_batches_hold_one_padded_size(pipe):
    sizes = []

    def callback(k, t, z):
        sizes.append(tuple(z.shape))

    images = photos((64, 64), (128, 64), (1, 64), (64, 60), (100, 64), (64, 64))
    pipe(images, 1, callback_on_step_end=callback, batch_size=3)
    assert sizes == [(3, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 8)]
    sizes.clear()
    pipe(images[:1] * 9, 1, callback_on_step_end=callback)
    assert sizes == [(8, 4, 8, 8), (1, 4, 8, 8)]


def test_larger_photos_make_smaller_batches(pipe):
    def sizes(side):
        blank = [torch.empty(3, side, side, device="meta")] * 12
        return [len(indices) for _, indices in pipe._batches(blank, None)]

    assert sizes(512) == [8, 4] and sizes(1024) == [2] * 6 and sizes(4096) == [1] * 12


# ---- noise


def test_seeds(pipe):
    a, b = photos((64, 64), (64, 64))

    def run(images, seed, **kwargs):
        return pipe(images, 2, seed=seed, output_type="pt", **kwargs).images

    same = run([a, a], 3)
    assert torch.equal(same[0], same[1])
    different = run([a, a], [3, 4])
    torch.testing.assert_close(different[0], same[0], rtol=0, atol=1e-5)
    assert (different[0] - different[1]).abs().max() > 1e-3
    assert (run([a], 3) - run([a], np.int64(-3))).abs().max() > 1e-3
    torch.testing.assert_close(run([a, b], torch.tensor([7, 8]))[1], run([b], 8)[0], rtol=0, atol=1e-5)
    assert torch.equal(run([a], 0), pipe(a, 2, output_type="pt").images)


def test_noise_overrides_the_seed_and_is_what_the_seed_draws(pipe):
    images = photos((64, 64), (64, 64), (50, 100))
    noise = [
        lpmrf_kernels.source_noise((1, 4, h, w), torch.tensor([seed]))[0]
        for seed, (h, w) in ((1, (8, 8)), (2, (8, 8)), (3, (8, 16)))
    ]
    drawn = pipe(images, 2, seed=[1, 2, 3], output_type="pt").images
    given = pipe(images, 2, seed=99, noise=noise, output_type="pt").images
    for x, y in zip(drawn, given):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    stacked = pipe(images[:2], 2, noise=torch.stack(noise[:2]), output_type="pt").images
    torch.testing.assert_close(stacked, torch.stack(given[:2]), rtol=0, atol=1e-5)


def test_noise_std_scales_the_noise(pipe):
    z, noise = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(pipe.add_noise(z, noise=noise), 0.1 * noise)
    drawn = pipe.add_noise(z.double(), seeds=[11])
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.float(), pipe.add_noise(z, seeds=[11]), rtol=0, atol=1e-6)
    assert 0.08 < drawn.std() < 0.12


# ---- images in, images out


def test_every_form_of_an_image_is_the_same_image(pipe):
    levels = (photos((64, 50))[0] * 255).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).contiguous().numpy()
    floats = levels.float() / 255
    forms = {
        "PIL": PIL.Image.fromarray(array),
        "PIL in a list": [PIL.Image.fromarray(array)],
        "uint8 array": array,
        "batch of arrays": array[None],
        "list of arrays": [array],
        "float32 array": floats.permute(1, 2, 0).numpy(),
        "float64 array": array / 255,
        "big-endian array": floats.permute(1, 2, 0).numpy().astype(">f4"),
        "read-only, reversed twice": np.flip(np.flip(array, 0).copy(), 0),
        "uint8 tensor": levels,
        "batch of tensors": levels[None],
        "float tensor": floats,
        "tuple": (floats,),
    }
    expected = pipe(levels, 2).images[0]
    assert expected.size == (50, 64)
    for name, form in forms.items():
        result = pipe(form, 2).images
        assert len(result) == 1, name
        # Division by 255 in another precision may turn a rounding.
        difference = np.abs(np.int16(result[0]) - np.int16(expected))
        assert difference.max() <= 1 and difference.mean() < 1e-3, name


def test_pil_modes_become_rgb(pipe):
    rgb = PIL.Image.fromarray((photos((64, 64))[0].permute(1, 2, 0) * 255).byte().numpy())
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK"):
        image = rgb.convert(mode)
        assert pipe(image, 1).images[0].tobytes() == pipe(image.convert("RGB"), 1).images[0].tobytes()
    for mode in ("I", "F", "I;16"):
        with pytest.raises(ValueError, match=f"PIL mode '{mode}' has more than 8 bits"):
            pipe(PIL.Image.new(mode, (64, 64)), 1)


def test_output_types_agree(pipe):
    image = photos((64, 40))
    pt, array, pil = (pipe(image, 2, output_type=kind) for kind in ("pt", "np", "pil"))
    for a, b, c in zip(
        (pt.images, pt.posterior_means), (array.images, array.posterior_means), (pil.images, pil.posterior_means)
    ):
        assert isinstance(a, torch.Tensor) and a.shape == (1, 3, 64, 40) and a.dtype == torch.float32
        assert a.is_contiguous() and 0 <= a.min() and a.max() <= 1
        assert isinstance(b, list) and b[0].dtype == np.float32 and b[0].shape == (64, 40, 3)
        assert np.array_equal(b[0], a[0].permute(1, 2, 0).numpy())
        assert isinstance(c, list) and c[0].mode == "RGB"
        assert np.array_equal(np.asarray(c[0]), (a[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert not torch.equal(pt.images, pt.posterior_means)
    assert pt.failed == []


def test_sizes_that_differ_come_back_as_a_list(pipe):
    result = pipe(photos((64, 64), (3, 70)), 1, output_type="pt")
    assert [tuple(x.shape) for x in result.images] == [(3, 64, 64), (3, 3, 70)]
    images, means = pipe(photos((64, 64)), 1, return_dict=False)
    assert isinstance(images, list) and isinstance(means[0], PIL.Image.Image)


def test_results_are_clipped():
    """A flow that overshoots the image range."""
    pipe = PMRFPipeline(Same(), Towards(torch.tensor([1.7, 0.5, -0.4]).view(1, 3, 1, 1)))
    (image,) = pipe(photos((5, 7)), 3, output_type="pt").images
    torch.testing.assert_close(image, torch.tensor([1, 0.5, 0]).view(3, 1, 1).expand(3, 5, 7))


# ---- padding


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 40), more=st.integers(0, 200))
def test_reflection_is_numpys(length, more):
    index = module._reflected(length, length + more, "cpu").numpy()
    assert np.array_equal(index, np.pad(np.arange(length), (0, more), mode="reflect"))


def test_one_pixel_is_repeated():
    assert module._reflected(1, 5, "cpu").tolist() == [0] * 5


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (2, 3), (63, 65), (64, 64)])
def test_any_size_is_padded_and_cropped(pipe, monkeypatch, size):
    calls = seen_by(monkeypatch, pipe, "posterior_mean")
    (photo,) = photos(size)
    result = pipe(photo, 2, output_type="pt")
    assert result.images.shape == result.posterior_means.shape == (1, 3, *size)
    ((padded,),) = calls
    h, w = (math.ceil(n / 64) * 64 for n in size)
    expected = photo.numpy()
    for axis, (n, target) in enumerate(zip(size, (h, w)), start=1):
        mode = "reflect" if n > 1 else "edge"
        expected = np.pad(expected, [(0, target - n if i == axis else 0) for i in range(3)], mode=mode)
    assert np.array_equal(padded[0].numpy(), expected)
    # What is cropped is what the padded image gives.
    whole = pipe(padded, 2, output_type="pt")
    torch.testing.assert_close(result.images, whole.images[..., : size[0], : size[1]], rtol=0, atol=1e-6)


def test_padded_size_serves_every_network():
    def network(**attributes):
        net = nn.Identity()
        for name, value in attributes.items():
            setattr(net, name, value)
        return net

    latent = LatentPMRFPipeline(network(multiple=24), network(multiple=8), network(multiple=(4, 2), minimum=(10, 2)))
    # Rows: multiples of lcm(24, 8 * 4) = 96 and at least 80; columns: of lcm(24, 16) = 48 and at least 16.
    assert latent.padded_size(1, 1) == (96, 48)
    assert latent.padded_size(97, 49) == (192, 96)
    pixels = PMRFPipeline(network(multiple=6), network(multiple=4, minimum=30))
    assert pixels.padded_size(1, 48) == (36, 48)
    assert PMRFPipeline(network(), network()).padded_size(5, 7) == (5, 7)


# ---- ranges, shift and scale


def test_shift_and_scale_of_the_latent(pipe, golden):
    y = torch.stack(photos((64, 64)))
    other = LatentPMRFPipeline(pipe.posterior_mean, pipe.vae, pipe.velocity, latent_shift=0.5, latent_scale=3.0)
    with torch.no_grad():
        z = pipe.encode(y)
        torch.testing.assert_close(other.encode(y), (z - 0.5) * 3)
        torch.testing.assert_close(other.decode(other.encode(y)), pipe.decode(z), rtol=0, atol=1e-5)


def test_shift_and_scale_of_the_vaes_config(pipe):
    config = {**pipe.vae.config, "shift_factor": 0.1, "scaling_factor": 0.4}
    networks = pipe.posterior_mean, models.SimVAE(**config), pipe.velocity
    inherited = LatentPMRFPipeline(*networks)
    assert (inherited.latent_shift, inherited.latent_scale) == (0.1, 0.4)
    own = LatentPMRFPipeline(*networks, latent_shift=0, latent_scale=1)
    assert (own.latent_shift, own.latent_scale) == (0, 1)
    assert (pipe.latent_shift, pipe.latent_scale) == (0, 1)


def test_a_posterior_mean_that_works_in_another_range():
    class Squares(nn.Module):
        def __init__(self, low, high):
            super().__init__()
            self.low, self.high = low, high

        def forward(self, x):
            x = (x - self.low) / (self.high - self.low)
            return x**2 * (self.high - self.low) + self.low

    (photo,) = photos((6, 5))
    for low, high in ((0, 1), (-1, 1)):
        pipe = PMRFPipeline(Squares(low, high), Towards(0.5), posterior_mean_range=(low, high))
        mean = pipe(photo, 1, output_type="pt").posterior_means[0]
        torch.testing.assert_close(mean, photo**2, rtol=0, atol=1e-6)


def test_untimed_velocity(pipe, randomized):
    untimed = randomized(models.LooUFormer(**{**pipe.velocity.config, "time_embed_dim": None}))
    pipe = LatentPMRFPipeline(pipe.posterior_mean, pipe.vae, untimed)
    z = torch.stack(photos((8, 8)))[:, [0, 1, 2, 0]]
    with torch.no_grad():
        assert torch.equal(pipe.velocity_at(z, 0.3), -untimed(z))
        assert torch.equal(pipe.velocity_at(z, 0.7), -untimed(z))


@pytest.mark.parametrize("time_embed_dim", [None, "as it is"])
def test_nothing_that_the_image_does_not_decide_is_computed_in_the_loop(pipe, randomized, monkeypatch, time_embed_dim):
    """The prepared steps are those of velocity_at, and their tables are made once."""
    if time_embed_dim is None:
        pipe.velocity = randomized(models.LooUFormer(**{**pipe.velocity.config, "time_embed_dim": None}))
    pipe.to(dtype=torch.float64)
    z = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = flow.sample(pipe.velocity_at, z, 5)
        calls = []
        for name in ("prepare", "time_condition"):
            original = getattr(pipe.velocity, name)
            monkeypatch.setattr(pipe.velocity, name, lambda *a, name=name, f=original: calls.append(name) or f(*a))
        monkeypatch.setattr(AxialRoPE, "forward", counted(calls, AxialRoPE.forward))
        torch.testing.assert_close(pipe.sample(z, 5), expected, rtol=1e-12, atol=1e-12)
    blocks = sum(isinstance(module, AxialRoPE) for module in pipe.velocity.modules())
    assert calls == ["prepare", "time_condition", *["rope"] * blocks]


def counted(calls, forward):
    return lambda self, pos: calls.append("rope") or forward(self, pos)


def test_a_network_that_prepares_nothing_is_called_with_each_time():
    asked = []

    class Foreign(nn.Module):
        def forward(self, x, t):
            asked.append(t[0].item())
            return torch.zeros_like(x)

    PMRFPipeline(nn.Identity(), Foreign())(photos((8, 8)), 4)
    assert asked == [0, 0.25, 0.5, 0.75]


def test_times_may_differ_within_a_batch(pipe):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = pipe.velocity_at(z, torch.tensor([0.2, 0.9]))
        for i, t in enumerate((0.2, 0.9)):
            torch.testing.assert_close(both[i : i + 1], pipe.velocity_at(z[i : i + 1], t), rtol=1e-4, atol=1e-4)


def test_pmrf_starts_at_eps():
    asked = []

    class Spy(nn.Module):
        def forward(self, x, t):
            asked.append(t.item())
            return torch.zeros_like(x)

    PMRFPipeline(Same(), Spy(), eps=0.5)(photos((4, 4)), 2)
    assert asked == [0.5, 0.75]


def test_stages_are_differentiable(pipe):
    y = torch.stack(photos((64, 64))).requires_grad_()
    image, _ = pipe.restore(y, 2)
    image.sum().backward()
    assert y.grad.abs().sum() > 0
    assert not pipe(y, 1, output_type="pt").images.requires_grad


# ---- a photo that fails


class FailsOnBright(nn.Module):
    """A velocity that gives NaN or infinity for photos brighter than 0.9, and leads to 0.25 for the others."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, t):
        bright = x.mean(dim=(1, 2, 3), keepdim=True) > 0.9
        return torch.where(bright, self.value, 0.25 - x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_non_finite_photo_fails_alone(value, output_type):
    pipe = PMRFPipeline(Same(), FailsOnBright(value))
    images = [torch.full((3, 4, 4), level) for level in (0.2, 1.0, 0.4)] + [torch.ones(3, 2, 2)]
    with pytest.raises(NonFiniteError, match=r"2 of 4 images came out non-finite \(index 1, 3\)") as caught:
        pipe(images, 1, output_type=output_type, noise=[torch.zeros_like(x) for x in images])
    result = caught.value.result
    assert result.failed == caught.value.failed == [1, 3]
    good = [result.images[i] for i in (0, 2)]
    if output_type == "pt":
        assert all(torch.equal(x, torch.full((3, 4, 4), 0.25)) for x in good)
        assert result.images[1].isnan().all() and result.images[3].shape == (3, 2, 2)
    else:
        assert result.images[1] is result.images[3] is result.posterior_means[3] is None
        assert all(np.asarray(x).shape == (4, 4, 3) and np.asarray(x).std() == 0 for x in good)


def test_an_infinite_posterior_mean_is_not_a_white_photo():
    class Bursts(nn.Module):
        def forward(self, x):
            return torch.where(x > 0.5, math.inf, x)

    pipe = PMRFPipeline(Bursts(), Towards(0.5))
    with pytest.raises(NonFiniteError, match="index 1"):
        pipe([torch.zeros(3, 2, 2), torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(3, 1, 4)], 1)


# ---- unusable arguments

IMAGE = torch.zeros(3, 64, 64)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(images="face.png"), TypeError, "PIL.Image.open"),
        (dict(images=None), TypeError, "got NoneType"),
        (dict(images=[]), ValueError, "give at least one"),
        (dict(images=np.zeros((0, 64, 64, 3), np.uint8)), ValueError, "give at least one"),
        (dict(images=["face.png"]), TypeError, "image 0: expected a PIL image"),
        (dict(images=np.zeros((64, 64), np.uint8)), ValueError, r"\(H, W, 3\) or \(N, H, W, 3\), got the shape"),
        (dict(images=np.zeros((64, 64, 4), np.uint8)), ValueError, r"image 0: arrays must be \(H, W, 3\), RGB"),
        (dict(images=torch.zeros(1, 64, 64)), ValueError, r"tensors must be \(3, H, W\), RGB, got the shape"),
        (dict(images=torch.zeros(64, 64, 3)), ValueError, r"permute\(2, 0, 1\)"),
        (dict(images=[IMAGE, torch.zeros(1, 3, 64, 64)]), ValueError, "image 1: tensors must be"),
        (dict(images=torch.zeros(3, 0, 64)), ValueError, "has no pixels"),
        (dict(images=np.zeros((64, 64, 3), np.int32)), TypeError, "uint8, or float in .0, 1., got int32"),
        (dict(images=torch.zeros(3, 64, 64, dtype=torch.int64)), TypeError, "got torch.int64"),
        (dict(images=[IMAGE, IMAGE * 0 + 200]), ValueError, "image 1: .* got 200 to 200; divide by 255"),
        (dict(images=IMAGE - 1), ValueError, r"map \[-1, 1\] by x / 2 \+ 0.5"),
        (dict(images=IMAGE * math.nan), ValueError, "image 0: has NaN pixels"),
        (dict(images=IMAGE + math.inf), ValueError, "got inf to inf"),
        (dict(num_inference_steps=0), ValueError, "steps must be at least 1, got 0"),
        (dict(num_inference_steps=2.5), TypeError, "steps must be an int"),
        (dict(seed=[1, 2]), ValueError, "2 seeds for 1 images"),
        (dict(seed=1.5), TypeError, "seed must be an int, or a list"),
        (dict(seed=None), TypeError, "seed must be an int"),
        (dict(seed=True), TypeError, "seed must be an int"),
        (dict(seed=["a"]), TypeError, "seed must be an int"),
        (dict(seed=2**63), ValueError, "does not fit 64 bits"),
        (dict(noise=torch.zeros(1, 4, 4, 4)), ValueError, r"padded source, \(4, 8, 8\) a photo here, got \(4, 4, 4\)"),
        (dict(noise=torch.zeros(2, 4, 8, 8)), ValueError, "1 of .C, h, w., one a photo, got 2"),
        (dict(noise=[torch.zeros(8, 8)]), ValueError, "one a photo"),
        (dict(noise=np.zeros((1, 4, 8, 8))), TypeError, "noise must be a tensor"),
        (dict(noise=torch.zeros(1, 4, 8, 8) * math.nan), ValueError, "noise must be finite"),
        (dict(output_type="jpg"), ValueError, "output_type must be one of pil, np, pt, got 'jpg'"),
        (dict(batch_size=0), ValueError, "batch_size must be an int of at least 1"),
        (dict(batch_size=1.5), ValueError, "batch_size must be an int of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_cannot_be_used(pipe, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        pipe(**{"images": IMAGE, "num_inference_steps": 1, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(noise_std=-0.1), ValueError, "noise_std must be finite and at least 0"),
        (dict(noise_std="0.1"), TypeError, "noise_std must be a number"),
        (dict(latent_scale=0), ValueError, "latent_scale must not be 0"),
        (dict(latent_shift=math.nan), ValueError, "latent_shift must be finite"),
        (dict(posterior_mean_range=(1, 0)), ValueError, "posterior_mean_range must increase"),
        (dict(posterior_mean_range=1), ValueError, "posterior_mean_range must be two numbers"),
    ],
)
def test_settings_that_cannot_be_used(pipe, settings, error, message):
    with pytest.raises(error, match=message):
        LatentPMRFPipeline(pipe.posterior_mean, pipe.vae, pipe.velocity, **settings)


def test_networks_that_cannot_be_used(pipe):
    with pytest.raises(TypeError, match="velocity must be a torch.nn.Module, got function"):
        PMRFPipeline(Same(), lambda x, t: x)
    with pytest.raises(ValueError, match="must keep the size"):
        PMRFPipeline(nn.Upsample(scale_factor=2), Towards(0))(IMAGE, 1)
    with pytest.raises(ValueError, match="eps"):
        PMRFPipeline(Same(), Towards(0), eps=1.0)


def test_networks_are_put_in_eval_mode_and_named(pipe):
    networks = pipe.posterior_mean.train(), pipe.vae.train(), pipe.velocity.train()
    again = LatentPMRFPipeline(*networks)
    assert not any(m.training for net in networks for m in net.modules())
    assert again.modules == dict(zip(("posterior_mean", "vae", "velocity"), networks))
    assert "noise_std=0.1" in repr(again) and "SimVAE" in repr(again)
