"""The page about published weights runs as written once its downloads are there; here, small ones of the same forms."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from lpmrf_fast import cli, models, published

PAGE = (Path(__file__).parents[1] / "lpmrf_fast" / "weights" / "README.md").read_text(encoding="utf-8")
DOWNLOADS = ("pip install", "hf download", "curl -LO")
TINY = ["size=64", "workers=0", "batch_size=2", "steps=2", "precision=fp32", "device=cpu", "log_every=1"]
MODELS = {
    "pmrf-flow": ["model={preset: hdit-small}"],
    "latent-pmrf-flow": [
        "model={in_channels: 4, out_channels: 4, patch_size: [1, 1], block_dims: [16], block_layers: [1],"
        " block_types: [global], window_sizes: [0], head_dims: [16], time_embed_dim: 32}"
    ],
}


@pytest.fixture
def downloads(golden, monkeypatch, tmp_path):
    """A working directory with what the page downloads, and photos."""
    pytest.importorskip("cv2")
    pytest.importorskip("yaml")
    fixture = golden("pmrf_pipeline")
    for name, cls, part in (("hdit", models.HDiT, "model"), ("swinir", models.SwinIR, "mmse_model")):
        monkeypatch.setitem(models.PRESETS, f"{name}-small", (cls, fixture.config[part]))
        monkeypatch.setitem(published.ARCHITECTURES, f"{name}_small", f"{name}-small")
    hyperparameters = {"stage": "flow", "arch": "hdit_small", "mmse_model_arch": "swinir_small"}
    vae = golden("sim_vae_layer_norm")
    for folder, config, weights, state in (
        ("PMRF", hyperparameters, "model", fixture.state),
        ("Sim-VAE-c32", {"_class_name": "AutoencoderKLSim", **vae.config}, "diffusion_pytorch_model", vae.state),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / folder / f"{weights}.safetensors")
    mean = {k.removeprefix("mmse_model."): t for k, t in fixture.state.items() if k.startswith("mmse_model.")}
    torch.save(mean, tmp_path / "swinir_restoration512_L1.pth")
    for folder in ("photos", "faces"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / folder / ("face.png" if i == 0 else f"{i}.png"))
    (tmp_path / "lpmrf_fast").symlink_to(Path(cli.__file__).parent, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_as_written(downloads):
    ran = 0
    for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(compile(block, "weights/README.md", "exec"), {})
            continue
        for line in block.splitlines():
            if line.startswith(DOWNLOADS):
                continue
            program, *words = shlex.split(line, comments=True)
            assert program == "lpmrf-fast"
            if words[0] == "train":  # as written, but for the size
                assert Path(words[3]).exists()
                words += [*TINY, *MODELS[Path(words[3]).stem]]
            assert cli.main(words) == 0, line
            ran += 1
    assert ran >= 7
    for folder in ("restored", "restored-latent"):
        assert sorted(p.name for p in Path(folder).glob("*.png")) == ["1.png", "2.png", "face.png"]
    assert Path("kept.png").exists() and Path("face-restored.png").exists()


def test_downloads_are_the_files_that_the_page_uses():
    for name in ("PMRF", "Sim-VAE-c32"):
        assert re.search(rf"hf download \S+ .*--local-dir {name}\n", PAGE)
    assert "curl -LO https://github.com/zsyOAOA/DifFace/releases/download/V1.0/swinir_restoration512_L1.pth" in PAGE
    assert PAGE.count("**Licences.**") == 2
