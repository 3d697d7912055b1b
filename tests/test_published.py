"""Published checkpoints in files of exactly their layouts: told by their content, read whole or refused in a line."""

import json
import math
import pickle
import struct

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from lpmrf_fast import checkpoint, cli, models, published
from lpmrf_fast.checkpoint import CheckpointError
from lpmrf_fast.pipeline import Pipeline, PMRFPipeline

# The config.json of the official hub class: the arguments of its constructor.
HYPERPARAMETERS = {
    "arch": "hdit_ImageNet256Sp4",
    "betas": [0.9, 0.95],
    "colorization": False,
    "conditional": False,
    "ema_decay": 0.9999,
    "eps": 0.0,
    "lr": 0.0005,
    "mmse_model_arch": "swinir_L",
    "mmse_model_ckpt_path": None,
    "mmse_noise_std": 0.1,
    "num_flow_steps": 50,
    "stage": "flow",
    "t_schedule": "stratified_uniform",
    "weight_decay": 0.01,
}
METRICS = {
    "fid.inception.Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "fid.real_features_sum": (2048,),
    "inception_score.inception.fc.weight": (1008, 2048),
}
NAMES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}


def refuse(action, *parts):
    """`action` raises CheckpointError: one line, less than a screen, that names all the parts."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    assert all(part in message for part in parts), message


def shapes(preset, prefix="", **changes):
    """Names, shapes and dtypes of a full-size network."""
    with torch.device("meta"):
        state = models.build(preset, **changes).state_dict()
    return {prefix + name: (tuple(t.shape), t.dtype) for name, t in state.items()}


PMRF_SHAPES = {
    **shapes("hdit-imagenet256sp4", "model."),
    **shapes("swinir-l", "mmse_model."),
    **{name: (shape, torch.float32) for name, shape in METRICS.items()},
}


def hollow(path, tensors):
    """A safetensors file of any size that takes no room on disk: a header, and a hole that reads as zeros."""
    header, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def hollow_tensors(tensors):
    """Tensors of any size out of one stored element each."""
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in tensors.items()}


def folder(path, config, **weights):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name, tensors in weights.items():
        save_file({k: t.contiguous() for k, t in tensors.items()}, path / f"{name}.safetensors")
    return path


@pytest.fixture
def small(golden, monkeypatch):
    """The golden PMRF pipeline, its networks known by the names hdit_small and swinir_small: (fixture, config)."""
    fixture = golden("pmrf_pipeline")
    for name, cls, part in (("hdit", models.HDiT, "model"), ("swinir", models.SwinIR, "mmse_model")):
        monkeypatch.setitem(models.PRESETS, f"{name}-small", (cls, fixture.config[part]))
        monkeypatch.setitem(published.ARCHITECTURES, f"{name}_small", f"{name}-small")
    return fixture, {**HYPERPARAMETERS, "arch": "hdit_small", "mmse_model_arch": "swinir_small"}


@pytest.fixture
def official(small, tmp_path):
    """The hub folder of `small`, metric modules included."""
    fixture, config = small
    metrics = {name: torch.ones(shape) for name, shape in METRICS.items()}
    return folder(tmp_path / "PMRF", config, model={**fixture.state, **metrics})


def restores_the_golden_image(pipe, fixture):
    result = pipe(fixture.inputs["y"], 5, noise=fixture.inputs["noise"], output_type="pt")
    fixture.assert_close(result.images, "image")
    fixture.assert_close(result.posterior_means, "x_posterior_mean")


# ---- PMRF


def test_hub_folder(small, official):
    fixture, config = small
    for cls in (Pipeline, PMRFPipeline):
        pipe = cls.from_pretrained(official, dtype="fp32", device="cpu")
        assert type(pipe) is PMRFPipeline and (pipe.noise_std, pipe.eps) == (0.1, 0.0)
        restores_the_golden_image(pipe, fixture)
    assert pipe.card["published"] == config
    text = checkpoint.describe(official)
    assert "PMRF checkpoint" in text and "ignored: 3 tensors of metric modules (fid, inception_score)" in text
    counts = [sum(name.startswith(prefix) for name in fixture.state) for prefix in ("model.", "mmse_model.")]
    assert f"HDiT, {counts[0]} tensors" in text and f"SwinIR, {counts[1]} tensors" in text
    assert "noise_std 0.1, eps 0.0" in text


def test_the_commands_take_it_like_any_other(small, official, tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("cv2")
    device = ["--device", "cpu", "--dtype", "fp32", "--steps", "1", "--model", str(official)]
    PIL.Image.linear_gradient("L").resize((70, 50)).convert("RGB").save(tmp_path / "photo.png")
    assert cli.main(["restore", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out"), *device]) == 0
    with PIL.Image.open(tmp_path / "out" / "photo.png") as restored:
        assert restored.size == (70, 50)
    assert cli.main(["demo", "-o", str(tmp_path / "demo.png"), *device]) == 0
    assert (tmp_path / "demo.png").exists() and "1 steps" in capsys.readouterr().out


def test_noise_and_eps_of_the_config(small, tmp_path):
    fixture, config = small
    path = folder(tmp_path / "x", {**config, "mmse_noise_std": 0.025, "eps": 0.25}, model=fixture.state)
    pipe = Pipeline.from_pretrained(path)
    assert (pipe.noise_std, pipe.eps) == (0.025, 0.25)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "weights.bin", "a.ckpt"])
def test_file_names_do_not_matter(small, official, name):
    """Safetensors under any name, with the config or, where the networks have a published size, without."""
    fixture, _ = small
    renamed = (official / "model.safetensors").rename(official / name)
    restores_the_golden_image(Pipeline.from_pretrained(official, dtype="fp32", device="cpu"), fixture)
    restores_the_golden_image(Pipeline.from_pretrained(renamed, dtype="fp32", device="cpu"), fixture)
    assert "no config: the networks are told by their tensors" in checkpoint.describe(renamed)


def lightning(path, fixture, config, **changes):
    """A training checkpoint as Lightning 2.3 and torch-ema 0.3 write it: the last weights are not the EMA's."""
    state = {k: t + 1 if k.startswith("model.") and t.is_floating_point() else t for k, t in fixture.state.items()}
    order = [f"model.{name}" for name, _ in models.HDiT(**fixture.config["model"]).named_parameters()]
    buffers = {k: t for k, t in fixture.state.items() if k.startswith("model.") and k not in order}
    content = {
        "epoch": 3849,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "2.3.3",
        "state_dict": {**state, **buffers, "fid.real_features_sum": torch.zeros(2048)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3850}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "dirpath": "/data"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(3)}}}],
        "lr_schedulers": [],
        "MixedPrecision": {},
        "hparams_name": "kwargs",
        "hyper_parameters": {**config, "betas": (0.9, 0.95), "mmse_model_ckpt_path": "/data/swinir.pth"},
        "ema": {
            "decay": 0.9999,
            "num_updates": 1_000_000,
            "shadow_params": [fixture.state[name] for name in order],
            "collected_params": None,
        },
        **changes,
    }
    torch.save(content, path)
    return path


