"""`lpmrf-fast evaluate`: pairs by stem, what is left out named, every metric a number or a reason."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchmetrics")
import torch

from lpmrf_fast import cli
from lpmrf_fast.evaluation import evaluate, faces, networks
from lpmrf_fast.evaluation.scores import Files


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """originals/, restored/ and degraded/ with faces a, b, c of 32x32: the restored ones are nearer."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, error in (("originals", 0), ("restored", 5), ("degraded", 30)):
        Path(folder).mkdir()
        for i, stem in enumerate("abc"):
            y, x = np.mgrid[:32, :32] * 3 + i * 10
            picture = np.stack([x, y, x + y], -1) + 40 + rng.normal(0, 1, (32, 32, 3)) * error
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(f"{folder}/{stem}.png")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            status = cli.main(["evaluate", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line.startswith("lpmrf-fast:")]

    return call


def test_table_json_csv_and_sheet(folders, run):
    arguments = "restored --reference originals --degraded degraded --out out/s.json --csv out/s.csv --sheet out/s.png"
    status, out, err = run(*arguments.split())
    assert (status, err) == (0, [])
    assert out.splitlines()[0].split() == "PSNR dB ↑ SSIM ↑ SWD ↓".split()
    assert "3 faces" in out and "skipped LPIPS: give" in out and "skipped FID:" in out and "skipped NIQE:" in out
    report = json.loads(Path("out/s.json").read_text())
    psnr = {name: s["PSNR dB"] for name, s in report["scores"].items()}
    assert psnr["restored"] > psnr["degraded"] + 10
    assert report["scores"]["restored"]["SWD"] < report["scores"]["degraded"]["SWD"]
    assert set(report["skipped"]) == {"LPIPS", "FID", "KID x1000", "MMD", "NIQE", "Deg", "LMD px"}
    assert report["settings"]["count"] == 3 and "torch" in report["settings"]["versions"]
    rows = list(csv.DictReader(open("out/s.csv")))
    assert [(r["set"], r["face"]) for r in rows] == [(s, f) for s in ("degraded", "restored") for f in "abc"]
    mean = np.mean([float(r["PSNR dB"]) for r in rows if r["set"] == "restored"])
    assert mean == pytest.approx(psnr["restored"], abs=1e-5)
    with Image.open("out/s.png") as sheet:
        assert sheet.size == (3 * 256, 3 * (256 + 18))


def test_what_is_left_out_is_one_line_each(folders, run):
    Path("restored/c.png").unlink()
    Image.new("RGB", (32, 32)).save("restored/extra.jpg")
    Image.new("RGB", (16, 16)).save("restored/b.png")
    Path("originals/broken.png").write_bytes(b"no picture")
    Path("restored/broken.png").write_bytes(b"no picture")
    cut = Path("restored/cut.png")
    for folder in ("originals", "restored"):
        cut.with_name("cut.png") and Image.effect_noise((32, 32), 50).convert("RGB").save(f"{folder}/cut.png")
    cut.write_bytes(cut.read_bytes()[:600])
    status, out, err = run("restored", "--reference", "originals")
    assert status == 1 and "1 faces" in out
    said = "\n".join(err)
    assert len(err) == 5
    assert "originals/c.png: no partner of this stem among restored" in said
    assert "restored/extra.jpg: no partner of this stem among reference" in said
    assert "b: sizes differ (reference 32x32, restored 16x16)" in said
    assert "originals/broken.png: cannot be decoded (no picture of a known format); the face broken is left out" in said
    assert "restored/cut.png: cannot be decoded (image file is truncated)" in said


def test_equal_faces_are_infinitely_good_and_json_stays_json(folders, run):
    assert run("originals", "--reference", "originals", "--out", "s.json")[0] == 0
    report = json.loads(Path("s.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert report["scores"]["restored"]["PSNR dB"] == "inf" and report["scores"]["restored"]["SSIM"] == 1


def test_limit(folders, run):
    status, out, _ = run("restored", "--reference", "originals", "--limit", 2)
    assert status == 0 and "2 faces" in out


@pytest.mark.parametrize("words", ["nothing --reference originals", "restored --reference nothing", "restored"])
def test_unusable_arguments_are_status_2(folders, run, words):
    status, _, err = run(*words.split())
    assert status == 2 and len(err) == 1


def test_no_pair_at_all(folders, run):
    Path("empty").mkdir()
    status, _, err = run("empty", "--reference", "originals")
    assert status == 1 and len(err) == 1 and "no face of empty has a partner in originals" in err[0]


def test_files_that_are_not_there_or_wrong_skip_their_metric_by_name(folders):
    Path("wrong.pth").write_bytes(b"nothing")
    report = evaluate("restored", "originals", files=Files(lpips="nowhere.pth", inception="wrong.pth"))
    assert report.skipped["LPIPS"] == "no file nowhere.pth" and "wrong.pth: cannot be read" in report.skipped["FID"]


def test_deep_and_rotated_pictures_are_scored_as_they_look(folders):
    for stem in "abc":
        with Image.open(f"originals/{stem}.png") as image:
            gray = np.asarray(image.convert("L"))
        Image.fromarray(gray).save(f"originals/{stem}.png")
        turned = Image.fromarray(gray.T[::-1].copy())
        turned.getexif()[0x0112] = 6
        turned.save(f"restored/{stem}.png", exif=turned.getexif())
    Image.fromarray(gray.astype(np.uint16) * 257).save("restored/c.png")
    assert evaluate("restored", "originals").scores["restored"]["PSNR dB"] == math.inf


def test_faces_that_are_too_small_for_lpips_have_none(folders, monkeypatch):
    class Distance(torch.nn.Module):
        net = "alex"

        def forward(self, x, y):
            return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setattr("lpmrf_fast.perceptual.LPIPS", lambda path: Distance())
    Path("weights").write_bytes(b"")
    for folder in ("originals", "restored"):
        Image.new("RGB", (40, 20), "gray").save(f"{folder}/d.png")
    report = evaluate("restored", "originals", files=Files(lpips="weights"))
    assert math.isnan(report.faces["restored"]["d"]["LPIPS"]) and report.scores["restored"]["LPIPS"] > 0


def test_several_sizes_skip_the_sliced_distance_alone(folders):
    for folder in ("originals", "restored"):
        Image.new("RGB", (48, 32), "gray").save(f"{folder}/d.png")
    report = evaluate("restored", "originals")
    assert report.skipped["SWD"] == "the faces have several sizes" and len(report.faces["restored"]) == 4


@pytest.fixture
def colour_means(folders, monkeypatch):
    """Files of feature networks that answer with the mean colour."""

    class Means(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    monkeypatch.setattr(networks, "Inception", lambda path: Means())
    monkeypatch.setattr(networks, "DINOv2", lambda path: Means())
    Path("weights").write_bytes(b"")
    return Files(inception="weights", dinov2="weights")


def test_set_distances_see_features_of_both_sets(colour_means):
    report = evaluate("restored", "originals", "degraded", colour_means)
    for name in ("FID", "MMD"):
        assert 0 <= report.scores["restored"][name] < report.scores["degraded"][name]
    assert "FID, KID x1000: against the 3 originals" in str(report)


def test_real_faces_stand_in_for_originals_that_nobody_has(colour_means, run):
    Path("real/more").mkdir(parents=True)
    for i, stem in enumerate("abc"):  # the same faces, by other names, of another size and in a folder below
        with Image.open(f"originals/{stem}.png") as image:
            image.resize((64, 64), Image.Resampling.NEAREST).save(f"real/more/face{i}.png")
    paired = evaluate("restored", "originals", "degraded", colour_means)
    report = evaluate("restored", degraded="degraded", files=colour_means, real="real", sheet="sheet.png")
    for name in ("FID", "KID x1000", "MMD"):
        for which in ("restored", "degraded"):
            assert report.scores[which][name] == pytest.approx(paired.scores[which][name], rel=1e-5, abs=1e-6)
    assert report.skipped["PSNR dB"] == report.skipped["SWD"] == "needs the originals: --reference DIR"
    assert "against 3 real faces" in str(report) and report.settings["real"] == "real" and not report.problems
    with Image.open("sheet.png") as sheet:
        assert sheet.width == 512  # two columns: there is no original
    Path("real/wrong.png").write_bytes(b"no picture")
    report = evaluate("restored", "originals", files=colour_means, real="real")
    assert "wrong.png" in report.problems[0] and "against 3 real faces" in str(report) and "PSNR dB" in report.better
    status, out, err = run("restored", "--real", "real", "--inception", "weights", "--out", "s.json")
    assert (
        status == 1
        and len(err) == 1
        and "wrong.png" in err[0]
        and "FID" in json.loads(Path("s.json").read_text())["better"]
    )


def test_a_folder_of_real_faces_needs_two(folders, run):
    Path("real").mkdir()
    status, _, err = run("restored", "--real", "real")
    assert status == 1 and err == ["lpmrf-fast: real: expected at least 2 real faces, found 0"]


# ---- faces


def onnx(path, op: str, **attributes) -> None:
    """A network of one node, x (1, 3, 112, 112) → y, as bytes of ONNX's protobuf."""

    def number(field, value):
        return bytes([field << 3]) + varint(value)

    def varint(value):
        out = b""
        while True:
            value, low = value >> 7, value & 127
            out += bytes([low | (128 if value else 0)])
            if not value:
                return out

    def part(field, content):
        content = content.encode() if isinstance(content, str) else content
        return bytes([field << 3 | 2]) + varint(len(content)) + content

    def value(name, shape):
        dims = b"".join(part(1, number(1, n)) for n in shape)
        return part(1, name) + part(2, part(1, number(1, 1) + part(2, dims)))

    node = part(1, "x") + part(2, "y") + part(3, "n") + part(4, op)
    for name, numbers in attributes.items():
        node += part(
            5, part(1, name) + b"".join(number(8, n) for n in numbers) + bytes([20 << 3 & 127 | 128, 1]) + varint(7)
        )
    graph = part(1, node) + part(2, "g") + part(11, value("x", (1, 3, 112, 112))) + part(12, value("y", (1, 3, 4, 4)))
    path.write_bytes(number(1, 8) + part(7, graph) + part(8, part(1, "") + number(2, 13)))


def test_similarity_is_recovered():
    pytest.importorskip("cv2")
    angle, scale, shift = 0.3, 1.7, np.array([4.0, -2.0])
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = np.random.default_rng(0).normal(size=(5, 2))
    found = faces.similarity(points, points @ turn.T + shift)
    assert np.allclose(found, np.hstack([turn, shift[:, None]]))
    mirrored = faces.similarity(points, points * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0  # a face is never mirrored


def test_identity_distance_through_an_onnx_file(folders, tmp_path):
    pytest.importorskip("cv2")
    onnx(tmp_path / "mean.onnx", "AveragePool", kernel_shape=[28, 28], strides=[28, 28])
    report = evaluate("restored", "originals", "degraded", Files(face_embedder=str(tmp_path / "mean.onnx")))
    assert "Deg" not in report.skipped, report.skipped
    assert 0 < report.scores["restored"]["Deg"] < report.scores["degraded"]["Deg"] < 90


def test_landmark_distance_leaves_out_faces_that_are_not_found(folders, monkeypatch):
    pytest.importorskip("cv2")
    seen = []

    class Corner:
        """Finds no face in c; elsewhere landmarks that follow the brightness of the corner."""

        def __init__(self, path):
            pass

        def __call__(self, image):
            seen.append(image)
            return None if image[0, 0, 0] > 55 else np.full((5, 2), float(image[0, 0, 0]), np.float32)

    monkeypatch.setattr(faces, "Detector", Corner)
    Path("yunet.onnx").write_bytes(b"")
    for folder, value in (("originals", 40), ("restored", 43)):
        for stem, corner in zip("abc", (value, value, 60)):
            with Image.open(f"{folder}/{stem}.png") as image:
                image.putpixel((0, 0), (corner, 0, 0))
                image.save(f"{folder}/{stem}.png")
    report = evaluate("restored", "originals", files=Files(face_detector="yunet.onnx"))
    assert report.scores["restored"]["LMD px"] == pytest.approx(3 * math.sqrt(2), rel=1e-6)
    assert math.isnan(report.faces["restored"]["c"]["LMD px"]) and len(seen) == 6
    assert json.loads(report.json())["faces"]["restored"]["c"]["LMD px"] == "nan"


@pytest.mark.skipif("LPMRF_TEST_YUNET" not in os.environ, reason="LPMRF_TEST_YUNET names no YuNet file")
def test_yunet_finds_the_astronaut():
    data = pytest.importorskip("skimage.data")
    landmarks = faces.Detector(os.environ["LPMRF_TEST_YUNET"])(data.astronaut()[:300, 80:380])
    assert landmarks.shape == (5, 2) and np.abs(landmarks[0] - [124, 99]).max() < 8
