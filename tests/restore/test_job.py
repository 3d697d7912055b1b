"""The job: every photo ends as a file or as a line, whatever happens to the others."""

import hashlib
import json
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpmrf_fast.engine import Restored
from lpmrf_fast.pipeline import LatentPMRFPipeline, NonFiniteError
from lpmrf_fast.restore import JobError, job, restore_files
from lpmrf_fast.restore.job import photo_seed


class Counting:
    """A pipeline whose engine records its batches; `trouble(photos)` may raise before they run."""

    def __init__(self, pipe, trouble=lambda photos: None):
        self.pipe, self.trouble, self.batches = pipe, trouble, []
        self.device, self.padded_size = pipe.device, pipe.padded_size

    def engine(self, **options):
        engine = self.pipe.engine(**options)
        compute = engine._compute

        def counted(plan, photos, *rest):
            self.batches.append([tuple(photo.shape[1:]) for photo in photos])
            self.trouble(photos)
            return compute(plan, photos, *rest)

        engine._compute = counted
        return engine


@pytest.fixture
def photos(tmp_path, picture, monkeypatch):
    """photos/{a.png, b.png, sub/c.png} of 64x64, in the current folder."""
    top = tmp_path / "photos"
    (top / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        picture(i).save(top / name)
    monkeypatch.chdir(tmp_path)
    return top


def restore(pipe, sources=("photos",), output="out", **options):
    return restore_files(sources, output, lambda: pipe, **{"num_inference_steps": 1, **options})


def manifest(output="out") -> dict[str, dict]:
    """Output → the last line of it."""
    lines = Path(output, "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["output"]: entry for entry in map(json.loads, lines)}


def files(folder="out") -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---- what comes out


def test_the_tree_is_mirrored_and_each_photo_is_what_the_pipeline_makes_of_it(pipe, photos):
    report = restore(pipe, seed=3)
    assert (report.restored, report.skipped, report.failures) == (3, 0, [])
    assert files() == ["a.png", "b.png", "manifest.jsonl", "sub/c.png"]
    for name in ("a.png", "sub/c.png"):
        digest = hashlib.sha256((photos / name).read_bytes()).hexdigest()
        alone = pipe(Image.open(photos / name), 1, seed=photo_seed(3, digest))
        assert np.array_equal(pixels(f"out/{name}"), np.asarray(alone.images[0]))


def test_the_manifest_says_all_that_a_repetition_needs(pipe, photos):
    restore(pipe, seed=3, settings={"model": "tiny"}, posterior_mean=True)
    entry = manifest()["out/sub/c.png"]
    digest = hashlib.sha256((photos / "sub/c.png").read_bytes()).hexdigest()
    assert entry.pop("seconds") > 0
    assert entry.pop("version")
    assert entry == {
        "input": "photos/sub/c.png",
        "input_sha256": digest,
        "output": "out/sub/c.png",
        "posterior_mean": "out-posterior-mean/sub/c.png",
        "size": [64, 64],
        "settings": {"model": "tiny", "num_inference_steps": 1, "seed": 3},
        "seed": photo_seed(3, digest),
        "error": None,
        "device": "cpu",
    }


def test_noise_follows_the_content_not_the_name_or_the_company(pipe, photos):
    restore(pipe, batch_size=3)
    (photos / "b.png").rename(photos / "z.png")
    restore(pipe, ["photos/z.png"], "alone")
    assert np.abs(pixels("out/b.png").astype(int) - pixels("alone/z.png")).max() <= 1  # batches may round otherwise
    assert manifest()["out/b.png"]["seed"] == manifest("alone")["alone/z.png"]["seed"]
    assert len({entry["seed"] for entry in manifest().values()}) == 3
    restore(pipe, ["photos/z.png"], "other", seed=1)
    assert manifest("other")["other/z.png"]["seed"] != manifest("alone")["alone/z.png"]["seed"]
    assert not np.array_equal(pixels("other/z.png"), pixels("alone/z.png"))


def test_posterior_means_are_written_beside(pipe, photos):
    restore(pipe, ["photos"], posterior_mean=True)
    assert files("out-posterior-mean") == ["a.png", "b.png", "sub/c.png"]
    mean = pipe(Image.open(photos / "a.png"), 1).posterior_means[0]
    assert np.array_equal(pixels("out-posterior-mean/a.png"), np.asarray(mean))


def test_alpha_and_size_survive_the_way(pipe, photos, picture):
    image = picture(5, size=(70, 41), mode="RGBA")
    image.save("x.png")
    restore(pipe, ["x.png"])
    result = Image.open("out/x.png")
    assert result.size == (70, 41)
    assert np.array_equal(np.asarray(result)[..., 3], np.asarray(image)[..., 3])


def test_one_photo_into_one_file(pipe, photos):
    report = restore(pipe, ["photos/a.png"], "new/face.jpg", posterior_mean=True)
    assert report.restored == 1
    assert files("new") == ["face-posterior-mean.jpg", "face.jpg"]
    with pytest.raises(JobError, match="out.png is a file name and there are 3 photos"):
        restore(pipe, ["photos"], "out.png")


def test_mixed_sizes_run_in_batches_of_one_padded_size(pipe, photos, picture):
    for i in range(5):
        picture(i, size=(100 + i, 70)).save(photos / f"wide{i}.png")
    counting = Counting(pipe)
    report = restore(counting, batch_size=2)
    assert report.restored == 8
    assert sorted(len(batch) for batch in counting.batches) == [1, 1, 2, 2, 2]
    for batch in counting.batches:
        assert len({pipe.padded_size(*size) for size in batch}) == 1
    assert all(pixels(f"out/wide{i}.png").shape == (70, 100 + i, 3) for i in range(5))


def test_few_photos_are_held_in_memory_when_every_size_is_another(photos, picture, monkeypatch):
    for i in range(60):
        picture(i, size=(64 + i, 64)).save(photos / f"{i:02}.png")

    class Echo:
        device = torch.device("cpu")

        def padded_size(self, height, width):
            return height, width

        def engine(self, batch_size, **_):
            self.batch_size = batch_size
            return self

        def limit(self, height, width):
            return self.batch_size

        def submit(self, images, *_):
            held.append(len(decoded) - len(list(Path("out").rglob("*.png"))))
            future = Future()
            future.set_result(Restored(images, images, torch.ones(len(images), dtype=torch.bool)))
            return future

        def close(self, cancel):
            pass

    decode = job.decode
    decoded, held = [], []
    monkeypatch.setattr(job, "decode", lambda path, limit: (decoded.append(path), decode(path, limit))[1])
    assert restore(Echo(), batch_size=2).restored == 63
    # decoded ahead, waiting for company, in the engine, being written
    assert max(held) <= (4 + 2) + job.WINDOW * 2 + (job.AHEAD + 1) * 2 + (4 + 2)


# ---- again


def test_existing_outputs_are_skipped_unless_told_otherwise(pipe, photos):
    restore(pipe)
    before = {name: (os.stat(f"out/{name}").st_mtime_ns, os.stat(f"out/{name}").st_ino) for name in files()}

    def must_not_load():
        raise AssertionError("nothing is to do")

    report = restore_files(["photos"], "out", must_not_load, num_inference_steps=1)
    assert (report.restored, report.skipped, report.outdated) == (0, 3, 0)
    assert before == {name: (os.stat(f"out/{name}").st_mtime_ns, os.stat(f"out/{name}").st_ino) for name in files()}
    Image.new("RGB", (9, 9)).save("out/a.png")
    report = restore(pipe, overwrite=True)
    assert (report.restored, report.skipped) == (3, 0)
    assert pixels("out/a.png").shape == (64, 64, 3)


def test_outputs_of_other_settings_are_skipped_and_said(pipe, photos):
    restore(pipe)
    report = restore(pipe, num_inference_steps=2)
    assert (report.skipped, report.outdated) == (3, 3)
    assert "made with other settings; --overwrite" in str(report)


def test_a_missing_posterior_mean_is_made(pipe, photos):
    restore(pipe)
    assert restore(pipe, posterior_mean=True).restored == 3
    assert restore(pipe, posterior_mean=True).skipped == 3


def test_an_interrupted_job_leaves_whole_files_and_goes_on(pipe, photos, monkeypatch):
    submit, submitted = job.Runner.submit, []

    def interrupt(self, works):
        submitted.append(len(works))
        if len(submitted) == 2:
            raise KeyboardInterrupt
        return submit(self, works)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job.Runner, "submit", interrupt)
        restore(pipe)
    assert files() in (["a.png", "manifest.jsonl"], ["manifest.jsonl"])  # the write of a.png may not have begun
    assert not [name for name in os.listdir("out") if name.endswith(".part")]
    assert not [t.name for t in threading.enumerate() if "lpmrf" in t.name]
    report = restore(pipe)
    assert report.restored + report.skipped == 3
    restore(pipe, output="uninterrupted")
    for name in ("a.png", "b.png", "sub/c.png"):
        assert np.array_equal(pixels(f"out/{name}"), pixels(f"uninterrupted/{name}"))


def test_a_manifest_that_was_cut_off_is_continued(pipe, photos):
    restore(pipe, ["photos/a.png"])
    with open("out/manifest.jsonl", "a") as file:
        file.write('{"input": "photos/b.p')
    restore(pipe)
    lines = Path("out/manifest.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["output"] == "out/a.png"
    assert {json.loads(line)["output"] for line in lines[2:]} == {"out/b.png", "out/sub/c.png"}


# ---- trouble


def test_bad_photos_are_lines_and_the_others_are_finished(pipe, photos):
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.jpg").write_text("this is not a photo")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:-200])
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    logged = []
    report = restore(pipe, ["photos", "missing.png", "none*.png"], log=logged.append, batch_size=2)
    assert report.restored == 3
    assert files() == ["a.png", "b.png", "manifest.jsonl", "sub/c.png"]
    expected = {
        "photos/empty.png": "empty",
        "photos/text.jpg": "not an image",
        "photos/cut.png": "truncated",
        "photos/dot.png": "only 1x1",
        "missing.png": "no such file",
        "none*.png": "0 files matched",
    }
    assert {f.path for f in report.failures} == set(expected)
    assert all(expected[f.path] in f.error and "\n" not in f.error for f in report.failures)
    assert sorted(logged) == sorted(map(str, report.failures))
    assert "3 restored, 6 failed" in str(report)
    entry = manifest()["out/empty.png"]
    assert "empty" in entry["error"] and entry["input_sha256"] is None


def test_an_output_that_cannot_be_written_fails_alone(pipe, photos):
    Path("out").mkdir()
    Path("out/sub").write_text("in the way")
    Path("out/a.png").mkdir()
    report = restore(pipe, overwrite=True)
    assert report.restored == 1
    assert {f.path for f in report.failures} == {"photos/a.png", "photos/sub/c.png"}
    assert all("cannot be written" in f.error for f in report.failures)


def test_an_output_folder_that_cannot_be_made_stops_the_job_before_it_loads(photos):
    Path("out").write_text("a file")

    def must_not_load():
        raise AssertionError("the output is unusable")

    for output in ("out", "out/below", "out/face.png"):
        with pytest.raises(JobError, match=f"the output {output} cannot be written .*choose another -o"):
            restore_files(["photos/a.png"], output, must_not_load)


def test_photos_are_never_overwritten(pipe, photos):
    before = {name: (photos / name).read_bytes() for name in files(photos)}
    report = restore(pipe, output="photos", overwrite=True)
    assert report.restored == 0 and len(report.failures) == 3
    assert all("overwrite the photo itself" in f.error for f in report.failures)
    assert {name: (photos / name).read_bytes() for name in before} == before


def test_a_batch_that_runs_out_of_memory_is_halved_and_the_ceiling_remembered(pipe, photos, picture):
    for i in range(10, 19):
        picture(i).save(photos / f"{i}.png")

    def trouble(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    counting = Counting(pipe, trouble)
    report = restore(counting, batch_size=8)
    assert (report.restored, report.failures) == (12, [])
    assert [len(batch) for batch in counting.batches] == [8, 4] + [2] * 6  # never more than two again


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_photo_that_is_too_large_for_memory_fails_alone(pipe, photos, picture, error):
    picture(size=(128, 64)).save(photos / "large.png")

    def trouble(images):
        if images[0].shape[2] == 128:
            raise error

    report = restore(Counting(pipe, trouble), batch_size=2)
    assert report.restored == 3
    (failure,) = report.failures
    assert failure.path == "photos/large.png"
    assert "out of memory at 128x64 pixels" in failure.error


def test_an_error_of_one_photo_does_not_fail_its_batch(pipe, photos):
    wrong = pixels(photos / "b.png")

    def trouble(images):
        if any(np.array_equal(image.permute(1, 2, 0), wrong) for image in images):
            raise RuntimeError("some kernel\nfailed")

    report = restore(Counting(pipe, trouble), batch_size=3)
    assert report.restored == 2
    assert [str(f) for f in report.failures] == ["photos/b.png: RuntimeError: some kernel failed"]


def test_a_result_that_is_not_finite_fails_alone(pipe, photos, picture):
    Image.new("RGB", (64, 64), "white").save(photos / "b.png")

    class Poisoned(torch.nn.Module):
        multiple = pipe.posterior_mean.multiple

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, y):
            white = (y == 1).flatten(1).all(1)
            return torch.where(white[:, None, None, None], torch.nan, self.network(y))

    poisoned = LatentPMRFPipeline(Poisoned(pipe.posterior_mean), pipe.vae, pipe.velocity)
    with pytest.raises(NonFiniteError):
        poisoned(Image.open(photos / "b.png"), 1)
    report = restore(poisoned, batch_size=3)
    assert files() == ["a.png", "manifest.jsonl", "sub/c.png"]
    (failure,) = report.failures
    assert failure.path == "photos/b.png" and "not finite" in failure.error and "--dtype fp32" in failure.error


def test_no_photos_is_a_failure_and_loads_nothing(photos):
    Path("nothing").mkdir()
    report = restore_files(["nothing"], "out", lambda: pytest.fail("nothing is to do"))
    assert [str(f) for f in report.failures] == [
        "nothing: 0 files matched; PNG, JPEG, WebP, BMP and TIFF files are looked for"
    ]
    assert not Path("out").exists()


# ---- progress


def test_progress_is_quiet_where_stderr_is_no_terminal(pipe, photos, capfd):
    restore(pipe)
    assert capfd.readouterr().err == ""


def test_progress_shows_rate_and_time_left_on_a_terminal(pipe, photos, capfd, monkeypatch):
    monkeypatch.setattr(job.sys.stderr, "isatty", lambda: True, raising=False)
    restore(pipe)
    text = capfd.readouterr().err
    assert "3/3" in text and "images/s" in text