def test_training_checkpoint(small, tmp_path):
    fixture, config = small
    path = lightning(tmp_path / "epoch=3849.ckpt", fixture, config)
    restores_the_golden_image(Pipeline.from_pretrained(path, dtype="fp32", device="cpu"), fixture)
    text = checkpoint.describe(path)
    assert "PMRF training checkpoint (Lightning)" in text and "weights: the EMA's, 37 tensors, decay 0.9999" in text


def test_training_checkpoint_with_a_bare_list(small, tmp_path):
    fixture, config = small
    order = [f"model.{name}" for name, _ in models.HDiT(**fixture.config["model"]).named_parameters()]
    path = lightning(tmp_path / "x.ckpt", fixture, config, ema=[fixture.state[name] for name in order])
    restores_the_golden_image(Pipeline.from_pretrained(path, dtype="fp32", device="cpu"), fixture)


def test_training_checkpoint_without_ema(small, tmp_path):
    """Trained with ema_decay -1: the last weights count."""
    fixture, config = small
    path = lightning(tmp_path / "x.ckpt", fixture, config, ema=None, state_dict=fixture.state)
    restores_the_golden_image(Pipeline.from_pretrained(path, dtype="fp32", device="cpu"), fixture)
    assert "EMA" not in checkpoint.describe(path)


