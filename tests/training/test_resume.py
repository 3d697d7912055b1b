"""Whatever ends a run, the same command goes on from the last good checkpoint and ends with the same weights."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("yaml")
pytest.importorskip("accelerate")
from lpmrf_fast.checkpoint import load_model
from lpmrf_fast.training.config import ConfigError, TrainConfig
from lpmrf_fast.training.data import find_images
from lpmrf_fast.training.trainer import Stopped, Trainer, learning_rate

ROOT = Path(__file__).parents[2]
VAE = dict(
    down_block_types=["EncoderBlock2D"] * 2,
    up_block_types=["DecoderBlock2D"] * 2,
    block_out_channels=[8, 8],
    layers_per_block=1,
    layers_mid_block=1,
    latent_channels=4,
)
CRITIC = dict(adversarial_weight=0.3, latent_noise=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def config(folder, out, **options):
    base = dict(
        train=str(folder), out=str(out), model=VAE, size=32, crop=16, steps=7, batch_size=4, workers=0,
        precision="fp32", tracker="none", device="cpu", warmup=1, lr=2e-3, log_every=1, save_every=2, ema_decay=0.5,
    )  # fmt: skip
    return TrainConfig(**{**base, **options})


def weights(trainer):
    """Everything that a resume must bring back, by name."""
    found = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    optimizers = trainer.optimizers | ({"critic": trainer.critic_optimizer} if trainer.critic_optimizer else {})
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    if trainer.stage.critic:
        found |= {f"critic.{k}": v for k, v in trainer.stage.critic.state_dict().items()}
    return found


def assert_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def fail_at(trainer, step, error):
    honest = trainer.stage.loss

    def loss(*args):
        if trainer.step == step:
            raise error
        return honest(*args)

    trainer.stage.loss = loss


# ---- exact resume


@pytest.mark.parametrize(
    "options",
    [{}, CRITIC, dict(accumulate=2), dict(precision="bf16", jitter=0.05)],
    ids=["plain", "critic", "accumulated", "bf16 and jitter"],
)
def test_killed_at_any_step_and_resumed_ends_alike(folder, tmp_path, options):
    whole = Trainer("vae", config(folder, tmp_path / "whole", **options))
    whole.fit()
    for step in (1, 3, 4, 6) if not options else (3, 4):
        out = tmp_path / f"killed-{step}"
        broken = Trainer("vae", config(folder, out, **options))
        fail_at(broken, step, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            broken.fit()
        resumed = Trainer("vae", config(folder, out, **options))
        assert resumed.step == step // 2 * 2
        resumed.fit()
        assert_same(whole, resumed)
        assert [s.get_last_lr() for s in whole.schedulers] == [s.get_last_lr() for s in resumed.schedulers]
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6, 7]  # none twice


def test_muon_resumes_exactly(folder, tmp_path):
    swinir = dict(img_size=8, embed_dim=16, depths=[1], num_heads=[2], window_size=4, sf=1, upsampler="")
    options = dict(model=swinir, crop=None, optimizer="muon", save_every=3)
    whole, broken = (Trainer("posterior-mean", config(folder, tmp_path / name, **options)) for name in "ab")
    whole.fit()
    fail_at(broken, 4, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = Trainer("posterior-mean", config(folder, tmp_path / "b", **options))
    assert resumed.step == 3
    resumed.fit()
    assert any(name.startswith("muon.") for name in weights(whole))
    assert_same(whole, resumed)


def started(folder, out, script="", environment=(), **options):
    """A training in a process of its own: `script` runs before fit(), with `t`, the trainer."""
    values = vars(config(folder, out, **options)).copy()
    del values["ranges"]
    code = (
        "import os, signal, torch; torch.set_num_threads(1)\n"
        "from lpmrf_fast.training.config import TrainConfig\n"
        "from lpmrf_fast.training.trainer import Trainer\n"
        f"t = Trainer('vae', TrainConfig(**{values!r}))\n{script}\nt.fit()\n"
        "from lpmrf_fast.training.sharding import gathered\n"
        "torch.save(gathered(t.model.state_dict()), t.out / f'rank{t.rank}.pt')\n"
        "t.close()\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **paths, **dict(environment)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_while_it_saves(folder, tmp_path, monkeypatch):
    """The moment before the new file takes its name: a kill there leaves what an exception leaves."""
    replace = os.replace

    def kill(source, target):
        if "00000004.pt" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        Trainer("vae", config(folder, tmp_path / "out")).fit()
    monkeypatch.undo()
    assert list((tmp_path / "out").glob("*.part"))
    resumed = Trainer("vae", config(folder, tmp_path / "out"))
    assert resumed.step == 2
    resumed.fit()
    assert not list((tmp_path / "out").glob("*.part"))
    whole = Trainer("vae", config(folder, tmp_path / "whole"))
    whole.fit()
    assert_same(whole, resumed)


def test_sigterm_saves_and_exits_with_143(folder, tmp_path):
    script = "save = t.checkpoints.save\n"
    script += "def late(*a):\n    os.kill(os.getpid(), signal.SIGTERM) if t.step == 4 else None\n    return save(*a)\n"
    script += "t.checkpoints.save = late"  # in the middle of a save
    process = started(folder, tmp_path / "out", script, workers=1)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "stopped at step 4, all saved" in said, said
    assert Trainer("vae", config(folder, tmp_path / "out")).step == 4


def test_sigterm_between_saves_saves_the_step_it_is_at(folder, tmp_path):
    trainer = Trainer("vae", config(folder, tmp_path, save_every=100))
    honest = trainer.stage.loss
    trainer.stage.loss = lambda *a: (os.kill(os.getpid(), signal.SIGTERM) if trainer.step == 2 else None, honest(*a))[1]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as end:
        trainer.fit()
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    resumed = Trainer("vae", config(folder, tmp_path, save_every=100))
    assert resumed.step == 3
    assert_same(trainer, resumed)


def test_sigterm_to_every_process_of_the_job(folder, tmp_path):
    """As job managers send it: workers must not die before the trainer has saved."""
    script = (
        "honest = t.stage.loss\n"
        "def loss(*a):\n    os.killpg(0, signal.SIGTERM) if t.step == 2 else None\n    return honest(*a)\n"
        "os.setpgid(0, 0); t.stage.loss = loss"
    )
    process = started(folder, tmp_path / "out", script, workers=2, steps=50, save_every=100)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and "stopped at step 3, all saved" in said, said
    assert Trainer("vae", config(folder, tmp_path / "out", steps=50)).step == 3


# ---- checkpoints


def test_the_last_ones_are_kept_with_their_digests(folder, tmp_path):
    Trainer("vae", config(folder, tmp_path)).fit()
    files = sorted(p.name for p in tmp_path.glob("checkpoint*"))
    names = ["checkpoint-00000006.pt", "checkpoint-00000007.pt"]
    assert files == sorted([*names, *(f"{n}.sha256" for n in names)])


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_newest_one_falls_back_with_a_warning(folder, tmp_path, capsys, damage):
    whole = Trainer("vae", config(folder, tmp_path))
    whole.fit()
    newest = tmp_path / "checkpoint-00000007.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"bit": content, "cut": content[:-100], "empty": b""}[damage])
    resumed = Trainer("vae", config(folder, tmp_path))
    assert resumed.step == 6 and "checkpoint-00000007.pt is damaged" in capsys.readouterr().err
    resumed.fit()
    assert_same(whole, resumed)


def test_no_whole_checkpoint_is_an_error_not_a_new_start(folder, tmp_path):
    (tmp_path / "checkpoint-00000002.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 1 checkpoints is whole"):
        Trainer("vae", config(folder, tmp_path))


@pytest.mark.parametrize("real", [False, True])
def test_a_full_disk_keeps_the_last_good_checkpoint(folder, tmp_path, monkeypatch, real):
    trainer = Trainer("vae", config(folder, tmp_path))
    save, limit = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, file):
        if trainer.step < 4:
            return save(state, file)
        if not real:
            file.write(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # writing really fails
        try:
            save(state, file)
            file.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-00000004.pt: cannot be written.*checkpoint-00000002.pt"):
        trainer.fit()
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(torch, "save", save)
    assert Trainer("vae", config(folder, tmp_path)).step == 2
    assert load_model(tmp_path / "model") is not None


def test_other_shapes_are_refused_by_name(folder, tmp_path):
    Trainer("vae", config(folder, tmp_path, steps=2)).fit()
    other = dict(VAE, block_out_channels=[8, 16])
    with pytest.raises(ConfigError, match=r"of other settings .*\(.*there, \(.*here.*another `out`") as error:
        Trainer("vae", config(folder, tmp_path, model=other))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="of other settings"):
        Trainer("vae", config(folder, tmp_path, frozen_encoder=True))


# ---- what goes wrong on the way


def test_a_loss_that_is_not_a_number_leaves_its_batch(folder, tmp_path):
    trainer = Trainer("vae", config(folder, tmp_path))
    honest = trainer.stage.loss
    trainer.stage.loss = lambda *a: honest(*a) if trainer.step < 3 else (torch.tensor(float("nan")), {})
    with pytest.raises(FloatingPointError, match="nan at step 3; its batch is in nan-batch.pt, .* step 2 is kept"):
        trainer.fit()
    saved = torch.load(tmp_path / "nan-batch.pt", weights_only=True)
    assert saved["step"] == 3 and saved["batch"].shape == (4, 3, 16, 16)


def test_weights_of_a_gradient_that_is_not_a_number_are_never_saved(folder, tmp_path):
    trainer = Trainer("vae", config(folder, tmp_path))
    honest = trainer.stage.loss

    def poisoned(*args):
        loss, terms = honest(*args)
        weight = trainer.model.decoder.conv_out.weight
        return loss + ((weight.sum() * 0).sqrt() if trainer.step == 3 else 0), terms  # 0, its slope 0 · inf

    trainer.stage.loss = poisoned
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 4; .* step 2 is kept"):
        trainer.fit()
    assert "gradient norm" in torch.load(tmp_path / "nan-batch.pt", weights_only=True)
    resumed = Trainer("vae", config(folder, tmp_path))
    assert resumed.step == 2 and all(p.isfinite().all() for p in resumed.model.parameters())


@pytest.mark.parametrize("seen", ["while a batch is fetched", "in the middle of a step"])
def test_a_dead_worker_is_a_clear_error(folder, tmp_path, monkeypatch, seen):
    from lpmrf_fast.training.data import Faces

    honest, stepping = Faces.__getitem__, tmp_path / "stepping"

    def dies(self, n):
        while n == 9:
            if seen == "while a batch is fetched" or stepping.exists():
                os._exit(9)
            time.sleep(0.01)
        return honest(self, n)

    monkeypatch.setattr(Faces, "__getitem__", dies)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    trainer = Trainer("vae", config(folder, tmp_path, workers=1))
    prepare = trainer.stage.prepare

    def waits(batch):
        stepping.touch()
        for worker in multiprocessing.active_children():
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return prepare(batch)

    if seen == "in the middle of a step":
        monkeypatch.setattr(trainer.stage, "prepare", waits)
    with pytest.raises(RuntimeError, match="a data worker died .*fewer `workers`.* goes on from step"):
        trainer.fit()
    assert stepping.exists() == (seen == "in the middle of a step")


def test_an_error_in_a_worker_is_one_line(folder, tmp_path, monkeypatch):
    from lpmrf_fast.training.data import Faces

    def broken(self, n):
        raise ValueError("no such face")

    monkeypatch.setattr(Faces, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="a data worker failed: ValueError: no such face$"):
        Trainer("vae", config(folder, tmp_path, workers=1)).fit()


def test_bad_images_are_left_out_and_listed_once(folder, tmp_path, capsys):
    faces = tmp_path / "faces"
    faces.mkdir()
    for path in find_images(folder):
        (faces / path.name).write_bytes(path.read_bytes())
    (faces / "1b.png").write_bytes(b"no picture")
    (faces / "2b.png").write_bytes((faces / "2.png").read_bytes()[:300])
    Image.new("RGB", (12, 40)).save(faces / "3b.png")
    Trainer("vae", config(faces, tmp_path / "out")).fit()
    lines = (tmp_path / "out/left-out.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [str(faces / f"{n}b.png") for n in (1, 2, 3)]
    assert any("12x40 is smaller than the crop, 16" in line for line in lines)
    assert capsys.readouterr().err.count("left out") == 3


@pytest.mark.parametrize("size", [None, 8])
def test_no_image_that_can_be_used(tmp_path, size):
    (tmp_path / "faces").mkdir()
    if size:
        Image.new("RGB", (size, size)).save(tmp_path / "faces/small.png")
    with pytest.raises((FileNotFoundError, ValueError), match="set `train`" if not size else "none of 1 images can be"):
        Trainer("vae", config(tmp_path / "faces", tmp_path / "out")).fit()


def test_one_image_is_enough(tmp_path):
    (tmp_path / "faces").mkdir()
    Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "faces/one.png")
    Trainer("vae", config(tmp_path / "faces", tmp_path / "out", steps=2)).fit()


def test_shards_train_as_folders_do(folder, tmp_path):
    for name, files in (("a", (0, 1, 2)), ("b", (3, 4))):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"shards/{name}.tar", "w") as tar:
            for i in files:
                tar.add(folder / f"{i}.png", f"{i}.png")
                tar.add(__file__, f"{i}.json")  # what else a sample has is passed over
    one, other = (
        Trainer("vae", config(source, tmp_path / f"{n}", steps=3))
        for n, source in enumerate((folder, tmp_path / "shards"))
    )
    one.fit()
    other.fit()
    assert_same(one, other)
    assert [str(m) for m in find_images(str(tmp_path / "shards/*.tar"))] == [
        str(m) for m in find_images(tmp_path / "shards")
    ]
    (tmp_path / "shards/c.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="c.tar: cannot be read as a plain tar"):
        find_images(tmp_path / "shards")


# ---- the loop's options


def test_accumulated_parts_make_the_gradient_of_the_whole_batch(folder, tmp_path):
    """Noise included: that of a sample does not depend on the part that it is in."""
    options = dict(steps=1, warmup=0, ema_decay=0.0, recolour=0.5)
    whole, parts = (Trainer("vae", config(folder, tmp_path / str(n), accumulate=n, **options)) for n in (1, 4))
    for trainer in (whole, parts):
        trainer.fit()
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    said = [json.loads((tmp_path / n / "log.jsonl").read_text()) for n in "14"]
    assert all(said[0][name] == pytest.approx(said[1][name], rel=1e-4) for name in ("l1", "kl", "grad_norm"))
    with pytest.raises(ConfigError, match="multiple of 1 processes x 3"):
        Trainer("vae", config(folder, tmp_path / "odd", accumulate=3))


def processes(folder, out, port, **options):
    """Two processes with gloo → their weights."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    shared["MASTER_PORT"] = str(20000 + (os.getpid() + port) % 20000)
    run = [
        started(folder, out, environment={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **options) for r in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in run]
    assert [process.returncode for process in run] == [0, 0], said
    return [torch.load(out / f"rank{r}.pt", weights_only=True) for r in range(2)]


def assert_near(a, b):
    # On average: Adam's steps of 2e-3 follow the sign of gradients near zero, which the order of sums decides.
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert apart.mean() < 5e-5 and (apart > 1e-4).float().mean() < 0.05


def test_processes_share_a_step(folder, tmp_path):
    """Both end alike, and as one process that takes the whole batch, or two parts of it beside the critic."""
    for i, (accumulate, options) in enumerate(((1, dict(recolour=0.5)), (2, CRITIC))):
        out = tmp_path / str(i)
        a, b = processes(folder, out / "two", i, steps=2, **options)
        one = Trainer("vae", config(folder, out / "one", steps=2, accumulate=accumulate, **options))
        one.fit()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert_near(a, one.model.state_dict())
        said = [[json.loads(line) for line in open(out / n / "log.jsonl")] for n in ("one", "two")]
        for x, y in zip(*said):  # the log has the means over the processes; the critic's norms look at every part
            assert all(x[name] == pytest.approx(y[name], rel=1e-2 if i else 1e-4) for name in ("l1", "kl", "grad_norm"))


def test_sharded_processes_go_on_from_one_and_one_from_them(folder, tmp_path):
    options = dict(accumulate=2, decay=0.0, val=str(folder), val_every=4)
    whole = Trainer("vae", config(folder, tmp_path / "whole", **options))
    whole.fit()
    Trainer("vae", config(folder, tmp_path / "parts", steps=2, **options)).fit()
    a, b = processes(folder, tmp_path / "parts", 5, fsdp=True, **(options | dict(accumulate=1, steps=4)))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "parts/val-000004.png").exists()
    last = Trainer("vae", config(folder, tmp_path / "parts", **options))
    assert last.step == 4
    last.fit()
    assert_near(last.model.state_dict(), whole.model.state_dict())
    assert_near(load_model(tmp_path / "parts/model").state_dict(), load_model(tmp_path / "whole/model").state_dict())


