"""`convert` between the official, the diffusers and our form: every tensor, its dtype and the config survive."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpmrf_fast import checkpoint, models, published
from lpmrf_fast.checkpoint import CheckpointError
from lpmrf_fast.convert import convert
from lpmrf_fast.pipeline import LatentPMRFPipeline, Pipeline, PMRFPipeline

HYPERPARAMETERS = {"stage": "flow", "arch": "hdit_small", "mmse_model_arch": "swinir_small", "lr": 0.0005, "eps": 0.125}
HYPERPARAMETERS |= {"conditional": False, "mmse_model_ckpt_path": None, "mmse_noise_std": 0.2, "betas": [0.9, 0.95]}


def refuse(action, *parts):
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value


def same(a, b):
    """The same names, dtypes and bits."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def official(golden, monkeypatch, tmp_path):
    """A small PMRF folder in the official form, in three dtypes, with a metric module."""
    fixture = golden("pmrf_pipeline")
    for name, cls, part in (("hdit", models.HDiT, "model"), ("swinir", models.SwinIR, "mmse_model")):
        monkeypatch.setitem(models.PRESETS, f"{name}-small", (cls, fixture.config[part]))
        monkeypatch.setitem(published.ARCHITECTURES, f"{name}_small", f"{name}-small")
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HYPERPARAMETERS))
    state = {k: t.bfloat16() if "ff." in k else t.half() if "conv_up" in k else t for k, t in fixture.state.items()}
    save_file(state | {"fid.real_features_sum": torch.ones(4)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "forms",
    [
        ["single", "official"],
        ["diffusers", "official"],
        ["single", "diffusers", "single", "official"],
        ["official", "diffusers", "single", "diffusers", "official"],
    ],
)
def test_pmrf_and_back(official, tmp_path, forms):
    source = official
    for i, form in enumerate(forms):
        target = tmp_path / (f"{i}.safetensors" if form == "single" else str(i))
        assert "PMRF" in convert(source, target, form)
        pipe = Pipeline.from_pretrained(target, dtype=None, device="cpu")
        assert type(pipe) is PMRFPipeline and (pipe.noise_std, pipe.eps) == (0.2, 0.125)
        source = target
    assert files(source) == ["config.json", "model.safetensors"]
    expected = load_file(official / "model.safetensors")
    del expected["fid.real_features_sum"]
    same(load_file(source / "model.safetensors"), expected)
    assert json.loads((source / "config.json").read_text()) == HYPERPARAMETERS


def test_names_in_each_form(official, tmp_path):
    convert(official, tmp_path / "d", "diffusers")
    weights = "diffusion_pytorch_model.safetensors"
    assert files(tmp_path / "d") == [
        "model_index.json",
        *(f"{name}/{file}" for name in ("posterior_mean", "velocity") for file in ("config.json", weights)),
    ]
    index = json.loads((tmp_path / "d" / "model_index.json").read_text())
    assert index["_class_name"] == "PMRFPipeline" and index["velocity"] == ["lpmrf_fast.models", "HDiT"]
    assert json.loads((tmp_path / "d/velocity/config.json").read_text())["_class_name"] == "HDiT"
    # Each folder is a model of its own, e.g. the posterior mean for training a flow.
    assert type(checkpoint.load_model(tmp_path / "d" / "posterior_mean")) is models.SwinIR
    convert(official, tmp_path / "s", "single")  # no ending: a folder
    assert files(tmp_path / "s") == ["config.json", "model.safetensors"]
    assert "velocity.patch_in.proj.weight" in load_file(tmp_path / "s" / "model.safetensors")


def test_ours_to_official_has_the_tables_that_ours_leaves_out(official, tmp_path):
    pipe = Pipeline.from_pretrained(official, dtype=None, device="cpu")
    pipe.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", "official")
    expected = load_file(official / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == expected.keys() - {"fid.real_features_sum"}
    masks = [name for name in again if name.split(".")[-1] in published.RECOMPUTED]
    assert masks
    same({name: again[name] for name in masks}, {name: expected[name] for name in masks})


def test_training_checkpoint_to_all_forms(official, golden, tmp_path):
    fixture = golden("pmrf_pipeline")
    order = [f"model.{name}" for name, _ in models.HDiT(**fixture.config["model"]).named_parameters()]
    ema = [fixture.state[name] + 0.5 for name in order]
    content = {"state_dict": fixture.state, "ema": {"shadow_params": ema}, "hyper_parameters": HYPERPARAMETERS}
    torch.save(content, tmp_path / "x.ckpt")
    assert "the EMA's" in convert(tmp_path / "x.ckpt", tmp_path / "o", "official")
    same(load_file(tmp_path / "o" / "model.safetensors"), {**fixture.state, **dict(zip(order, ema))})
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors", "single")
    convert(tmp_path / "x.safetensors", tmp_path / "o2", "official")
    same(load_file(tmp_path / "o2" / "model.safetensors"), load_file(tmp_path / "o" / "model.safetensors"))


def test_latent_pipeline_single_and_diffusers(pipe, tmp_path):
    source = LatentPMRFPipeline(
        pipe.posterior_mean, pipe.vae, pipe.velocity, 0.25, 0.5, 2.0, posterior_mean_range=(-1, 1)
    ).save_pretrained(tmp_path / "ours", dtype="bf16", card={"data": "faces"})
    convert(source, tmp_path / "d", "diffusers")
    convert(tmp_path / "d", tmp_path / "again", "single")
    same(load_file(tmp_path / "again/model.safetensors"), load_file(source / "model.safetensors"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again")]
    for name, entry in configs[1]["modules"].items():
        assert {k: entry[k] for k in ("class", "config")} == configs[0]["modules"][name]
    assert {**configs[1], "modules": 0} == {**configs[0], "modules": 0}
    assert json.loads((tmp_path / "d/vae/config.json").read_text())["_class_name"] == "AutoencoderKLSim"
    loaded = Pipeline.from_pretrained(tmp_path / "d")
    assert (loaded.noise_std, loaded.latent_shift, loaded.latent_scale) == (0.25, 0.5, 2.0)
    assert loaded.card == {"data": "faces"}
    refuse(lambda: convert(source, tmp_path / "o", "official"), "found a LatentPMRFPipeline", "diffusers or single")


@pytest.mark.parametrize("form", ["official", "diffusers"])
def test_sim_vae_and_back(golden, tmp_path, form):
    fixture = golden("sim_vae_group_norm")
    config = {"_class_name": "AutoencoderKLSim", "_diffusers_version": "0.32.2", **fixture.config}
    source = tmp_path / "Sim-VAE"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file({k: t.half() for k, t in fixture.state.items()}, source / "diffusion_pytorch_model.safetensors")
    convert(source, tmp_path / "x.safetensors", "single")
    assert type(checkpoint.load_model(tmp_path / "x.safetensors")) is models.SimVAE
    convert(tmp_path / "x.safetensors", tmp_path / "again", form)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    same(*(load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (source, tmp_path / "again")))


def test_difface_swinir_and_back(golden, tmp_path):
    state = golden("swinir").state
    torch.save({f"module.{k}": t.bfloat16() if "norm" in k else t for k, t in state.items()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "a", "single")
    convert(tmp_path / "a", tmp_path / "a-d", "diffusers")
    convert(tmp_path / "a-d", tmp_path / "b.pth", "official")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    same(again["state_dict"], {k: t.bfloat16() if "norm" in k else t for k, t in state.items()})
    assert (tmp_path / "b.pth").stat().st_size < 1.2 * sum(t.nbytes for t in state.values()) + 50_000


@pytest.mark.parametrize("card", [{"psnr": 30}, ["any", "JSON"], None])
def test_a_card_of_ours_survives_the_forms_of_others(golden, tmp_path, card):
    vae = golden("sim_vae_layer_norm").network(models.SimVAE)
    source = checkpoint.save_model(tmp_path / "vae", vae, card=card)
    convert(source, tmp_path / "d", "diffusers")
    convert(tmp_path / "d", tmp_path / "again", "single")
    again = checkpoint.read_config(tmp_path / "again")["card"]
    assert again == card or {k: v for k, v in again.items() if k != "published"} == (card or {})
    assert checkpoint.load_model(tmp_path / "again").config == vae.config


def test_what_has_no_official_form(pipe, official, tmp_path, monkeypatch):
    velocity = checkpoint.save_model(tmp_path / "loo", pipe.velocity)
    refuse(
        lambda: convert(velocity, tmp_path / "o", "official"), "found a LooUFormer; convert it to diffusers or single"
    )
    ours = convert(official, tmp_path / "ours", "single") and tmp_path / "ours"
    config = json.loads((ours / "config.json").read_text())
    config["settings"]["posterior_mean_range"] = [-1, 1]
    (ours / "config.json").write_text(json.dumps(config))
    refuse(lambda: convert(ours, tmp_path / "o", "official"), "expected a posterior mean in [0, 1]", "found [-1, 1]")
    config["settings"].pop("posterior_mean_range")
    (ours / "config.json").write_text(json.dumps(config))
    monkeypatch.delitem(published.ARCHITECTURES, "hdit_small")
    refuse(lambda: convert(ours, tmp_path / "o", "official"), "velocity: expected one of the networks", "found a HDiT")
    assert not (tmp_path / "o").exists()


def test_nothing_is_overwritten_and_nothing_half_written(official, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_text("mine")
    for target in (tmp_path / "full", official, official / "config.json"):
        refuse(lambda target=target: convert(official, target, "single"), str(target), "exists, and is not overwritten")
    (tmp_path / "empty").mkdir()
    convert(official, tmp_path / "empty", "single")
    before = files(tmp_path)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full_disk)
    for form in ("official", "diffusers", "single"):
        refuse(lambda form=form: convert(official, tmp_path / "new" / "x", form), "cannot be written")
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="one of official, diffusers, single, got 'onnx'"):
        convert(official, tmp_path / "x", "onnx")