def test_posterior_mean_training_checkpoint(small, golden, tmp_path):
    """Stage mmse: one SwinIR under `model.`, its EMA in parameter order."""
    fixture = small[0]
    network = fixture.network(models.SwinIR, "mmse_model")
    content = {
        "state_dict": {f"model.{k}": t + t.is_floating_point() for k, t in network.state_dict().items()},
        "ema": {"shadow_params": [p.detach() for p in network.parameters()]},
        "hyper_parameters": {"stage": "mmse", "arch": "swinir_small"},
    }
    content["state_dict"] |= {k: t for k, t in content["state_dict"].items() if "attn_mask" in k}
    torch.save(content, tmp_path / "mmse.ckpt")
    again = checkpoint.load_model(tmp_path / "mmse.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters()))


PMRF_FAULTS = {
    "conditional": (dict(conditional=True), ("found a conditional flow",)),
    "naive flow": (dict(stage="naive_flow"), ("stage 'flow'", "found stage 'naive_flow'")),
    "unknown size": (dict(arch="hdit_XXL"), ("hdit_ImageNet256Sp4, hdit_XL2", "found 'hdit_XXL' in the config")),
    "no HDiT": (dict(arch="swinir_L"), ("expected one of the networks hdit_", "found 'swinir_L'")),
    "another size": (
        dict(arch="hdit_XL2"),
        ("weights do not fit the config: expected", "velocity.patch_in.proj.weight", "(16, 48) in place of (384, 48)"),
    ),
}


@pytest.mark.parametrize("name", PMRF_FAULTS)
def test_configs_that_contradict(small, tmp_path, name):
    fixture, config = small
    change, parts = PMRF_FAULTS[name]
    if name == "another size":  # of which one tensor is looked at
        parts = parts[:1] + ("missing", "of another shape")
    path = folder(tmp_path / "x", {**config, **change}, model=fixture.state)
    refuse(lambda: Pipeline.from_pretrained(path), str(path), *parts)


def test_missing_renamed_and_misshapen_tensors(small, tmp_path):
    fixture, config = small

    def attempt(change, *parts):
        state = dict(fixture.state)
        change(state)
        path = folder(tmp_path / str(len(list(tmp_path.iterdir()))), config, model=state)
        refuse(lambda: Pipeline.from_pretrained(path), str(path), *parts)

    key = "model.mid_level.0.ff.up_proj.weight"
    attempt(lambda s: s.pop(key), "1 missing (velocity.mid_level.0.ff.up_proj.weight)", "found")
    attempt(
        lambda s: s.update({"model.mid_level.0.ff.up.weight": s.pop(key)}),
        "1 missing (velocity.mid_level.0.ff.up_proj.weight)",
        "1 unexpected (velocity.mid_level.0.ff.up.weight)",
    )
    attempt(lambda s: s.update({key: s[key].T}), "(32, 192) in place of (192, 32)")
    attempt(lambda s: s.update(other=torch.zeros(1)), "expected a PMRF checkpoint, tensors model.* and mmse_model.*")
    attempt(lambda s: [s.pop(k) for k in list(s) if k.startswith("model.")], "expected a PMRF checkpoint")
    attempt(
        lambda s: [s.pop(k) for k in list(s) if k.startswith("mmse")], "found no mmse_model.*; fetch the whole file"
    )
    attempt(lambda s: s.clear(), "found no tensors")


@pytest.mark.parametrize(
    "ema, parts",
    [
        ({"shadow_params": [torch.zeros(2)]}, ("expected 37 tensors in the order", "found 1", "(2,)")),
        ({"shadow_params": None}, ("expected a list of tensors", "found NoneType")),
        ([1, 2], ("expected a list of tensors",)),
    ],
)
def test_ema_that_does_not_fit(small, tmp_path, ema, parts):
    fixture, config = small
    path = lightning(tmp_path / "x.ckpt", fixture, config, ema=ema)
    refuse(lambda: Pipeline.from_pretrained(path), "ema: ", *parts)


class Attributes(dict):
    """What a training script may pickle in place of a plain dictionary."""


def test_a_pickle_of_more_than_tensors_is_refused_with_the_way_out(small, tmp_path):
    fixture, config = small
    path = lightning(tmp_path / "x.ckpt", fixture, config, hyper_parameters=Attributes(config))
    refuse(
        lambda: Pipeline.from_pretrained(path),
        "refused: expected plain tensors; it asks for",
        "Attributes",
        "where you trust it, convert it once",
        "safetensors.torch.save_file",
    )


def test_half_a_file(small, official, tmp_path):
    fixture, config = small
    ckpt = lightning(tmp_path / "x.ckpt", fixture, config)
    for path in (official / "model.safetensors", ckpt):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        refuse(lambda path=path: Pipeline.from_pretrained(path), str(path), "damaged", "fetch")


# ---- full size


def test_full_size_hub_folder(tmp_path):
    path = folder(tmp_path / "PMRF_blind_face_image_restoration", HYPERPARAMETERS)
    hollow(path / "model.safetensors", PMRF_SHAPES)
    found = checkpoint.read(path)
    assert len(found.tensors) == len(PMRF_SHAPES) - len(METRICS)
    assert sum(t.numel() for k, t in found.tensors.items() if k.startswith("velocity.")) == 160_465_458
    text = checkpoint.describe(path)
    assert "velocity        HDiT, " in text and "160.5 M values, float32" in text
    assert "15.8 M values" in text
    # The published configuration, spelled out.
    shape = {name: tuple(t.shape) for name, t in found.tensors.items()}
    assert shape["velocity.patch_in.proj.weight"] == (256, 48)
    assert shape["velocity.merges.1.proj.weight"] == (1024, 2048)
    assert shape["velocity.mid_level.7.self_attn.pos_emb.freqs"] == (16, 8)
    assert "velocity.mid_level.8.self_attn.scale" not in shape and "velocity.up_levels.1.1.self_attn.scale" in shape
    assert shape["velocity.mapping.blocks.1.up_proj.weight"] == (4608, 768)
    assert shape["posterior_mean.layers.7.residual_group.blocks.5.attn.qkv.weight"] == (540, 180)
    assert shape["posterior_mean.layers.0.residual_group.blocks.1.attn_mask"] == (64, 64, 64)
    assert found.config["modules"]["velocity"]["config"]["self_attns"][1]["kernel_size"] == 7
    # The same file alone, and the controlled experiments' size told by its tensors.
    assert (
        checkpoint.read(path / "model.safetensors").config["modules"]["velocity"] == found.config["modules"]["velocity"]
    )
    other = {**shapes("hdit-xl2", "model."), **shapes("swinir-m", "mmse_model.")}
    modules = checkpoint.read(hollow(tmp_path / "x.safetensors", other)).config["modules"]
    assert modules["velocity"]["config"]["depths"] == [2, 11]
    assert modules["posterior_mean"]["config"]["embed_dim"] == 120


def test_full_size_training_checkpoint(tmp_path):
    with torch.device("meta"):
        ema = [torch.zeros(()).expand(p.shape) for p in models.build("hdit-imagenet256sp4").parameters()]
    ema = [torch.zeros(()).expand(p.shape) for p in ema]
    hyper = {**HYPERPARAMETERS, "betas": (0.9, 0.95)}
    content = {"state_dict": hollow_tensors(PMRF_SHAPES), "ema": {"shadow_params": ema, "decay": 0.9999}}
    torch.save({**content, "hyper_parameters": hyper, "epoch": 3849}, tmp_path / "blind_face_restoration_pmrf.ckpt")
    text = checkpoint.describe(tmp_path / "blind_face_restoration_pmrf.ckpt")
    assert f"weights: the EMA's, {len(ema)} tensors, decay 0.9999" in text and "160.5 M values" in text
    del content["state_dict"]["model.mid_level.7.ff.norm.linear.weight"]
    torch.save({**content, "hyper_parameters": hyper}, tmp_path / "less.ckpt")
    refuse(
        lambda: checkpoint.describe(tmp_path / "less.ckpt"),
        "1 missing (velocity.mid_level.7.ff.norm.linear.weight)",
    )


@pytest.mark.parametrize("channels", [16, 32])
def test_full_size_sim_vae(tmp_path, channels):
    config = {
        "_class_name": "AutoencoderKLSim",
        "_diffusers_version": "0.32.2",
        **models.PRESETS[f"sim-vae-c{channels}"][1],
    }
    path = folder(tmp_path / f"Sim-VAE-c{channels}", config)
    tensors = shapes(f"sim-vae-c{channels}")
    hollow(path / "diffusion_pytorch_model.safetensors", tensors)
    found = checkpoint.read(path)
    assert found.config["class"] == "SimVAE" and len(found.tensors) == len(tensors)
    assert tuple(found.tensors["encoder.conv_out.weight"].shape) == (2 * channels, 512, 3, 3)
    assert "AutoencoderKLSim in the diffusers layout" in checkpoint.describe(path)
    # Without its config, and with the other one's.
    (path / "config.json").unlink()
    assert checkpoint.read(path).config["config"]["latent_channels"] == channels
    (path / "config.json").write_text(json.dumps({**config, "latent_channels": 48 - channels}))
    refuse(
        lambda: checkpoint.load_model(path),
        "weights do not fit the config",
        f"encoder.conv_out.weight ({2 * channels}, 512, 3, 3) in place of ({96 - 2 * channels}, 512, 3, 3)",
    )


def test_full_size_swinir_of_difface(tmp_path):
    torch.save(hollow_tensors(shapes("swinir-l")), tmp_path / "swinir_restoration512_L1.pth")
    found = checkpoint.read(tmp_path / "swinir_restoration512_L1.pth")
    with torch.device("meta"):
        assert models.SwinIR(**found.config["config"]).config == models.build("swinir-l").config
    assert "no config: the network is told by its tensors" in checkpoint.describe(
        tmp_path / "swinir_restoration512_L1.pth"
    )


# ---- DifFace's SwinIR


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.module.", "_orig_mod."])
def test_swinir_state_dict(golden, tmp_path, wrapper, prefix):
    fixture = golden("swinir")
    state = {prefix + name: tensor for name, tensor in fixture.state.items()}
    content = state if wrapper is None else {wrapper: state}
    if wrapper == "params_ema":
        content["params"] = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "anything.dat.pth"
    torch.save(content, path)
    network = checkpoint.load_model(path)
    assert network.config == models.SwinIR(**fixture.config).config
    assert all(torch.equal(t, fixture.state[name]) for name, t in network.state_dict().items())
    refuse(lambda: Pipeline.from_pretrained(path), "a single model (SwinIR), not a pipeline")


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(sf=3, upsampler="pixelshuffle"),
        dict(sf=4, upsampler="pixelshuffle"),
        dict(sf=4, upsampler="pixelshuffledirect", unshuffle=True, unshuffle_scale=4, ape=True),
        dict(upsampler="", sf=1, resi_connection="3conv", qkv_bias=False),
        dict(in_chans=1, num_out_ch=1, patch_norm=False, mlp_ratio=2.5, depths=[1, 2], num_heads=[2, 4]),
        dict(window_size=5, img_size=20),
    ],
)
def test_a_swinir_is_told_by_its_tensors(tmp_path, options):
    defaults = dict(img_size=16, embed_dim=16, depths=[2], num_heads=[2], window_size=4, mlp_ratio=2)
    network = models.SwinIR(**{**defaults, "sf": 2, "upsampler": "nearest+conv", **options})
    save_file({k: t.contiguous() for k, t in network.state_dict().items()}, tmp_path / "x.safetensors")
    again = checkpoint.load_model(tmp_path / "x.safetensors")
    assert again.config == network.config


