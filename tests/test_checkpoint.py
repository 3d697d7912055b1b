"""Checkpoints: what is written comes back, ours and the diffusers layout; what is broken says so in a line."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpmrf_fast import checkpoint, models
from lpmrf_fast.checkpoint import CheckpointError
from lpmrf_fast.pipeline import LatentPMRFPipeline, Pipeline, PMRFPipeline


@pytest.fixture
def saved(pipe, tmp_path):
    """The folder of the golden pipeline."""
    return pipe.save_pretrained(tmp_path / "saved")


@pytest.fixture
def image():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


def refuse(action, *parts):
    """`action` raises CheckpointError in one line that names all the parts."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- round trips


def test_a_saved_pipeline_restores_the_same_pixels(pipe, saved, image):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    expected = pipe(image, 2, output_type="pt").images
    for path in (saved, str(saved), saved / "model.safetensors"):
        for cls in (LatentPMRFPipeline, Pipeline):
            again = cls.from_pretrained(path, dtype="fp32", device="cpu")
            assert type(again) is LatentPMRFPipeline
            assert torch.equal(again(image, 2, output_type="pt").images, expected)


def test_the_file_explains_itself(pipe, tmp_path):
    """Settings, constructor arguments and card, from the folder and from the single file."""
    other = LatentPMRFPipeline(
        pipe.posterior_mean, pipe.vae, pipe.velocity, 0.25, 0.5, 2.0, posterior_mean_range=(-1, 1)
    )
    folder = other.save_pretrained(tmp_path / "new" / "folder", card={"data": "faces", "steps": 12})
    alone = shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    for path in (folder, alone):
        config = checkpoint.read_config(path)
        assert config["format_version"] == 1 and config["pipeline"] == "LatentPMRFPipeline"
        again = Pipeline.from_pretrained(path, dtype=None, device="cpu")
        for name in LatentPMRFPipeline.settings:
            assert getattr(again, name) == getattr(other, name) == config["settings"][name]
        for name, network in other.modules.items():
            assert config["modules"][name] == {"class": type(network).__name__, "config": network.config}
        assert again.card == config["card"] == {"data": "faces", "steps": 12}
    # The card stays with the pipeline.
    assert checkpoint.read_config(again.save_pretrained(tmp_path / "third"))["card"]["steps"] == 12
    (folder / "config.json").unlink()
    assert Pipeline.from_pretrained(folder).noise_std == 0.25


def test_pmrf(pipe, tmp_path, randomized, image):
    velocity = randomized(models.LooUFormer(**{**pipe.velocity.config, "in_channels": 3, "out_channels": 3}))
    pixels = PMRFPipeline(pipe.posterior_mean, velocity, noise_std=0.05, eps=0.25)
    folder = pixels.save_pretrained(tmp_path)
    again = PMRFPipeline.from_pretrained(folder, dtype="fp32", device="cpu")
    assert (again.noise_std, again.eps) == (0.05, 0.25)
    assert torch.equal(again(image, 2, output_type="pt").images, pixels(image, 2, output_type="pt").images)
    refuse(lambda: LatentPMRFPipeline.from_pretrained(folder), "checkpoint of PMRFPipeline; use that class or Pipeline")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(pipe, tmp_path, dtype):
    full, half = (pipe.save_pretrained(tmp_path / str(d), dtype=d) for d in (None, dtype))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.65 * sizes[0]
    again = Pipeline.from_pretrained(half, dtype=None, device="cpu")
    for name, network in pipe.modules.items():
        twin = getattr(again, name)
        for (key, a), b in zip(network.named_parameters(), twin.parameters()):
            assert b.dtype == torch.float32 and torch.equal(a.to(dtype).float(), b), key
        # Frequencies keep all their digits.
        for (key, a), b in zip(network.named_buffers(), twin.buffers()):
            assert torch.equal(a, b), key
    assert pipe.state_dtype == torch.float32 and next(pipe.vae.parameters()).dtype == torch.float32
    cast = Pipeline.from_pretrained(half, dtype="bf16", device="cpu")
    assert {p.dtype for m in cast.modules.values() for p in m.parameters()} == {torch.bfloat16}


