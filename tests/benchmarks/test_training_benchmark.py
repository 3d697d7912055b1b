"""The training benchmark runs every stage's step with our modules and plain ones, which have the same gradients."""

import json

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("yaml")
pytest.importorskip("accelerate")
from benchmarks import training
from benchmarks.engine import plain

VAE = {**training.SMALL_VAE, "block_out_channels": [8, 8, 8, 16]}
SD = {**training.SMALL_SD, "block_out_channels": [8, 8, 8, 16], "norm_num_groups": 4}
SWINIR = {**training.SMALL_SWINIR, "embed_dim": 24, "depths": [4, 4], "num_heads": [2, 2]}
LATENT = {**training.SMALL_LATENT, "block_dims": [32, 64], "block_layers": [1, 1], "head_dims": [16, 16]}
PIXEL = {**training.SMALL_PIXEL, "widths": [32, 64], "depths": [1, 1], "dropout_rate": [0.1, 0.1], "mapping_width": 32}
PIXEL["self_attns"] = [{"type": "neighborhood", "d_head": 16, "kernel_size": 3}, {"type": "global", "d_head": 16}]
TINY = {
    "vae": ("vae", VAE, 32, 16, 2),
    "vae, SD style": ("vae", SD, 32, 16, 2),
    "posterior mean": ("posterior-mean", SWINIR, 64, 16, 2),
    "flow in latents": ("flow", LATENT, 112, 16, 2),
    "flow in pixels": ("flow", PIXEL, 32, 16, 2),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(training.CASES, "small", TINY)


def test_all_stages_are_there():
    assert training.CASES["full"].keys() == TINY.keys()


@pytest.mark.parametrize("what", TINY)
def test_gradients_of_a_step_are_those_of_plain_modules(tmp_path, what):
    found, batch = training.trainer(what, "small", tmp_path, "cpu", precision="fp32")
    theirs = training.gradients(found, batch, plain)
    ours = training.gradients(found, batch, training.nullcontext)
    assert training.difference(ours, theirs) < 1e-5
    for (name, p), a, b in zip(found.model.named_parameters(), ours, theirs, strict=True):
        assert a.shape == p.shape and (a - b).norm() <= 1e-3 * b.norm() + 1e-6 * a.numel() ** 0.5, name
    assert all(g.abs().max() > 0 for g in theirs)  # nothing is left out


@pytest.mark.parametrize("what", TINY)
def test_activation_checkpointing_changes_no_bit(tmp_path, what):
    """Nor what the random generators do: dropout of the pixel flow draws the same masks twice."""
    once, twice = (
        training.trainer(what, "small", tmp_path / str(on), "cpu", precision="fp32", activation_checkpointing=on)
        for on in (False, True)
    )
    steps = []
    for found, batch in (once, twice):
        found.model.train()
        grads = training.gradients(found, batch, training.nullcontext)
        steps.append([*grads, torch.rand(1)])  # and where the generator is left
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
    peaks = [training.peak_bytes(found, batch, training.nullcontext, "cpu") for found, batch in (once, twice)]
    assert peaks[1] < peaks[0]


def test_the_ema_runs_its_own_blocks(tmp_path):
    """A copy made after the wrapping would run the blocks of the network that it was copied from."""
    found, batch = training.trainer("flow in latents", "small", tmp_path, "cpu", activation_checkpointing=True)
    z = torch.randn(1, 32, 14, 14)
    before = found.ema.module(z, 0.5)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.zero_()
    assert torch.equal(found.ema.module(z, 0.5), before)


def test_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = ["--device", "cpu", "--preset", "small", "--cases", "flow in latents", "--seconds", "0", "--out", str(out)]
    assert training.main(words) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["plain", "ours", "ours, activation checkpointing"]
    for row in rows.values():
        assert row["seconds"] > 0 and row["speed_of_plain"] > 0 and row["gradient_difference"] < 0.05
    assert rows["ours, activation checkpointing"]["peak_bytes"] < rows["ours"]["peak_bytes"]
    assert "steps/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        training.main(["--cases", "nothing", "--out", str(out)])


def test_a_provider_that_fails_is_a_row(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(training, "peak_bytes", broken)
    assert (
        training.main(["--device", "cpu", "--cases", "vae", "--seconds", "0", "--out", str(tmp_path / "r.json")]) == 1
    )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["failed"] for row in rows} == {"RuntimeError: no such kernel"}
