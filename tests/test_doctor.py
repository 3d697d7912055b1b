"""What a bug report says of the machine: true, complete, and never a reason to fail."""

import sys
from importlib.metadata import version

import pytest
import torch

import lpmrf_kernels
from lpmrf_fast import checkpoint, cli, doctor
from lpmrf_fast.pipeline import default_dtype


def section(text: str, title: str) -> dict[str, str]:
    """First column → the rest, of one section."""
    rows = text.split(f"{title}\n", 1)[1].split("\n\n")[0].splitlines()
    return {row.strip().split("  ")[0]: row.strip().partition("  ")[2].strip() for row in rows}


def test_the_command_prints_versions_devices_and_dtype(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    versions = section(out, "versions")
    for name in ("torch", "numpy", "Pillow", "safetensors", "tqdm"):
        assert versions[name] == version(name)
    machine = section(out, "machine")
    dtype = default_dtype("auto", torch.device(machine["device auto"]))
    assert machine["dtype auto"] == f"{str(dtype).removeprefix('torch.')} on {machine['device auto']}"


def test_every_op_is_listed_with_its_backend_and_why_not_another():
    header, *rows = doctor.ops()
    assert header == ("op", "direction", "device", "backend", "others")
    served = lpmrf_kernels.backends()
    assert [row[:3] for row in rows] == [(s.op, s.direction, s.device) for s in served]
    assert {row[0] for row in rows} >= {"euler_step", "add_source_noise", "attention"}
    for row, s in zip(rows, served):
        assert row[3] == s.backend
        assert all(name in row[4] and reason in row[4] for name, reason in s.why_not.items())


def test_a_forced_backend_shows(monkeypatch):
    monkeypatch.setenv("LPMRF_BACKEND", "torch")
    text = doctor.report()
    assert section(text, "environment")["LPMRF_BACKEND"] == "torch"
    row = next(row for row in doctor.ops() if row[:3] == ("euler_step", "forward", "cpu"))
    assert row[3] == "torch" and "torch was asked for" in row[4]


def test_kernels_say_why_they_are_not_there(monkeypatch):
    monkeypatch.setattr(doctor, "unavailable", lambda backend, device: f"{backend} is not there")
    assert [text for _, text in doctor.kernels()] == ["no: cpp is not there", "no: triton is not there"]


def test_torchvision_is_not_needed_and_a_mismatch_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert doctor.torchvision() == "not installed (not needed)"
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(doctor, "installed", lambda name: "0.1")
    assert "0.1 does not fit torch" in doctor.torchvision() and "nms does not exist" in doctor.torchvision()


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    rows = dict(doctor.optional_packages())
    assert rows["scikit-image"] == 'not installed (pip install "lpmrf-fast[demo]")'


@pytest.mark.parametrize("flags", ["flags\t: fpu avx2 avx512f amx_tile\n", "Features\t: asimd sve bf16\n", None])
def test_instruction_sets_are_read_where_the_system_tells(monkeypatch, flags):
    def read(*_, **__):
        if flags is None:
            raise FileNotFoundError
        return f"processor\t: 0\n{flags}"

    monkeypatch.setattr(doctor.Path, "read_text", read)
    expected = None if flags is None else [f for f in flags.split() if f in doctor.CPU_FLAGS]
    assert doctor.cpu_flags() == expected
    assert doctor.machine()


def test_bundled_checkpoints_are_listed_also_damaged_ones(monkeypatch, tmp_path, pipe):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    assert doctor.checkpoints() == [("bundled", "none in this installation; give --model")]
    pipe.save_pretrained(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    bad, good = doctor.checkpoints()
    assert bad[1].startswith("bundled, unusable: ") and good[1].startswith("bundled, LatentPMRFPipeline, ")


# ---- plans


def plan(capsys, *arguments):
    assert cli.main(["doctor", "--plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def model(pipe, tmp_path):
    return str(pipe.save_pretrained(tmp_path / "model"))


def test_a_plan_says_what_runs_what_it_costs_and_whether_it_fits(capsys, model, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda device: 10 * 10**9)
    out = plan(capsys, "100x60", "--batch-size", "3", "--steps", "4", "--model", model, "--dtype", "fp32")
    assert out.startswith("3 x 128x64, 4 steps, float32, channels_last, c")
    for text in ("posterior mean", "encode", "velocity, 4 steps", "decode", "GFLOP", "of weights", "fits: 0.0"):
        assert text in out
    assert out.rstrip().endswith("of 10.00 GB")


def test_a_plan_that_does_not_fit_says_what_would(capsys, model):
    words = ("512", "--model", model, "--steps", "1", "--dtype", "bf16", "--device", "cuda")
    assert "does not fit: " in plan(capsys, *words, "--batch-size", "64", "--max-memory", "1GB")
    many = plan(capsys, *words, "--batch-size", "64", "--max-memory", "1GB").rsplit("at most ", 1)[1]
    at_once = int(many.split()[0])
    assert 1 <= at_once < 64
    assert "\nfits: " in plan(capsys, *words, "--batch-size", str(at_once), "--max-memory", "1GB")
    assert "photos would be cut into tiles" in plan(capsys, *words, "--max-memory", "2MB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_plan_for_a_gpu_that_is_not_here(capsys, model):
    out = plan(capsys, "64", "--model", model, "--device", "cuda")
    assert "bfloat16, channels_last, cuda, graph" in out and "no cuda here to compare with; --max-memory says" in out
    assert "\nfits: " in plan(capsys, "64", "--model", model, "--device", "cuda:1", "--max-memory", "1GB")
