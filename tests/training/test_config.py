"""Configurations: YAML, overrides, and one clear line for what cannot be used."""

from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("cv2")
from lpmrf_fast.training.config import ConfigError, load_config
from lpmrf_fast.training.trainer import learning_rate

PRESETS = Path(__file__).parents[2] / "lpmrf_fast" / "training" / "presets"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("out: runs/x\nmodel: {preset: sim-vae-c16}\nlr: 1e-3\nbetas: [0.9, 0.99]\n")
    return path


def test_values_and_overrides(file):
    config = load_config(file, ["steps=7", "model.latent_channels=8", "lr=2e-4", "crop=64"])
    assert config.steps == 7 and config.lr == 2e-4 and config.betas == (0.9, 0.99) and config.crop == 64
    assert config.model == {"preset": "sim-vae-c16", "latent_channels": 8}
    assert load_config(file).lr == 1e-3  # YAML 1.1 reads 1e-3 as text


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_presets_load(preset):
    assert load_config(preset).steps > 0


def test_pmrf_as_published():
    c = load_config(PRESETS / "pmrf-flow.yaml")
    assert (c.lr, c.betas, c.weight_decay, c.ema_decay) == (5e-4, (0.9, 0.95), 1e-2, 0.9999)
    assert (c.batch_size, c.steps // (70_000 // 256), c.noise_std, c.time_sampling) == (256, 3850, 0.1, "stratified")
    assert c.vae is None and c.model == {"preset": "hdit-imagenet256sp4"} and c.grad_clip == float("inf")
    assert {learning_rate(step, c) for step in (0, 10, c.steps - 1)} == {1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=3", "did you mean 'steps'"),
        ("steps=0", "steps must be at least 1"),
        ("steps=many", "steps must be a whole number"),
        ("steps=2.5", "steps must be a whole number, got 2.5"),
        ("steps=[1", "not valid YAML"),
        ("lr.x=1", "lr is no mapping"),
        ("out=null", "out must be text, got None"),
        ("model=sim-vae-c16", "model must be a mapping"),
        ("flip=maybe", "flip must be true or false"),
        ("crop=half", "crop must be a whole number or null"),
        ("crop=0", "crop must be at least 1"),
        ("betas=0.9", "betas must be a list of 2 numbers"),
        ("betas=[0.9]", "betas must be a list of 2 numbers"),
        ("betas=[0.9, 1]", r"betas must be in \[0, 1\)"),
        ("lr=.nan", "lr positive"),
        ("noise_std=-1", "noise_std must be at least 0"),
        ("jitter=-0.1", "jitter must be at least 0"),
        ("jitter=0.6", "jitter must be at most 0.5"),
        ("seed=-1", "seed must be at least 0"),
        ("noise_std=.nan", "noise_std must be at least 0"),
        ("grad_clip=0", ".inf clips nothing"),
        ("degradation={sigma: 3}", "degradation: sigma must be a list of 2 numbers"),
        ("degradation={r: [8, 1]}", "r must be two rising numbers"),
        ("degradation={q: [30, 101]}", "q must be two rising numbers between 1 and 100"),
        ("degradation={kernel_size: 40}", "kernel_size must be odd"),
        ("degradation={resize: [cubic]}", "resize must name some of bicubic, bilinear, area, linear"),
        ("degradation={gray_prob: 2}", r"gray_prob must be in \[0, 1\]"),
        ("degradation={preset: real-esrgan, resize_prob: [0.5, 0.5, 0.5]}", "resize_prob must add up to 1"),
        ("precision=fp8", "bf16"),
        ("crop=1024", "larger than size"),
        ("degradation=blind", "blind-face"),
        ("degradation={sigmas: [0, 1]}", "did you mean 'sigma'"),
        ("steps", "key=value"),
        ("source=noise", "needs a condition"),
        ("condition=degraded", "others none"),
        ("source=clean", '"posterior-mean", "degraded", "noise"'),
        ("time_sampling=lognormal", "logit-normal"),
        ("schedule=step", "cosine"),
        ("keep=0", "keep must be at least 1"),
        ("lpips_weight=1.0", "needs lpips_weights"),
        ("degradation={preset: esrgan}", "real-esrgan"),
    ],
)
def test_unusable_settings_are_one_clear_line(file, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "model: {}"])
def test_unusable_files_name_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(path)


def test_whole_numbers_are_numbers_and_steps_may_be_written_short(file):
    config = load_config(file, ["lr=1", "noise_std=0", "steps=1e5", "degradation={sigma: [1, 2]}"])
    assert (config.lr, config.noise_std, config.steps, config.ranges.sigma) == (1, 0, 100_000, (1, 2))
    assert load_config(file, ["steps=1.0e+5"]).steps == 100_000


def test_sim_vae_as_published():
    for channels in (16, 32):
        c = load_config(f"sim-vae-c{channels}")  # a preset's name does for its path
        assert c.model == {"preset": f"sim-vae-c{channels}"} and (c.crop, c.batch_size, c.steps) == (256, 8, 150_000)
        assert (c.lr, c.betas, c.weight_decay, c.grad_clip, c.ema_decay) == (1e-4, (0.9, 0.99), 1e-2, 1.0, 0.9999)
        assert (c.kl_weight, c.perceptual_weight, c.precision) == (1e-6, 0.05, "fp32")
        # timm's cosine: 1e-5 → 1e-4 in 500 steps, then half a period of 200,000 steps down to 1e-6.
        rates = [c.lr * learning_rate(step, c) for step in (0, 499, 500, 100_500, 149_999)]
        middle = 1e-6 + (1e-4 - 1e-6) / 2
        assert rates[1:4] == pytest.approx([1e-4, 1e-4, middle]) and rates[0] == pytest.approx(1e-5, rel=0.02)
        assert rates[4] < middle / 2 + 1e-6 < rates[3]


def test_the_papers_ablations_are_presets():
    naive, noise = load_config("flow-from-degraded"), load_config("flow-from-noise")
    assert (naive.source, naive.condition) == ("degraded", None)
    assert (noise.source, noise.condition, noise.model["in_channels"]) == ("noise", "degraded", 64)
    assert load_config("latent-pmrf-flow").source == load_config("pmrf-flow").source == "posterior-mean"


def test_degradations_start_from_presets(file):
    assert load_config(file, ["degradation={preset: real-esrgan, q: [50, 60]}"]).ranges.q == (50, 60)
    assert load_config(file, ["degradation={preset: gfpgan}"]).ranges.r == (0.8, 8.0)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml.*cannot be read"):
        load_config(tmp_path / "none.yaml")
