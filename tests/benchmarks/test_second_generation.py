"""Three stages in minutes at a time: stopped and continued, also from shards alone, they end as if never stopped."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("cv2")
pytest.importorskip("yaml")
pytest.importorskip("accelerate")
from benchmarks import second_generation
from benchmarks.training import SMALL_LATENT, SMALL_SWINIR, SMALL_VAE
from lpmrf_fast.pipeline import Pipeline

SMALL = {"size": 64, "batch_size": 2, "workers": 0, "precision": "fp32", "val_images": 1}
SWINIR = {**SMALL_SWINIR, "img_size": 16, "embed_dim": 24, "depths": [1], "num_heads": [2]}
SWINIR |= {"sf": 4, "unshuffle_scale": 4}
LATENT = {**SMALL_LATENT, "in_channels": 4, "out_channels": 4, "block_dims": [32, 64], "block_layers": [1, 1]}
LATENT |= {"block_types": ["global", "global"], "head_dims": [16, 16], "window_sizes": [0, 0]}
TINY = {
    "vae": {"model": {**SMALL_VAE, "block_out_channels": [8] * 4, "latent_channels": 4}, "crop": 32},
    "posterior-mean": {"model": SWINIR},
    "flow": {"model": LATENT, "cache": 1},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    stages = {
        name: (preset, share, {**SMALL, **TINY[name]}) for name, (preset, share, _) in second_generation.STAGES.items()
    }
    monkeypatch.setattr(second_generation, "STAGES", stages)
    monkeypatch.setattr(second_generation, "SHARD", 100_000)


@pytest.fixture
def data(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "data" / part / f"{i}.png")
    return tmp_path / "data"


def planned(out):
    """Steps that do not depend on the pace of the machine."""
    out.mkdir()
    plan = {stage: {"steps": 12, "done": False} for stage in second_generation.STAGES}
    (out / "plan.json").write_text(json.dumps(plan))
    return out


def run(data, out, minutes, *more):
    words = ["--data", str(data), "--out", str(out), "--minutes", str(minutes), "--device", "cpu", *more]
    return second_generation.main(words)


def test_stopped_runs_end_as_whole_ones(data, tmp_path, monkeypatch, capsys):
    whole = planned(tmp_path / "whole")
    assert run(data, whole, 60) == 0 and "all done" in capsys.readouterr().out

    # Each run takes a few steps and loses its disk but for the shards.
    honest = second_generation.train

    def stopped(stage, config, seconds):
        steps = []
        loss = second_generation.Trainer._step

        def step(self, *args):
            steps.append(self.step)
            if len(steps) == 7:
                self.stopping = True
            return loss(self, *args)

        monkeypatch.setattr(second_generation.Trainer, "_step", step)
        try:
            return honest(stage, config, seconds)
        finally:
            monkeypatch.setattr(second_generation.Trainer, "_step", loss)

    monkeypatch.setattr(second_generation, "train", stopped)
    out = planned(tmp_path / "run0")
    status = run(data, out, 60)
    for i in range(1, 10):
        if status == 0:
            break
        assert status == second_generation.UNFINISHED and "time is up" in capsys.readouterr().out
        parts = sorted((out / "shards").iterdir())
        assert len(parts) > 1 and all(part.stat().st_size <= 100_000 for part in parts)
        out, before = tmp_path / f"run{i}", out
        status = run(data, out, 60, "--shards", str(before / "shards"))
    assert status == 0 and i > 2
    expected, found = (load_file(folder / "checkpoint/model.safetensors") for folder in (whole, out))
    assert expected.keys() == found.keys()  # tensors, not bytes: the order of a file's metadata is nobody's
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert type(Pipeline.from_pretrained(str(out / "checkpoint"), device="cpu")).__name__ == "LatentPMRFPipeline"

    # As the text says: cat and tar put the result together.
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in sorted((out / "shards").iterdir())))
    with tarfile.open(joined) as tar:
        assert "checkpoint/model.safetensors" in tar.getnames()


def test_minutes_are_shared_out_by_pace_and_kept(data, tmp_path):
    out = tmp_path / "out"
    assert run(data, out, 0.001, "--total", "0.05") == second_generation.UNFINISHED
    plan = json.loads((out / "plan.json").read_text())
    assert list(plan) == ["vae"] and plan["vae"]["steps"] >= 10
    run(data, out, 0.001, "--total", "10")
    assert json.loads((out / "plan.json").read_text())["vae"]["steps"] == plan["vae"]["steps"]


def test_three_runs_take_a_stage_each_and_what_stops_one_leaves_shards(data, tmp_path, monkeypatch):
    now, begun = [0.0], []

    def pace(stage, config, seconds):
        now[0] += seconds + (80 if stage == "flow" else 0)  # its latent cache
        return 2.0

    def train(stage, config, seconds):
        begun.append((stage, config.steps))
        if stage == "flow":
            raise RuntimeError("no such kernel")
        now[0] += config.steps / 2
        assert now[0] < end
        (tmp_path / "out" / stage / "model").mkdir(parents=True)
        (tmp_path / "out" / stage / "model/config.json").write_text("{}")
        return True

    monkeypatch.setattr(second_generation, "pace", pace)
    monkeypatch.setattr(second_generation, "train", train)
    monkeypatch.setattr(second_generation.time, "monotonic", lambda: now[0])
    for stages in (1, 2):
        end = now[0] + 9 * 60
        assert run(data, tmp_path / "out", 9) == second_generation.UNFINISHED and len(begun) == stages
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(data, tmp_path / "out", 9)
    # 8 and 8.5 minutes as wanted; of the last 8.5 those that are left behind pace and cache.
    assert begun == [("vae", 864), ("posterior-mean", 918), ("flow", int(0.9 * 2 * (540 - 12 - 80)))]
    second_generation.unpack(tmp_path / "out/shards", tmp_path / "again")
    assert sorted(p.parent.parent.name for p in (tmp_path / "again").glob("*/model/*")) == ["posterior-mean", "vae"]


def test_no_shards_is_an_error(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="leave --shards out"):
        run(data, tmp_path / "out", 1, "--shards", str(tmp_path))
