"""Sample n of the faces dataset is the same in any process, order and restart."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
from lpmrf_fast.training.data import Faces, batches, degraded_crops, find_images, read_image
from lpmrf_fast.training.degradation import PRESETS, turned


@pytest.fixture
def faces(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        folder = tmp_path / ("a" if i % 2 else "b")
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return find_images(tmp_path)


def make(faces, samples=20, **options):
    return Faces(faces, 32, samples, seed=3, ranges=PRESETS["blind-face"], **options)


def test_finds_images_below_the_folder_and_says_when_there_are_none(faces, tmp_path):
    assert len(faces) == 5 and faces == sorted(faces)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        find_images(tmp_path / "empty")


def test_items_do_not_depend_on_order_or_instance(faces):
    a, b = make(faces, crop=16, flip=True), make(faces, crop=16, flip=True)
    there = [a[i] for i in range(12)]
    back = [b[i] for i in reversed(range(12))][::-1]
    for (clean, degraded), (clean2, degraded2) in zip(there, back):
        assert clean.shape == degraded.shape == (3, 16, 16) and clean.dtype == torch.uint8
        assert torch.equal(clean, clean2) and torch.equal(degraded, degraded2)


def test_an_epoch_visits_every_face_once_and_epochs_differ(faces):
    data = Faces(faces, 32, 20, seed=3)
    epochs = [[data[5 * e + i].sum().item() for i in range(5)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and len(set(epochs[0])) == 5
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_the_same_face_is_degraded_anew_in_every_epoch(faces):
    data = make(faces, shuffle=False)
    assert not torch.equal(data[0][1], data[5][1])
    assert torch.equal(data[0][0], data[5][0])


def test_crops_of_clean_and_degraded_match(faces):
    nothing = PRESETS["blind-face"].__class__(sigma=(0.05, 0.05), r=(1, 1), delta=(0, 0), q=(100, 100))
    clean, degraded = Faces(faces, 32, 5, seed=0, ranges=nothing, crop=16, flip=True)[1]
    # Luminance, because JPEG halves the resolution of the chroma; that of unrelated noise differs by 55.
    difference = torch.einsum("chw,c->hw", clean.float() - degraded.float(), torch.tensor([0.299, 0.587, 0.114]))
    assert difference.abs().mean() < 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_continues_where_it_stopped(faces, workers):
    whole = [b[1] for b in batches(make(faces), 3, workers)]
    rest = [b[1] for b in batches(make(faces), 3, workers, first=4)]
    assert len(whole) == 6 and len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest))


def test_opencv_has_no_threads_left_when_workers_are_forked(faces):
    import cv2

    cv2.setNumThreads(4)
    assert len(list(batches(make(faces, 4), 2, 1))) == 2
    assert cv2.getNumThreads() == 1


def test_rotated_deep_and_wide_pictures(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 32), (32, 1))
    rotated = Image.fromarray(np.rint(ramp * 255).astype(np.uint8)).convert("RGB")
    rotated.getexif()[0x0112] = 8
    rotated.save(tmp_path / "a.png", exif=rotated.getexif())
    Image.fromarray(np.rint(ramp * 65535).astype(np.uint16)).save(tmp_path / "b.tif")
    Image.fromarray(np.repeat(np.rint(ramp * 255), 3, 1).astype(np.uint8)).save(tmp_path / "c.bmp")
    turned, deep, wide = (read_image(path, 32).astype(int)[..., 0] for path in find_images(tmp_path))
    assert (turned[:, 16] == turned[:, 0]).all() and turned[0, 0] == 255 and turned[-1, 0] == 0
    assert np.abs(deep - ramp * 255).max() < 1
    assert 80 < wide[16, 0] < 90 and 165 < wide[16, -1] < 175  # the middle third, not squeezed


def test_decoded_faces_are_kept_where_all_fit(faces):
    for memory, kept in ((5 * 32 * 32 * 3, 5), (5 * 32 * 32 * 3 - 1, 0)):
        data = Faces(faces, 32, 10, seed=0, memory=memory)
        assert len([data[i] for i in range(10)]) == 10 and len(data.kept) == kept


def test_the_last_incomplete_batch_is_kept_on_request(faces):
    assert sum(len(b[0]) for b in batches(make(faces), 3, 0, keep_rest=True)) == 20


def test_jitter_moves_clean_and_degraded_alike_and_each_time_anew(faces):
    nothing = PRESETS["blind-face"].__class__(sigma=(0.05, 0.05), r=(1, 1), delta=(0, 0), q=(100, 100))
    data = [Faces(faces, 32, 20, seed=0, ranges=nothing, shuffle=False, jitter=j) for j in (0.0, 0.1)]
    still, moved = ([d[i] for i in range(10)] for d in data)
    assert torch.equal(still[0][0], still[5][0]) and not torch.equal(moved[0][0], moved[5][0])
    assert torch.equal(moved[3][0], data[1][3][0]) and moved[3][0].shape == still[3][0].shape
    for clean, degraded in moved:
        difference = torch.einsum("chw,c->hw", clean.float() - degraded.float(), torch.tensor([0.299, 0.587, 0.114]))
        assert difference.abs().mean() < 8


def test_turned_moves_where_it_says():
    image = np.zeros((33, 33, 3), np.uint8)
    image[16, 24] = 255  # eight to the right of the centre
    for arguments, place in (
        ((0, 0, 0, 0), (16, 24)),
        ((math.pi / 2, 0, 0, 0), (8, 16)),
        ((0, 0.5, 0, 0), (16, 28)),
        ((0, 0, 1 / 33, 2 / 33), (18, 25)),
    ):
        found = np.unravel_index(turned(image, *arguments)[..., 0].argmax(), (33, 33))
        assert found == place, arguments


def test_gray_degradations_may_take_the_original_with_them(faces):
    for original in (True, False):
        ranges = dataclasses.replace(PRESETS["pmrf"], gray_prob=1.0, gray_original=original, delta=(0, 0))
        clean, degraded = Faces(faces, 32, 5, seed=0, ranges=ranges, crop=24)[1]
        there = Faces(faces, 32, 5, seed=0, ranges=ranges, crop=24, applied=False)[1]
        on_device = degraded_crops(there[0][None], [there[1]])
        for x, y in ((clean, degraded), (on_device[0][0], on_device[1][0])):
            assert x.shape == y.shape == (3, 24, 24) and x.dtype == torch.uint8
            assert torch.equal(y[0], y[1]) and torch.equal(x[0], x[2]) == original
        assert torch.equal(clean, Faces(faces, 32, 5, seed=0, ranges=ranges, crop=24)[1][0])