def test_auto_dtype_of_a_loaded_pipeline(saved, monkeypatch):
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported, raising=False)
        assert next(Pipeline.from_pretrained(saved, device="cpu").velocity.parameters()).dtype == expected


def test_float64_stays_float64(pipe, tmp_path):
    folder = pipe.to(dtype=torch.float64).save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(folder, dtype=None, device="cpu")
    assert again.state_dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), again.vae.parameters()))


def test_overflow_is_refused(pipe, tmp_path):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(1e6)
    refuse(lambda: pipe.save_pretrained(tmp_path, dtype="fp16"), "vae.decoder.conv_out.bias overflows torch.float16")
    assert not list(tmp_path.iterdir())


def test_masks_are_recomputed_not_stored(pipe, saved):
    stored = load_file(saved / "model.safetensors")
    buffers = {f"posterior_mean.{name}" for name, _ in pipe.posterior_mean.named_buffers()} - {"posterior_mean.mean"}
    assert buffers and not buffers & stored.keys()
    again = Pipeline.from_pretrained(saved, dtype=None).posterior_mean
    assert all(torch.equal(a, b) for a, b in zip(pipe.posterior_mean.buffers(), again.buffers()))
    # A published file has them: they are accepted, in their shape.
    state = pipe.posterior_mean.state_dict()
    path = saved / "swinir.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    checkpoint.load_weights(again, path)
    name = next(k for k in state if k.endswith("attn_mask"))
    save_file({k: v.contiguous() for k, v in state.items()} | {name: torch.zeros(1, 2)}, path)
    refuse(lambda: checkpoint.load_weights(again, path), "1 of another shape", f"{name} (1, 2) in place of")


# ---- single models


def test_one_model(golden, tmp_path):
    network = golden("swinir").network(models.SwinIR)
    folder = checkpoint.save_model(tmp_path / "swinir", network, card={"psnr": 24.5})
    for path in (folder, folder / "model.safetensors"):
        again = checkpoint.load_model(path)
        assert type(again) is models.SwinIR and again.config == network.config and not again.training
        assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    assert checkpoint.read_config(folder)["card"] == {"psnr": 24.5}
    refuse(lambda: Pipeline.from_pretrained(folder), "a single model (SwinIR), not a pipeline")


def test_a_pipeline_is_not_one_model(saved):
    refuse(lambda: checkpoint.load_model(saved), "a whole LatentPMRFPipeline, not a single model")


@pytest.mark.parametrize("name", ["sim_vae_layer_norm", "sim_vae_group_norm"])
@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_official_sim_vae_folder(golden, tmp_path, name, weights):
    fixture = golden(name)
    config = {"_class_name": "AutoencoderKLSim", "_diffusers_version": "0.32.0", **fixture.config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save = torch.save if weights.endswith("bin") else save_file
    save(fixture.state, tmp_path / weights)
    vae = checkpoint.load_model(tmp_path)
    assert type(vae) is models.SimVAE and not vae.training
    with torch.no_grad():
        fixture.assert_close(vae.encode(fixture.inputs["x"]), "moments")
        fixture.assert_close(vae.decode(fixture.inputs["z"]), "decoded_z")


@pytest.mark.parametrize("old", [False, True])
def test_published_autoencoder_kl_folder(golden, tmp_path, old):
    """As diffusers writes it, and with the names that older files have for the attention's layers."""
    fixture = golden("sd_vae")
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", **fixture.config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, tensor in fixture.state.items():
        for now, then in before.items() if old else ():
            name = name.replace(now, then)
        state[name] = tensor
    assert (state.keys() == fixture.state.keys()) != old
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    vae = checkpoint.load_model(tmp_path)
    assert type(vae) is models.AutoencoderKL and vae.config["scaling_factor"] == 0.18215
    assert vae.state_dict().keys() == fixture.state.keys()
    with torch.no_grad():
        fixture.assert_close(vae.encode(fixture.inputs["x"]), "moments")
        fixture.assert_close(vae.decode(fixture.inputs["z"]), "decoded_z")


def test_pickles_of_tensors(golden, tmp_path):
    fixture = golden("sim_vae_layer_norm")
    for content in (fixture.state, {"state_dict": fixture.state, "epoch": 3}):
        torch.save(content, tmp_path / "weights.pth")
        vae = models.SimVAE(**fixture.config)
        checkpoint.load_weights(vae, tmp_path / "weights.pth")
        assert all(torch.equal(v, fixture.state[k]) for k, v in vae.state_dict().items())


def test_load_weights_keeps_the_networks_dtype(golden, tmp_path):
    fixture = golden("sim_vae_layer_norm")
    save_file({k: v.double() for k, v in fixture.state.items()}, tmp_path / "w.safetensors")
    vae = models.SimVAE(**fixture.config).to(torch.bfloat16)
    checkpoint.load_weights(vae, tmp_path / "w.safetensors")
    for key, value in vae.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, fixture.state[key].bfloat16())


