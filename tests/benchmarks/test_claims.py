"""The claims' commands train, stop, go on, and report; their arithmetic on numbers with known answers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("yaml")
pytest.importorskip("accelerate")
from benchmarks.claims import convergence, perception_distortion, sources, study, vae
from lpmrf_fast.evaluation import psnr


def rows(*distances, tflop=1.0):
    return [{"step": i, "tflop": i * tflop, "seconds": 10.0 * i, "swd": d} for i, d in enumerate(distances)]


# ---- arithmetic


def test_cost_of_a_distance_is_read_off_between_rows():
    run = rows(100, 80, 60, 70, 20)
    assert convergence.cost(run, 80, "tflop") == 1 and convergence.cost(run, 70, "tflop") == 1.5
    assert convergence.cost(run, 60, "seconds") == 20
    assert convergence.cost(run, 40, "tflop") == pytest.approx(3 + 30 / 50)  # reached after a worse row
    assert convergence.cost(run, 10, "tflop") is None and convergence.cost(run, 200, "tflop") == 0


def test_the_factor_of_runs_that_differ_in_speed_alone():
    fast, slow = rows(100, 80, 60, 50, 45), rows(100, 80, 60, 50, 45, tflop=4)
    found = convergence.factors([fast, fast], [slow, slow], "tflop")
    assert [entry["factor"]["mean"] for entry in found] == pytest.approx([4] * len(found))
    assert found[0]["swd"] == 45 and found[-1]["swd"] == 80 and found[0]["factor"]["std"] == 0
    # The distance that all reach is the worst run's best.
    assert convergence.factors([fast], [rows(100, 90, 75, tflop=4)], "tflop")[0]["swd"] == 75


def test_runs_that_learn_nothing_have_no_factor():
    assert convergence.factors([rows(100, 100, 110)], [rows(100, 120, 130)], "tflop") == []


def test_verdicts():
    def said(*values):
        return convergence.verdict([{"factor": {"values": [v, 2 * v]}} for v in values])

    assert said(1.1, 5).startswith("latents") and said(0.3, 0.4).startswith("pixels")
    assert all(text.startswith("inconclusive") for text in (said(0.9, 5), said(0.6), said()))
    assert vae.verdict([2, 3], [1, 1.5], "higher") == "Sim-VAE" and vae.verdict([2, 3], [1, 1.5], "lower") != "Sim-VAE"
    assert vae.verdict([2, 3], [1, 2.5], "higher") == "inconclusive"


def test_compute_of_a_step(tmp_path):
    """Three forward passes of a network whose FLOPs are known: one matrix over all patches, as an example."""
    model = {"img_size": 8, "embed_dim": 24, "depths": [1], "num_heads": [2], "window_size": 4, "mlp_ratio": 2, "sf": 1}
    network = study.on_meta("posterior-mean", model)
    inside = sum(m.weight.numel() for m in network.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
    attention = 2 * 24 * 4**2
    assert study.training_flops("posterior-mean", model, 8) == pytest.approx(
        3 * 2 * 64 * (inside + attention), rel=1e-6
    )


def test_networks_of_the_claims_are_of_equal_size():
    for width in (1.0, 2.0, 4.0):
        s = study.Study.__new__(study.Study)
        s.args = study.arguments("").parse_args(["--out", "x", "--train", "x", "--val", "x", "--width", str(width)])
        flows = [study.parameters("flow", m) for m in (s.loouformer(), s.hdit())]
        vaes = [study.parameters("vae", m) for m in (s.sim_vae(), s.sd_vae())]
        assert flows[0] == pytest.approx(flows[1], rel=0.05) and vaes[0] == pytest.approx(vaes[1], rel=0.05)


# ---- commands


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    y, x = np.mgrid[:64, :64] / 64
    for i in range(4):
        a = np.random.default_rng(i).uniform(-1, 1, (3, 3))
        picture = 0.5 + 0.5 * np.sin(3 * (a[0] * x[..., None] + a[1] * y[..., None]) + a[2])
        Image.fromarray((255 * picture).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def words(faces, out, seeds=1):
    few = ["--flow-tflop", "0.0007", "--vae-tflop", "0.0005", "--mean-tflop", "0.0005"]
    few += ["--batch", "2", "--faces", "2", "--width", "0.5"]
    folders = ["--out", str(out), "--train", str(faces), "--val", str(faces)]
    return [*folders, *few, "--seeds", str(seeds), "--device", "cpu"]


@pytest.fixture(scope="module")
def out(faces, tmp_path_factory):
    """The folder of all studies: what one has trained, the next one finds."""
    return tmp_path_factory.mktemp("claims")


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Where matplotlib is not installed, all but the plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        for claim in (convergence, perception_distortion, sources, vae):
            monkeypatch.setattr(claim, "plot", lambda *a: None)


def test_convergence(faces, out, capsys):
    convergence.main([*words(faces, out, 2), "--pixel-budget", "1.5"])
    report = json.loads((out / "convergence.json").read_text())
    assert report["caption"] in capsys.readouterr().out and "does not show" in report["caption"]
    assert report["paper"] == 5.79 and len(report["rows"]["PMRF"]) == 2
    for run in report["rows"]["PMRF"] + report["rows"]["Latent-PMRF"]:
        assert [row["step"] for row in run][0] == 0 and all(row["swd"] > 0 for row in run)
        seconds = [row["seconds"] for row in run]
        assert seconds == sorted(seconds) and seconds[-1] > 0
    ends = {name: report["rows"][name][0][-1]["tflop"] for name in report["rows"]}
    assert ends["PMRF"] / ends["Latent-PMRF"] == pytest.approx(1.5, rel=0.4)  # whole steps, of which there are few
    # Again: nothing is trained, and nothing changes.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("checkpoint-*.pt")}
    convergence.main([*words(faces, out, 2), "--pixel-budget", "1.5"])
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("checkpoint-*.pt")}
    assert json.loads((out / "convergence.json").read_text())["rows"] == report["rows"]


def test_sources(faces, out):
    sources.main([*words(faces, out, 1), "--pixel-budget", "1.5"])
    report = json.loads((out / "sources.json").read_text())
    assert len(report["table"]) == 6 and all(len(e["swd"]["values"]) == 1 for e in report["table"].values())
    latent = json.loads((out / "convergence.json").read_text())["rows"]["Latent-PMRF"][0]
    latent = sources.at_budget(latent, 0.0007)  # the short run of this file has whole steps only
    assert report["table"]["Latent-PMRF"]["swd"]["values"][0] == pytest.approx(latent["swd"], abs=1e-3)


def test_vae(faces, out):
    vae.main([*words(faces, out), "--restoration"])
    report = json.loads((out / "vae.json").read_text())
    assert set(report["table"]) == {"reconstruction", "restoration"}
    assert report["table"]["reconstruction"]["psnr"]["better"] in ("Sim-VAE", "SD-style VAE")
    assert str(faces) not in json.dumps(report)  # results name no folder of the one who ran them


def test_a_run_that_was_killed_goes_on_and_misses_no_row(faces, out, tmp_path, monkeypatch):
    args = study.arguments("").parse_args(words(faces, out))
    whole = study.Study(args).gather(lambda s: s.vae("sim", 0))
    broken = study.Study(study.arguments("").parse_args(words(faces, tmp_path)))
    honest = study.Scored.validate

    def killed(self, *faces):
        if self.step == whole[2]["step"]:
            raise KeyboardInterrupt
        return honest(self, *faces)

    def stopped(self, *args):
        self.stopping = self.step == whole[3]["step"] - 1  # SIGTERM between two rows
        return step(self, *args)

    step = study.Scored._step

    monkeypatch.setattr(study.Scored, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        broken.gather(lambda s: s.vae("sim", 0))
    monkeypatch.setattr(study.Scored, "validate", honest)
    monkeypatch.setattr(study.Scored, "_step", stopped)
    with pytest.raises(SystemExit):
        broken.gather(lambda s: s.vae("sim", 0))
    monkeypatch.setattr(study.Scored, "_step", step)
    resumed = broken.gather(lambda s: s.vae("sim", 0))
    assert [(r["step"], r["psnr"]) for r in resumed] == [(r["step"], r["psnr"]) for r in whole]
    assert [r["seconds"] for r in resumed] == sorted(r["seconds"] for r in resumed)


def test_perception_distortion(faces, tmp_path, pipe, capsys):
    degraded = tmp_path / "lq"
    shutil.copytree(faces, degraded)
    pipe.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "fp32", "--at", "2"]
    command = ["--out", str(tmp_path / "out"), "--clean", str(faces), "--degraded", str(degraded), *model]
    command += ["--faces", "3", "--seeds", "2", "--steps", "1", "2", "--noise", "0", "0.5"]
    perception_distortion.main(command)
    report = json.loads((tmp_path / "out/perception_distortion.json").read_text())
    assert set(report["table"]["Euler steps"]) == {"1", "2"} and set(report["table"]["source noise"]) == {
        "0",
        "0.1",
        "0.5",
    }
    assert len(report["table"]["source noise"]["0"]["swd"]["values"]) == 1
    assert str(tmp_path / "lq") not in json.dumps(report)
    assert len(report["table"]["source noise"]["0.5"]["swd"]["values"]) == 2
    assert report["reference"]["degraded"]["psnr"] > 100  # they are the originals
    assert capsys.readouterr().out.count("ETA") == 7
    perception_distortion.main(command)
    assert "ETA" not in capsys.readouterr().out


def test_restored_faces_are_the_pipelines(faces, pipe):
    """With its own noise and steps."""
    y = torch.rand(1, 3, 64, 64)
    whole, mean = pipe.restore(y, 3, seeds=[1000])
    with torch.no_grad():
        found = perception_distortion.restored(pipe, [pipe.encode(mean)], 3, pipe.noise_std, 1)
    assert psnr(found, whole).item() > 80
