"""Each stage really trains, with each of its options."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("yaml")
from lpmrf_fast.checkpoint import load_model
from lpmrf_fast.devices import DeviceError
from lpmrf_fast.models import HDiT, SwinIR
from lpmrf_fast.pipeline import PMRFPipeline
from lpmrf_fast.training.config import ConfigError, TrainConfig
from lpmrf_fast.training.data import batches
from lpmrf_fast.training.stages import Draws, dct_basis, start_from_identity
from lpmrf_fast.training.trainer import Trainer, learning_rate

VAE = dict(
    down_block_types=["EncoderBlock2D"] * 3,
    up_block_types=["DecoderBlock2D"] * 3,
    block_out_channels=[8, 8, 16],
    layers_per_block=1,
    layers_mid_block=1,
    latent_channels=4,
)
SWINIR = dict(
    img_size=16,
    embed_dim=24,
    depths=[2],
    num_heads=[2],
    window_size=4,
    mlp_ratio=2,
    sf=4,
    upsampler="pixelshuffledirect",
    unshuffle=True,
    unshuffle_scale=4,
)
FLOW = dict(
    in_channels=4,
    out_channels=4,
    patch_size=[1, 1],
    block_dims=[16, 32],
    block_layers=[1, 1],
    block_types=["neighborhood", "global"],
    window_sizes=[3, 0],
    head_dims=[8, 16],
    time_embed_dim=16,
    mapping_mult=4.0,
    zero_init_last_layer=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six smooth coloured pictures: something that a few steps can learn."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:64, :64] / 64
    for i in range(6):
        a = rng.uniform(-1, 1, (3, 3))
        picture = 0.5 + 0.5 * np.sin(3 * (a[0] * x[..., None] + a[1] * y[..., None]) + a[2])
        Image.fromarray((255 * picture).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def config(folder, out, **options):
    base = dict(
        train=str(folder), val=str(folder), out=str(out), size=64, steps=6, batch_size=2, workers=0, precision="fp32",
        tracker="none", device="cpu", warmup=1, lr=2e-3, log_every=2, save_every=3, val_every=6, val_images=2,
        ema_decay=0.5,
    )  # fmt: skip
    return TrainConfig(**{**base, **options})


def losses(out, key):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [r[key] for r in rows if key in r]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The first two stages, trained briefly: the flow stage needs them."""
    out = tmp_path_factory.mktemp("runs")
    Trainer("vae", config(folder, out / "vae", model=VAE, crop=32, steps=60)).fit()
    noise = {"sigma": [0.1, 0.1], "r": [1, 1], "delta": [20, 20], "q": [100, 100]}  # quickly learned
    options = dict(model=SWINIR, identity_init=True, steps=100, lr=1e-3, degradation=noise)
    Trainer("posterior-mean", config(folder, out / "mean", **options)).fit()
    return out


def test_vae_learns(trained):
    l1 = losses(trained / "vae", "l1")
    assert np.mean(l1[-3:]) < 0.7 * np.mean(l1[:3])
    assert (trained / "vae" / "val-000060.png").exists()


@pytest.mark.parametrize("mode", ["uniform", "stratified", "logit-normal"])
def test_samples_draw_the_same_however_the_batch_is_shared_out(mode):
    def drawn(first, last):
        draws, like = Draws((3, 41), range(first, last), 6), torch.empty(last - first, 2, 5)
        return draws.normal(like), draws.uniform(3), draws.times(mode), draws.normal(like)

    whole, parts = drawn(0, 6), [drawn(0, 2), drawn(2, 3), drawn(3, 6)]
    for all_at_once, *pieces in zip(whole, *parts):
        assert torch.equal(all_at_once, torch.cat(pieces))
    noise = torch.cat([whole[0], whole[3], Draws((3, 42), range(6), 6).normal(torch.empty(6, 2, 5))])
    assert len(noise.flatten().unique()) == noise.numel()  # no two samples, calls or steps draw alike