class Payload:
    """Pickled, it would run code; a file made by it records whether it did."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("mark", [b"\x80\x02", b"\x80\x04", b"PK"], ids=["pickle 2", "pickle 4", "zip"])
def test_a_header_whose_length_looks_like_a_pickles_mark(tmp_path, mark):
    """Its length is the first thing in a safetensors file: any two bytes, and never a zip's four."""
    path, tensors = tmp_path / "w.safetensors", {"x": torch.arange(5.0)}
    wanted = int.from_bytes(mark, "little") + (0x10000 if mark == b"PK" else 0)
    save_file(tensors, path, {"pad": ""})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length] + b" " * (wanted - length)
    path.write_bytes(wanted.to_bytes(8, "little") + header + whole[8 + length :])
    assert path.read_bytes()[:2] == mark
    assert torch.equal(checkpoint.read_weights(path)["x"], tensors["x"])


def test_pickles_never_run_code(golden, tmp_path):
    vae = golden("sim_vae_layer_norm").network(models.SimVAE)
    evidence = tmp_path / "evidence"
    torch.save({"state_dict": Payload(evidence)}, tmp_path / "bad.pth")
    (tmp_path / "worse.bin").write_bytes(pickle.dumps(Payload(evidence), protocol=2))
    for path in (tmp_path / "bad.pth", tmp_path / "worse.bin"):
        refuse(
            lambda path=path: checkpoint.load_weights(vae, path), path.name, "refused", "save_file(model.state_dict()"
        )
    assert not evidence.exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    refuse(lambda: checkpoint.load_weights(vae, tmp_path / "list.pt"), "other than named tensors")
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:300])
    refuse(lambda: checkpoint.load_weights(vae, tmp_path / "cut.pt"), "cut.pt", "damaged")


# ---- wrong weights, wrong configs


def test_mismatches_are_counted_and_named(saved):
    encoder = [k for k in load_file(saved / "model.safetensors") if k.startswith("vae.encoder")]

    def spoil(tensors):
        for key in encoder:
            del tensors[key]
        tensors["velocity.extra.weight"] = torch.zeros(2)
        tensors["vae.decoder.conv_out.bias"] = torch.zeros(7)

    config = (saved / "config.json").read_text()
    edit_weights(saved, spoil)
    assert (saved / "config.json").read_text() == config
    refuse(
        lambda: Pipeline.from_pretrained(saved),
        f"{len(encoder)} missing ({', '.join(sorted(encoder)[:3])}, ...)",
        "1 unexpected (velocity.extra.weight)",
        "1 of another shape (vae.decoder.conv_out.bias (7,) in place of (3,))",
    )


