"""The demo: a face in the field's framing, degraded the same every time, and one picture."""

import sys

import numpy as np
import pytest
from PIL import Image

from lpmrf_fast import cli, demo

pytest.importorskip("skimage", reason="the demo's face ships with scikit-image")
pytest.importorskip("cv2", reason="the demo degrades with OpenCV")


@pytest.fixture(scope="module")
def faces():
    return demo.faces()


def test_the_portrait_and_the_detector_are_on_disk(monkeypatch):
    """Nothing is downloaded: no socket is ever opened."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("the demo went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert demo.faces()[0].shape == (512, 512, 3)


def test_the_degradation_is_the_same_every_time_and_visible(faces):
    original, degraded = faces
    again = demo.faces()
    assert np.array_equal(original, again[0]) and np.array_equal(degraded, again[1])
    assert degraded.shape == original.shape == (512, 512, 3) and degraded.dtype == np.uint8
    mse = np.mean((degraded.astype(float) - original) ** 2)
    assert 18 < 10 * np.log10(255**2 / mse) < 28


def test_the_face_has_the_framing_of_the_field(faces):
    """Irises are the darkest spots where FFHQ has eyes: (192, 243) and (319, 243), within 8 across and 12 down."""
    gray = np.asarray(Image.fromarray(faces[0]).convert("L").resize((128, 128), Image.Resampling.BOX)).astype(float)
    for x, y in ((192, 243), (319, 243)):
        rows, columns = slice(y // 4 - 5, y // 4 + 6), slice(x // 4 - 9, x // 4 + 10)
        r, c = np.unravel_index(gray[rows, columns].argmin(), gray[rows, columns].shape)
        assert abs(4 * (columns.start + c) + 2 - x) <= 8 and abs(4 * (rows.start + r) + 2 - y) <= 12


def test_the_command_writes_one_picture_of_four_panels(pipe, faces, tmp_path, capsys):
    model = pipe.save_pretrained(tmp_path / "model")
    output = tmp_path / "new" / "shown.png"
    status = cli.main(["demo", "-o", str(output), "--model", str(model), "--steps", "1", "--dtype", "fp32"])
    assert status == 0
    out = capsys.readouterr().out
    assert "restored one 512x512 face in " in out and out.endswith(
        f"degraded | posterior mean | restored | original: {output}\n"
    )
    sheet = np.asarray(Image.open(output))
    assert sheet.shape == (556, 4 * 512 + 3 * 8, 3)
    panels = [sheet[44:, left : left + 512] for left in range(0, 2072, 520)]
    original, degraded = faces
    assert np.array_equal(panels[0], degraded) and np.array_equal(panels[3], original)
    result = pipe(degraded, 1, seed=0)
    assert np.array_equal(panels[1], np.asarray(result.posterior_means[0]))
    assert np.array_equal(panels[2], np.asarray(result.images[0]))
    labels = sheet[:44].min(axis=(0, 2)) < 128
    assert all(labels[left + 100 : left + 412].any() for left in range(0, 2072, 520))


def test_a_picture_that_cannot_be_written_is_one_line(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SIZE", 64)
    monkeypatch.setattr(demo, "faces", lambda: (np.zeros((64, 64, 3), np.uint8),) * 2)
    (tmp_path / "file").write_text("in the way")
    model = pipe.save_pretrained(tmp_path / "model")
    status = cli.main(["demo", "-o", str(tmp_path / "file" / "x.png"), "--model", str(model), "--steps", "1"])
    err = capsys.readouterr().err
    assert status == 1 and err.count("\n") == 1 and "x.png cannot be written" in err and "choose another -o" in err


@pytest.mark.parametrize("missing", ["skimage.data", "cv2"])
def test_a_missing_package_names_the_extra(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lpmrf_fast.training.degradation", raising=False)
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and 'pip install "lpmrf-fast[demo]"' in err