def test_recolouring_reorders_channels_of_some_images(folder, tmp_path):
    x = torch.rand(64, 3, 4, 4)
    for share in (0.0, 0.5):
        stage = Trainer("vae", config(folder, tmp_path / str(share), model=VAE, recolour=share)).stage
        y = stage._recoloured(x, Draws((0,), range(64), 64))
        assert torch.equal(y.sort(1).values, x.sort(1).values)
        changed = (y != x).flatten(1).any(1).float().mean()
        assert changed == 0 if share == 0 else 0.2 < changed < 0.7


def test_a_network_of_another_stage_is_one_clear_line(folder, trained, tmp_path):
    vae, mean = (str(trained / name / "model") for name in ("vae", "mean"))
    for stage, options, message in (
        ("vae", dict(model={}, init=mean), "init: expected a network of the class SimVAE or AutoencoderKL, got SwinIR"),
        ("vae", dict(model={"class": "SwinIR", **SWINIR}), "model: expected .* SimVAE or AutoencoderKL, got SwinIR"),
        ("flow", dict(model=FLOW, vae=mean, posterior_mean=mean), "vae: expected .* got SwinIR"),
        ("flow", dict(model=FLOW, vae=vae, posterior_mean=vae), "posterior_mean: expected .* got SimVAE"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(stage, config(folder, tmp_path, **options))


def test_a_device_or_a_folder_that_is_not_there_is_one_clear_line(folder, tmp_path):
    for device in ("cuda:99", "tpu"):
        with pytest.raises(DeviceError, match=f"device.* '{device}'.*; use 'auto'"):
            Trainer("vae", config(folder, tmp_path, model=VAE, device=device))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out: .*file cannot be a folder"):
        Trainer("vae", config(folder, tmp_path / "file", model=VAE))


def test_decoder_refines_beside_a_critic_and_the_encoder_stays(folder, trained, tmp_path):
    before = load_model(trained / "vae/model")
    c = config(folder, tmp_path, model={}, init=str(trained / "vae/model"), crop=32, steps=20, **REFINED)
    Trainer("vae", c).fit()
    after = load_model(tmp_path / "model")
    assert after.config["scaling_factor"] == before.config["scaling_factor"]
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values()):
        assert torch.equal(a, b) == name.startswith("encoder."), name
    critic = losses(tmp_path, "critic")
    # It learns, and what it judges learns against it.
    assert min(critic) < 0.95 * critic[0] and "adversarial" in (tmp_path / "log.jsonl").read_text(), critic


def test_vae_records_shift_and_scale_of_its_latents(folder, trained):
    vae = load_model(trained / "vae/model")
    faces = [torch.from_numpy(np.array(Image.open(p))) for p in sorted(folder.glob("*.png"))]
    with torch.no_grad():
        z = vae.encode(torch.stack(faces).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, dim=1)[0]
    z = (z - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    assert abs(z.mean()) < 1e-3 and abs(z.std() - 1) < 1e-3


def test_posterior_mean_learns_to_beat_its_input(trained):
    assert losses(trained / "mean", "val_gain")[-1] > 0


@pytest.mark.parametrize(("cache", "time_sampling"), [(0, "stratified"), (1, "uniform")])
def test_flow_learns(folder, trained, tmp_path, cache, time_sampling):
    options = dict(model=FLOW, cache=cache, time_sampling=time_sampling, steps=30, batch_size=4)
    ends = dict(vae=str(trained / "vae/model"), posterior_mean=str(trained / "mean/model"))
    Trainer("flow", config(folder, tmp_path, **options, **ends)).fit()
    velocity = losses(tmp_path, "velocity")
    assert np.mean(velocity[-4:]) < np.mean(velocity[:4])
    assert len(list((tmp_path / "latents").glob("pass-*.pt"))) == 2 * cache
    assert "val_psnr" in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize(
    "ablation",
    [
        dict(source="degraded"),
        dict(source="noise", condition="degraded", cache=1),
        dict(source="noise", condition="posterior-mean", time_sampling="logit-normal"),
    ],
    ids=["naive", "told-degraded", "told-mean"],
)
def test_the_papers_ablations_are_settings(folder, trained, tmp_path, ablation):
    told = "condition" in ablation
    options = dict(
        model=FLOW | dict(in_channels=8 if told else 4), vae=str(trained / "vae/model"), steps=2, val_every=2
    )
    if ablation.get("condition") == "posterior-mean":
        with pytest.raises(ConfigError, match="posterior_mean must name"):
            Trainer("flow", config(folder, tmp_path / "none", **options, **ablation))
        options["posterior_mean"] = str(trained / "mean/model")
    trainer = Trainer("flow", config(folder, tmp_path, **options, **ablation))
    assert (trainer.stage.posterior_mean is None) == ("posterior_mean" not in options)
    source = trainer.stage.source(torch.ones(2, 4, 8, 8), Draws((0,), range(2), 2))
    assert source.mean().item() == pytest.approx(0 if told else 1, abs=0.2)
    assert source.std().item() == pytest.approx(1 if told else 0.1, rel=0.2)
    trainer.fit()
    assert ("val_psnr_mean" in (tmp_path / "log.jsonl").read_text()) == ("posterior_mean" in options)


@pytest.mark.parametrize("degradation", ["real-esrgan", "gfpgan"])
def test_degrading_on_the_device(folder, tmp_path, degradation):
    """The same places of crops, and but for the noise the same degradations, as in the workers."""
    options = dict(model=SWINIR, crop=32, degradation=degradation)
    here, there = (
        Trainer("posterior-mean", config(folder, tmp_path / where, degrade_on=where, **options))
        for where in ("cpu", "device")
    )
    data = [list(batches(t.stage.dataset(4), 2, 0)) for t in (here, there)]
    for ours, (clean, drawn) in zip(*data):
        assert clean.shape[-1] == 64 and len(drawn) == 2
        found = there.stage.prepare([clean, drawn])
        assert torch.equal(found[0], ours[0]) and found[1].shape == ours[1].shape
        assert (found[1].float() - ours[1].float()).abs().mean() < 25
    there.fit()


def test_lpips_is_a_term_of_the_vae(folder, tmp_path):
    pytest.importorskip("torchmetrics")
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {f"features.{i}.weight": 0.05 * torch.randn(o, c, k, k) for i, (o, c, k) in shapes.items()}
    state |= {f"features.{i}.bias": torch.zeros(o) for i, (o, _, _) in shapes.items()}
    torch.save(state, tmp_path / "alex.pth")
    weights = dict(lpips_weight=0.5, lpips_weights=str(tmp_path / "alex.pth"))
    trainer = Trainer("vae", config(folder, tmp_path / "out", model=VAE, steps=1, crop=32, **weights))
    before = trainer.stage.lpips.line0.clone()
    trainer.fit()
    assert "lpips" in (tmp_path / "out/log.jsonl").read_text() and torch.equal(before, trainer.stage.lpips.line0)


def test_validation_faces_are_degraded_alike_in_every_run(folder, tmp_path):
    one, other = (
        Trainer("posterior-mean", config(folder, tmp_path / str(seed), model=SWINIR, seed=seed)).stage.validation()
        for seed in (0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other)) and not torch.equal(*one)


def test_flow_in_pixels_needs_no_vae(folder, trained, tmp_path):
    model = FLOW | dict(in_channels=3, out_channels=3, patch_size=[4, 4], patch_embed_type="pixel_shuffle")
    Trainer("flow", config(folder, tmp_path, model=model, posterior_mean=str(trained / "mean/model"))).fit()
    assert len(losses(tmp_path, "velocity")) == 3


def test_pmrf_stage(folder, trained, tmp_path):
    """HDiT in pixels, from a posterior mean in DifFace's form; the trained network fits its pipeline as it is."""
    mean = load_model(trained / "mean/model")
    torch.save({"params_ema": {f"module.{k}": v for k, v in mean.state_dict().items()}}, tmp_path / "swinir.pth")
    model = {"preset": "hdit-s", "widths": [16, 32], "depths": [1, 1], "mapping_width": 16, "dropout_rate": [0, 0]}
    model["self_attns"] = [{"type": "neighborhood", "d_head": 8}, {"type": "global", "d_head": 8}]
    options = dict(
        model=model, steps=80, batch_size=4, noise_std=0.1, time_sampling="stratified", grad_clip=float("inf")
    )
    trainer = Trainer("flow", config(folder, tmp_path / "run", posterior_mean=str(tmp_path / "swinir.pth"), **options))
    trainer.fit()
    velocity = losses(tmp_path / "run", "velocity")
    assert np.mean(velocity[-4:]) < 0.9 * np.mean(velocity[:4])
    network = load_model(tmp_path / "run/model")
    assert type(network) is HDiT
    pipe = PMRFPipeline(load_model(tmp_path / "swinir.pth"), network)
    clean, degraded = (x.float() / 255 for x in trainer.stage.validation())
    with torch.no_grad():
        means = pipe.predict_mean(degraded)
        source = pipe.add_noise(means, noise=torch.randn(means.shape, generator=torch.Generator().manual_seed(0)))
        target, found = clean - source, pipe.velocity_at(source, 0.0)
    # It points from the source to the clean face, not back.
    assert (found - target).square().mean() < target.square().mean() < (found + target).square().mean()


def test_other_networks_make_the_cache_anew(folder, trained, tmp_path):
    ends = dict(vae=str(trained / "vae/model"), posterior_mean=str(trained / "mean/model"))
    latents = tmp_path / "shared"
    for changes, same in (({}, None), ({"seed": 1}, True), ({"degradation": "mild"}, False)):
        before = {p.name: p.read_bytes() for p in latents.glob("pass-*")}
        options = dict(model=FLOW, cache=1, latents=str(latents), **ends, **changes)
        Trainer("flow", config(folder, tmp_path / str(len(changes)), **options)).stage.dataset(4)
        after = {p.name: p.read_bytes() for p in latents.glob("pass-*")}
        assert len(after) == 2 and (same is None or (before == after) == same)


REFINED = dict(adversarial_weight=0.3, latent_noise=0.2, frozen_encoder=True)


def test_the_saved_model_is_the_ema(folder, tmp_path):
    trainer = Trainer("vae", config(folder, tmp_path, model=VAE, crop=32))
    trainer.fit()
    saved = load_model(tmp_path / "model").state_dict()
    ema, raw = trainer.ema.module.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(saved[k], ema[k]) for k in ema)
    assert any(not torch.equal(raw[k], ema[k]) for k in ema)


def test_flow_needs_a_posterior_mean(folder, tmp_path):
    with pytest.raises(ConfigError, match="posterior_mean"):
        Trainer("flow", config(folder, tmp_path, model=FLOW))


def test_learning_rate_warms_up_stays_and_falls(folder, tmp_path):
    c = config(folder, tmp_path, model=VAE, steps=100, warmup=10, decay=0.2)
    rates = [learning_rate(s, c) for s in range(101)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71 and rates[90] == 0.5 and rates[100] == 0


@pytest.mark.parametrize("n", [4, 8])
def test_dct_basis_is_orthonormal(n):
    basis, spread = dct_basis(n, 3 * n * n)
    assert torch.allclose(basis @ basis.T, torch.eye(3 * n * n), atol=1e-5)
    assert spread.argmax() == 0 and (spread > 0).all()
    assert dct_basis(n, 3 * n * n + 5)[0][3 * n * n :].abs().sum() == 0


def test_identity_start_reproduces_smooth_pictures():
    model = SwinIR(**SWINIR)
    start_from_identity(model)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    picture = torch.stack([y, x, 0.5 * (x + y)])[None]
    assert (model(picture) - picture).abs().max() < 0.02
    with pytest.raises(ConfigError, match="pixelshuffledirect"):
        start_from_identity(SwinIR(**(SWINIR | {"upsampler": "nearest+conv"})))