CONFIG_FAULTS = {
    "another width": (
        lambda c: c["modules"]["vae"]["config"].update(block_out_channels=[8] * 4, mid_block_out_channel=8),
        ("weights do not fit the config", "of another shape"),
    ),
    "another depth": (
        lambda c: c["modules"]["velocity"]["config"].update(block_layers=[2, 1]),
        ("weights do not fit the config", "missing (velocity."),
    ),
    "unknown option": (
        lambda c: c["modules"]["vae"]["config"].update(norm_kind=1),
        ("vae: SimVAE cannot be built", "no option 'norm_kind'"),
    ),
    "impossible option": (
        lambda c: c["modules"]["velocity"]["config"].update(head_dims=[12, 16]),
        ("velocity: LooUFormer cannot be built", "head_dim 12"),
    ),
    "nonsense option": (
        lambda c: c["modules"]["velocity"]["config"].update(block_dims={"a": []}),
        ("velocity: LooUFormer cannot be built",),
    ),
    "unknown class": (
        lambda c: c["modules"]["vae"].update({"class": "os.system"}),
        ("vae: unknown network class 'os.system'; there are SimVAE, AutoencoderKL, SwinIR, LooUFormer",),
    ),
    "class of another kind": (
        lambda c: c["modules"]["vae"].update({"class": ["SimVAE"]}),
        ("vae: unknown network class",),
    ),
    "no config": (lambda c: c["modules"]["vae"].pop("config"), ('needs "class" and "config"',)),
    "no modules": (lambda c: c.pop("modules"), ('needs "modules" and "settings"',)),
    "modules of another kind": (lambda c: c.update(modules=[1]), ('needs "modules" and "settings"',)),
    "impossible name": (
        lambda c: c["modules"].update({"vae.encoder": c["modules"]["vae"]}),
        ("vae.encoder", "cannot name a network"),
    ),
    "unknown setting": (lambda c: c["settings"].update(sigma=1), ("settings that do not fit", "sigma")),
    "bad setting": (lambda c: c["settings"].update(noise_std=-1), ("settings that do not fit", "noise_std")),
    "unknown pipeline": (
        lambda c: c.update(pipeline="Diffusion"),
        ("unknown pipeline 'Diffusion'; there are LatentPMRFPipeline, PMRFPipeline",),
    ),
    "another pipeline": (
        lambda c: c.update(pipeline="PMRFPipeline", settings={}),
        ("a PMRFPipeline has the modules posterior_mean, velocity, got",),
    ),
    "newer format": (lambda c: c.update(format_version=2), ("format version 2, this lpmrf-fast reads 1",)),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_configs_that_contradict(saved, name):
    change, parts = CONFIG_FAULTS[name]
    edit_config(saved, change)
    refuse(lambda: Pipeline.from_pretrained(saved), str(saved), *parts)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "config.json: not valid JSON"),
        (b"{'pipeline': 1}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "must be a JSON object, got a list"),
        (b"{}", "expected a checkpoint of lpmrf-fast, PMRF, Sim-VAE or SwinIR; found"),
    ],
)
def test_damaged_configs(saved, content, part):
    (saved / "config.json").write_bytes(content)
    refuse(lambda: Pipeline.from_pretrained(saved), str(saved), part)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_damaged_weights(saved, keep):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    for source in (saved, path):
        refuse(lambda source=source: Pipeline.from_pretrained(source), "model.safetensors: damaged safetensors file")
    path.write_bytes(b"\xff" * len(content))
    refuse(lambda: Pipeline.from_pretrained(path), "model.safetensors: damaged safetensors file")


def test_files_that_are_missing_or_something_else(saved, tmp_path, golden):
    (saved / "model.safetensors").rename(tmp_path / "moved.safetensors")
    refuse(lambda: Pipeline.from_pretrained(saved), "no weights; expected model.safetensors beside config.json")
    (tmp_path / "empty").mkdir()
    refuse(lambda: Pipeline.from_pretrained(tmp_path / "empty"), "not a checkpoint: no config.json in this folder")
    (tmp_path / "photo.png").write_bytes(b"png")
    refuse(lambda: Pipeline.from_pretrained(tmp_path / "photo.png"), "photo.png: not a checkpoint; give a folder")
    save_file(golden("loouformer_global").state, tmp_path / "bare.safetensors")
    refuse(lambda: checkpoint.load_model(tmp_path / "bare.safetensors"), "bare weights, no config inside")
    refuse(lambda: checkpoint.read_weights(tmp_path / "none.safetensors"), "none.safetensors: cannot be read")
    refuse(lambda: checkpoint.read_weights(tmp_path / "none.pth"), "none.pth: cannot be read")