def test_schedules():
    def at(step, **options):
        options = dict(out="x", model={}, steps=1000, warmup=100, lr=1e-4) | options
        return learning_rate(step, TrainConfig(**options))

    assert at(500, schedule="constant") == at(999, schedule="constant") == 1 and at(49, schedule="constant") == 0.5
    cosine = dict(schedule="cosine", warmup_from=0.1, lr_min=1e-6, cycle=2000)
    assert at(0, **cosine) == pytest.approx(0.1 + 0.9 / 100) and at(100, **cosine) == 1
    assert at(1100, **cosine) == pytest.approx(0.01 + 0.99 / 2)
    assert at(1000, **(cosine | {"cycle": None})) == pytest.approx(0.01)


def test_log_has_pace_memory_and_waiting_and_tensorboard_the_curves(folder, tmp_path):
    pytest.importorskip("tensorboard")
    Trainer("vae", config(folder, tmp_path, steps=2, val=str(folder), val_every=2, tracker="tensorboard")).fit()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert {"l1", "kl", "lr", "steps_per_second", "images_per_second", "loader_wait", "memory_gb"} <= line.keys()
    assert 0 <= line["loader_wait"] <= 1 and line["memory_gb"] > 0.05
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "train/l1" in events.Tags()["scalars"] and "val/psnr" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["val"]


def test_a_tracker_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Trainer("vae", config(folder, tmp_path, tracker="wandb"))


def test_wandb_gets_numbers_and_pictures_and_goes_on_with_its_run(folder, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, sorted(values)))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append((options["id"], options["resume"], options["config"]["lr"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda pixels: pixels.shape))
    Trainer("vae", config(folder, tmp_path, steps=2, val=str(folder), val_every=2, tracker="wandb")).fit()
    assert calls[0] == (tmp_path.name, "allow", 2e-3) and calls[-1] == "finish"
    assert (2, ["val"]) in calls and any(step == 2 and "val_psnr" in names for step, names in calls[1:-1])


def test_compiled_parts_keep_their_names(folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__))
    trainer = Trainer("vae", config(folder, tmp_path, steps=1, compile=True))
    assert compiled == ["Encoder", "Decoder"]
    trainer.fit()
    assert load_model(tmp_path / "model").state_dict().keys() == trainer.model.state_dict().keys()
