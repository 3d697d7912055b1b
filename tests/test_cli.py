"""The command: what people type, what they read, and the exit status."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpmrf_fast import cli


@pytest.fixture
def model(pipe, tmp_path):
    return str(pipe.save_pretrained(tmp_path / "model"))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/{a.png, b.jpg}, 64x64, in the current folder."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    for name, pixels in zip(("a.png", "b.jpg"), noise):
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(f"photos/{name}")


@pytest.fixture
def run(capfd):
    """run(*arguments) → (exit status, stdout, lines of stderr), in this process."""

    def call(*arguments):
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return status, out, err.splitlines()

    return call


def command(*arguments, code=None, **environment):
    """`python -m lpmrf_fast ...`, or python code, in a process of its own."""
    root = Path(cli.__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("LPMRF_") and k != "OMP_WAIT_POLICY"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    start = ["-c", code] if code else ["-m", "lpmrf_fast"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)], env={**env, **environment}, capture_output=True, text=True
    )


# ---- restore


def test_restore(run, photos, model):
    status, out, err = run("restore", "photos", "-o", "out", "--model", model, "--steps", 2, "--seed", 7)
    assert (status, err) == (0, [])
    assert out.startswith("2 restored, ") and out.endswith("images/s → out\n")
    assert sorted(os.listdir("out")) == ["a.png", "b.jpg", "manifest.jsonl"]
    entry = json.loads(Path("out/manifest.jsonl").read_text().splitlines()[0])
    assert entry["settings"] == {"model": model, "dtype": "auto", "num_inference_steps": 2, "seed": 7}
    status, out, err = run("restore", "photos", "-o", "out", "--model", model, "--steps", 2, "--seed", 7)
    assert (status, out, err) == (0, "2 skipped (already there; --overwrite makes them again) → out\n", [])


def test_every_option_reaches_the_job(run, photos, model, monkeypatch):
    from lpmrf_fast import restore
    from lpmrf_fast.pipeline import Pipeline

    seen, loaded = {}, {}

    def job(sources, output, load_pipeline, **options):
        seen.update(options, sources=sources, output=output)
        load_pipeline()
        return restore.Report(output)

    monkeypatch.setattr(restore, "restore_files", job)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda name, **options: loaded.update(options, name=name))
    options = "--offline --device cpu:0 --steps 3 --seed 4 --batch-size 5 --dtype bf16"
    options += " --ext webp --posterior-mean --overwrite --max-pixels 100M --max-memory 8GB"
    status, *_ = run("restore", "photos", "-o", "out", "--model", model, *options.split())
    assert status == 0 and seen.pop("log")
    assert loaded == {"name": model, "dtype": "bf16", "device": "cpu:0", "local_files_only": True}
    assert seen == {
        "sources": ["photos"],
        "output": Path("out"),
        "num_inference_steps": 3,
        "seed": 4,
        "batch_size": 5,
        "ext": "webp",
        "posterior_mean": True,
        "overwrite": True,
        "max_pixels": 100_000_000,
        "max_memory": "8GB",
        "settings": {"model": model, "dtype": "bf16"},
    }


@pytest.mark.parametrize(
    "words",
    ["a -o o b c", "-o o a b c", "a b c -o o", "-i a b -o o c", "a --steps 3 b -o o c", "-i a -i b c --overwrite -o o"],
)
def test_photos_may_stand_anywhere(words):
    args = cli.parse(["restore", *words.split()])
    assert (sorted(args.sources), args.output) == (["a", "b", "c"], Path("o"))


def promise(path: str, width: int, height: int) -> None:
    """A PNG whose header promises that many pixels."""
    data = bytearray(Path("photos/a.png").read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    Path(path).write_bytes(data)


def test_a_folder_of_bad_photos_is_one_line_each(photos, model):
    """The command as people run it: no traceback, the others finished, status 1."""
    Path("photos/zero.png").write_bytes(b"")
    Path("photos/text.png").write_text("not an image at all")
    Path("photos/cut.png").write_bytes(Path("photos/a.png").read_bytes()[:200])
    Image.new("RGB", (1, 1)).save("photos/dot.png")
    promise("photos/large.png", 10_000, 10_000)
    promise("photos/bomb.png", 200_000, 200_000)
    result = command("restore", "photos", "missing.png", "-o", "out", "--model", model, "--steps", 1, "--dtype", "fp32")
    assert result.returncode == 1
    assert sorted(os.listdir("out")) == ["a.png", "b.jpg", "manifest.jsonl"]
    lines = dict(line.removeprefix("lpmrf-fast: ").split(": ", 1) for line in result.stderr.splitlines())
    expected = {
        "photos/zero.png": "the file is empty; get it again",
        "photos/text.png": "convert it first",
        "photos/cut.png": "get the file again",
        "photos/dot.png": "at least 16 on each side",
        "photos/large.png": "10000x10000 pixels, over the limit of 4194304; crop it to the face, or raise",
        "photos/bomb.png": "200000x200000 pixels, over the limit of 4194304; crop it to the face, or raise",
        "missing.png": "no such file; check the path",
    }
    assert lines.keys() == expected.keys()
    assert [path for path in expected if expected[path] not in lines[path]] == []
    assert result.stdout.startswith("2 restored, 7 failed, ")


def test_odd_but_sound_photos_are_restored(run, tmp_path, photos, model):
    shutil.rmtree("photos")
    os.mkdir("photos")
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save("photos/rotated.jpg", exif=exif)
    rgb.convert("CMYK").save("photos/cmyk.jpg")
    rgb.convert("RGBA").save("photos/alpha.png")
    rgb.convert("P").save("photos/palette.png")
    Image.fromarray(np.full((48, 80), 40_000, np.uint16)).save("photos/sixteen.png")
    status, out, err = run("restore", "photos", "-o", "out", "--model", model, "--steps", 1)
    assert (status, err) == (0, [])
    found = {path.name: (Image.open(path).size, Image.open(path).mode) for path in Path("out").glob("*.*g")}
    assert found == {
        "rotated.jpg": ((48, 80), "RGB"),
        "cmyk.jpg": ((80, 48), "RGB"),
        "alpha.png": ((80, 48), "RGBA"),
        "palette.png": ((80, 48), "RGB"),
        "sixteen.png": ((80, 48), "RGB"),
    }


def test_an_unwritable_output(run, photos, model):
    Path("out").write_text("a file in the way")
    status, out, (line,) = run("restore", "photos", "-o", "out", "--model", model)
    assert (status, out) == (2, "")
    assert line.startswith("lpmrf-fast: the output out cannot be written") and "choose another -o" in line


def damaged(model: str, how: str) -> str:
    folder = Path(model)
    weights = folder / "model.safetensors"
    if how == "no such folder":
        return "nowhere/at/all"
    if how == "no config":
        (folder / "config.json").unlink()
        weights.unlink()
    if how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    if how == "no weights":
        weights.unlink()
    if how == "config of another":
        config = json.loads((folder / "config.json").read_text())
        config["modules"]["vae"]["config"]["latent_channels"] = 8
        (folder / "config.json").write_text(json.dumps(config))
    if how == "no JSON":
        (folder / "config.json").write_text("{")
    if how == "a photo":
        return "photos/a.png"
    return model


@pytest.mark.parametrize(
    "how", ["no such folder", "no config", "cut weights", "no weights", "config of another", "no JSON", "a photo"]
)
def test_a_wrong_or_damaged_checkpoint(run, photos, model, how):
    name = damaged(model, how)
    status, out, err = run("restore", "photos", "-o", "out", "--model", name)
    assert (status, out) == (2, "")
    assert len(err) == 1 and err[0].startswith("lpmrf-fast: ") and name in err[0]


def test_an_unknown_model_while_offline(photos):
    result = command("restore", "photos", "-o", "out", "--model", "nobody/no-such-model", HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "nobody/no-such-model" in line and "local folder" in line


# ---- arguments


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "COMMAND"),
        (["embellish"], "embellish"),
        (["restore", "a.png"], "-o/--output"),
        (["restore", "a.png", "-o", "o", "--max-memory", "much"], "such as 8GB or 800MiB"),
        (["restore", "a.png", "-o", "o", "--max-memory", "0GB"], "such as 8GB or 800MiB"),
        (["doctor", "--plan", "0"], "a size in pixels such as 512 or 640x480"),
        (["doctor", "--plan", "512x"], "a size in pixels such as 512 or 640x480"),
        (["restore", "-o", "out"], "no photos given"),
        (["restore", "a.png", "-o", "out", "--stepz", "3"], "--stepz"),
        (["restore", "a.png", "-o", "out", "--steps", "0"], "at least 1 step, got '0'"),
        (["restore", "a.png", "-o", "out", "--steps", "many"], "got 'many'"),
        (["restore", "a.png", "-o", "out", "--steps", "2.5"], "got '2.5'"),
        (["restore", "a.png", "-o", "out", "--batch-size", "-1"], "at least 1 photo, got '-1'"),
        (["restore", "a.png", "-o", "out", "--seed", str(2**63)], "2**63 - 1"),
        (["restore", "a.png", "-o", "out", "--device", "toaster"], "got 'toaster'"),
        (["restore", "a.png", "-o", "out", "--dtype", "int8"], "int8"),
        (["restore", "a.png", "-o", "out", "--ext", "gif"], "gif"),
        (["restore", "a.png", "-o", "out", "--max-pixels", "0"], "100M, got '0'"),
        (["demo", "out.png"], "out.png"),
        (["demo", "-o", "out.txt"], "got 'out.txt'"),
        (["doctor", "photos"], "photos"),
        (["train", "vae"], "--config"),
        (["train", "gan", "--config", "x.yaml"], "gan"),
    ],
)
def test_unusable_arguments_are_one_line_and_status_2(run, arguments, word):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert len(err) == 1 and err[0].startswith("lpmrf-fast: ") and word in err[0]


@pytest.mark.parametrize(
    "options", ["--device cuda:99", "--device xpu:99", "--device mps:99", "--device cpu:7", "--dtype fp16 --device cpu"]
)
def test_what_this_machine_cannot_do_is_one_line_and_status_2(run, photos, model, options):
    for command in ("restore photos -o out", "restore no-such-photo.png -o out", "demo -o out.png"):
        status, out, (line,) = run(*command.split(), "--model", model, *options.split())
        assert (status, out) == (2, "") and line.startswith("lpmrf-fast: ")
    if "--dtype" not in options:
        status, out, (line,) = run("evaluate", "photos", "--reference", "photos", *options.split())
        assert (status, out) == (2, "") and "use 'auto' or 'cpu'" in line
        settings = f"device={options.split()[1]} train=photos val=photos out=run"
        status, out, (line,) = run("train", "vae", "--config", "demo-vae", "--set", *settings.split())
        assert (status, out) == (2, "") and "use 'auto' or 'cpu'" in line
    else:
        status, out, (line,) = run("doctor", "--plan", "64", "--model", model, *options.split())
        assert (status, out) == (2, "") and "float16" in line


def test_the_cli_repeats_only_what_the_library_says():
    from lpmrf_fast.convert import FORMS
    from lpmrf_fast.pipeline import DTYPES
    from lpmrf_fast.restore import DEFAULT_MAX_PIXELS
    from lpmrf_fast.training.config import STAGES

    assert cli.DEFAULT_MAX_PIXELS == DEFAULT_MAX_PIXELS
    assert cli.STAGES == STAGES
    assert cli.FORMS == FORMS
    assert set(cli.DTYPES) - {"auto"} <= set(DTYPES)


def test_help_names_defaults_and_examples(run):
    status, out, err = run("restore", "--help")
    assert (status, err) == (0, [])
    assert "(default: 25)" in out and "(default: 0)" in out and "(default: auto)" in out and "examples:" in out
    for name in ("demo", "doctor", "train", "convert", "evaluate", "tune"):
        assert run(name, "--help")[0] == 0


def test_help_is_fast_because_it_imports_no_torch():
    code = "import sys; from lpmrf_fast.cli import main\n"
    code += "try: main(['restore', '--help'])\nfinally: print('torch' in sys.modules, 'numpy' in sys.modules)"
    started = time.monotonic()
    result = command(code=code)
    assert result.stdout.endswith("False False\n")
    assert time.monotonic() - started < 10


def test_thread_and_page_settings_are_made_before_torch_unless_set():
    code = "import os, sys; from lpmrf_fast import cli\n"
    code += "names = 'THP_MEM_ALLOC_ENABLE', 'OMP_WAIT_POLICY'\n"
    code += "show = lambda: print('torch' in sys.modules, *map(os.environ.get, names))\n"
    code += "cli.train, cli.doctor = lambda args: show(), lambda args: show()\n"
    code += "cli.main(sys.argv[1:])"
    training = ("train", "vae", "--config", "demo-vae")
    assert command("doctor", code=code).stdout == "False 1 None\n"
    assert command(*training, code=code).stdout == "False 1 passive\n"
    assert command(*training, code=code, OMP_WAIT_POLICY="active").stdout == "False 1 active\n"
    assert command("doctor", code=code, THP_MEM_ALLOC_ENABLE="0").stdout == "False 0 None\n"


def test_version(run):
    status, out, err = run("--version")
    assert (status, err) == (0, []) and out.startswith("lpmrf-fast ")


# ---- trouble


def test_train_hands_over(run, monkeypatch):
    from lpmrf_fast import training

    seen = []
    monkeypatch.setattr(training, "run", lambda *args: seen.append(args))
    for words in (["--set", "steps=3", "--set", "lr=1e-4"], ["--set", "steps=3", "lr=1e-4"]):
        assert run("train", "flow", "--config", "flow.yaml", *words)[0] == 0
        assert seen.pop() == ("flow", Path("flow.yaml"), ["steps=3", "lr=1e-4"])


def test_convert_says_what_a_checkpoint_is_and_writes_another(run, photos, model):
    status, out, err = run("convert", model)
    assert (status, err) == (0, []) and "lpmrf-fast LatentPMRFPipeline" in out and "velocity        LooUFormer, " in out
    status, out, err = run("convert", model, "one.safetensors")
    assert (status, err) == (0, []) and out.splitlines()[-1] == "written: one.safetensors"
    status, out, err = run("restore", "photos", "-o", "out", "--steps", "1", "--model", "one.safetensors")
    assert (status, err) == (0, [])
    status, out, (line,) = run("convert", model, "one.safetensors", "--to", "diffusers")
    assert (status, out) == (2, "") and "one.safetensors: exists, and is not overwritten" in line
    status, out, (line,) = run("convert", "photos/a.png")
    assert (status, out) == (2, "") and "photos/a.png: not a checkpoint; give a folder" in line


def test_a_missing_training_config_is_one_line(run, tmp_path):
    status, out, err = run("train", "vae", "--config", tmp_path / "none.yaml")
    assert (status, out, len(err)) == (2, "", 1) and "none.yaml" in err[0]


def fail_with(monkeypatch, error):
    def command(args):
        raise error

    monkeypatch.setattr(cli, "doctor", command)


def test_interrupting_is_no_traceback(run, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    status, out, (line,) = run("doctor")
    assert status == 130 and "interrupted" in line


def test_messages_of_several_lines_become_one(run, monkeypatch):
    fail_with(monkeypatch, ValueError("first\n  second"))
    assert run("doctor") == (1, "", ["lpmrf-fast: first second"])


def test_a_fault_of_ours_says_its_kind_and_where_to_see_more(run, monkeypatch):
    fail_with(monkeypatch, KeyError("x"))
    assert run("doctor") == (1, "", ["lpmrf-fast: KeyError: 'x' (LPMRF_DEBUG=1 shows where)"])
    with pytest.raises(KeyError):
        cli.main(["doctor", "--debug"])
    monkeypatch.setenv("LPMRF_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["doctor"])