def test_a_folder_that_cannot_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refuse(lambda: pipe.save_pretrained(tmp_path / "file" / "below"), "cannot be written")


def test_a_network_without_config_cannot_be_saved(tmp_path):
    refuse(lambda: checkpoint.save_model(tmp_path / "x", torch.nn.Linear(1, 1)), "a Linear has no config to save")


def test_saving_over_a_checkpoint_replaces_it_whole(pipe, saved):
    before = load_file(saved / "model.safetensors")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1)
    pipe.save_pretrained(saved)
    after = load_file(saved / "model.safetensors")
    key = "vae.decoder.conv_out.bias"
    torch.testing.assert_close(after[key], before[key] + 1)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


# ---- names


def test_bundled_names(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "weights")
    refuse(lambda: Pipeline.from_pretrained(), "no bundled checkpoint")
    shutil.copytree(saved, tmp_path / "weights" / "demo")
    shutil.copytree(saved, tmp_path / "weights" / "other")
    edit_config(tmp_path / "weights" / "other", lambda c: c["settings"].update(noise_std=0.5))
    assert checkpoint.bundled() == ["demo", "other"]
    assert Pipeline.from_pretrained().noise_std == Pipeline.from_pretrained("demo").noise_std == 0.1
    assert LatentPMRFPipeline.from_pretrained("other").noise_std == 0.5
    refuse(lambda: Pipeline.from_pretrained("third"), "no checkpoint 'third'", "bundled: demo, other")
    # A local folder of the same name wins.
    shutil.copytree(saved, tmp_path / "here" / "other")
    monkeypatch.chdir(tmp_path / "here")
    assert Pipeline.from_pretrained("other").noise_std == 0.1


@pytest.mark.parametrize("name", ["./runs/best", "runs/best.safetensors", "/no/such/folder", "a/b/c", "", "no model"])
def test_paths_that_do_not_exist(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # no name here is looked up
    refuse(lambda: Pipeline.from_pretrained(name, local_files_only=True), "not a folder or file here")


# ---- the Hugging Face hub


@pytest.fixture
def hub_cache(saved, tmp_path, monkeypatch):
    """A cache with one repository, someone/faces, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 39 + "1"
    repository = cache / "models--someone--faces"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return cache


@pytest.mark.parametrize("local_files_only", [True, False])
def test_cached_hub_models_load_offline(hub_cache, local_files_only):
    pipe = Pipeline.from_pretrained("someone/faces", local_files_only=local_files_only)
    assert type(pipe) is LatentPMRFPipeline
    refuse(
        lambda: Pipeline.from_pretrained("someone/else", local_files_only=local_files_only),
        "no checkpoint 'someone/else': not a folder here",
        "Hugging Face",
    )
    refuse(
        lambda: Pipeline.from_pretrained("someone/faces", revision="v9", local_files_only=local_files_only),
        "at revision 'v9'",
    )


def test_what_the_hub_is_asked_for(saved, monkeypatch):
    """Only the files of a checkpoint, at the caller's revision, and no network where that is asked for."""
    asked = []
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(saved))
    for options in (dict(revision="v1"), dict(local_files_only=True)):
        Pipeline.from_pretrained("someone/faces", **options)
        name, got = asked.pop()
        assert name == "someone/faces" and got["revision"] == options.get("revision")
        assert got["local_files_only"] is options.get("local_files_only", False)
        assert {"config.json", "model.safetensors"} <= set(got["allow_patterns"])


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse(lambda: Pipeline.from_pretrained("someone/faces"), "'someone/faces'", 'pip install "lpmrf-fast[hub]"')


def test_a_failing_network_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise ConnectionError("HTTPSConnectionPool(host='huggingface.co', port=443):\n Max retries exceeded")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    refuse(lambda: Pipeline.from_pretrained("someone/faces"), "'someone/faces'", "(ConnectionError); check the name")