def test_part_of_a_swinir(golden, tmp_path):
    state = dict(golden("swinir").state)
    del state["conv_last.weight"]
    save_file(state, tmp_path / "x.safetensors")
    refuse(
        lambda: checkpoint.load_model(tmp_path / "x.safetensors"), "no usable 'conv_last.weight'; fetch the whole file"
    )


# ---- shards


@pytest.fixture
def sharded(golden, tmp_path):
    """The golden Sim-VAE in two shards with an index, as diffusers writes large models."""
    fixture = golden("sim_vae_layer_norm")
    path = folder(tmp_path / "vae", {"_class_name": "AutoencoderKLSim", **fixture.config})
    names = sorted(fixture.state)
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({name: fixture.state[name] for name in own}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards(golden, sharded):
    state = checkpoint.load_model(sharded).state_dict()
    assert all(torch.equal(t, golden("sim_vae_layer_norm").state[name]) for name, t in state.items())


def test_half_a_shard(sharded):
    second = sharded / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refuse(lambda: checkpoint.load_model(sharded), second.name, "damaged safetensors file", "fetch")
    tensors = {}
    save_file(tensors, second)
    refuse(lambda: checkpoint.load_model(sharded), "tensors of its weight_map", "fetch the shards again")
    second.unlink()
    refuse(lambda: checkpoint.load_model(sharded), "expected 2 shards, found 1 of them", f"fetch {second.name}")
    first = sharded / "diffusion_pytorch_model-00001-of-00002.safetensors"
    refuse(lambda: checkpoint.load_model(first), "found one shard of them; give the folder")


def test_an_index_stays_in_its_folder(sharded):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    refuse(lambda: checkpoint.load_model(sharded), "expected a weight_map")


# ---- other projects


@pytest.mark.parametrize(
    "name, looks",
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("input_blocks.0.0.weight", "DifFace"),
        ("stylegan_decoder.style_mlp.1.weight", "GFPGAN"),
        ("quantize.embedding.weight", "CodeFormer"),
        ("body.0.rdb1.conv1.weight", "Real-ESRGAN"),
        ("backbone.layer1.weight", "expected a checkpoint of lpmrf-fast, PMRF, Sim-VAE or SwinIR"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_checkpoints_of_other_projects(tmp_path, name, looks, suffix):
    path = tmp_path / f"model.{suffix}"
    tensors = {name: torch.zeros(2, 2), name.replace("weight", "bias"): torch.zeros(2)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save({"params_ema": tensors}, path)
    for action in (checkpoint.load, checkpoint.load_model, checkpoint.describe, Pipeline.from_pretrained):
        refuse(lambda action=action: action(path), str(path), "found 2 tensors", name.rsplit(".", 1)[0], looks)


def test_pipelines_of_other_projects(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"], "x": [1, 2]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refuse(lambda: Pipeline.from_pretrained(tmp_path), "found a StableDiffusionPipeline with vae from diffusers")


@pytest.mark.parametrize("config", [{"_class_name": ["AutoencoderKLSim"]}, {"stage": [], "arch": {}}, {"arch": [1]}])
def test_nonsense_configs(small, tmp_path, config):
    path = folder(tmp_path / "x", config, model=small[0].state)
    refuse(lambda: Pipeline.from_pretrained(path), str(path))


def test_several_files_of_weights_and_no_usual_name(small, official):
    (official / "model.safetensors").rename(official / "a.safetensors")
    (official / "b.ckpt").write_bytes(b"")
    refuse(lambda: Pipeline.from_pretrained(official), "found a.safetensors, b.ckpt, name the one you mean")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02", b"\x80\x04\x95", pickle.dumps([1])])
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.pth"])
def test_stumps(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuse(lambda: checkpoint.load_model(tmp_path / name), name)


def test_a_training_run_of_ours_names_its_keys(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "optimizer": {}, "step": 3}, tmp_path / "last.pt")
    refuse(
        lambda: checkpoint.load_model(tmp_path / "last.pt"), "other than named tensors", "keys model, optimizer, step"
    )


def test_nothing_is_half_loaded(golden, tmp_path):
    network = golden("swinir").network(models.SwinIR)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["conv_last.bias"]
    save_file(state, tmp_path / "x.safetensors")
    refuse(lambda: checkpoint.load_weights(network, tmp_path / "x.safetensors"), "1 missing (conv_last.bias)")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_config_of_any_size_is_compared_before_it_takes_memory(tmp_path, golden):
    """A network of a trillion values is never made."""
    fixture = golden("sim_vae_layer_norm")
    config = {**fixture.config, "latent_channels": 10**9}
    path = folder(tmp_path / "x", {"_class_name": "AutoencoderKLSim", **config})
    save_file(fixture.state, path / "diffusion_pytorch_model.safetensors")
    refuse(lambda: checkpoint.load_model(path), "weights do not fit the config", "of another shape")
    assert load_file(path / "diffusion_pytorch_model.safetensors")
