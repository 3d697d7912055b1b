"""The engine on the CPU, with a tape in place of CUDA graphs: equality, buckets, weights, memory, threads, errors."""

import copy
import logging
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from engine_stand_ins import Tape
from torch import nn

import lpmrf_kernels
from lpmrf_fast.checkpoint import CheckpointError
from lpmrf_fast.engine import CaptureError, Engine, OutOfMemory, engine
from lpmrf_fast.pipeline import LatentPMRFPipeline, PMRFPipeline

STEPS = 2


class Same(nn.Module):
    def forward(self, y):
        return y


class Towards(nn.Module):
    """A velocity that leads to a constant image in any number of steps."""

    def __init__(self, value=0.25):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, t):
        return (self.value - x) / (1 - t).view(-1, 1, 1, 1)


def constant(value=0.25, **options):
    return PMRFPipeline(Same(), Towards(value), **options)


def plain(pipe, images, seeds, steps=STEPS):
    """The pipeline's own results as uint8, one by one."""
    results = [pipe(x, steps, seed=s, output_type="pt") for x, s in zip(images, seeds)]
    return [[(t * 255).round().to(torch.uint8)[0] for t in (r.images, r.posterior_means)] for r in results]


# ---- equality


@pytest.mark.parametrize("mode", ["eager", "graph", "step"])
def test_it_restores_what_the_plain_models_restore(pipe, photos, levels, mode):
    """fp32: within a level, image by image, padded and odd sizes too, the first time and from a graph."""
    images = photos((64, 64), (64, 64), (50, 60), (64, 64), (100, 64), (1, 3))
    seeds = [3, -4, 5, 2**62, 7, 0]
    expected = plain(pipe, images, seeds)
    tape = Tape()
    with pipe.engine(batch_size=4, mode=mode, capturer=tape) as fast:
        for _ in range(3):
            result = fast.restore(images, STEPS, seeds)
            assert result.finite.all() and result.failed == []
            for i, (image, mean) in enumerate(expected):
                assert levels(result.images[i], image) <= 1 and levels(result.posterior_means[i], mean) <= 1
        buckets = 3 if mode != "eager" else 0  # 64x64 by 4 and by 1, 128x64 by 1
        assert len(tape.captured) == len(set(tape.captured)) == len(fast.captures) == buckets
        assert bool(tape.replayed) == (mode != "eager")


def test_alone_in_a_batch_in_another_order_in_another_bucket(pipe, photos, levels):
    """The same noise, and in fp32 the same picture to a level."""
    images, seeds = photos(*[(64, 64)] * 5), [1, 2, 3, 4, 5]
    with pipe.engine(batch_size=8) as fast:
        whole = fast.restore(torch.stack(images), STEPS, seeds).images
        assert torch.equal(whole, fast.restore(torch.stack(images), STEPS, seeds).images)  # run to run
        order = [4, 2, 0, 1, 3]
        shuffled = fast.restore(torch.stack(images)[order], STEPS, [seeds[i] for i in order]).images
        for place, i in enumerate(order):
            assert levels(shuffled[place], whole[i]) <= 1
            assert levels(fast.restore(images[i][None], STEPS, seeds[i]).images[0], whole[i]) <= 1
        two = fast.restore(images[:2], STEPS, seeds[:2]).images
        assert levels(two[1], whole[1]) <= 1
        other = fast.restore(images[:1], STEPS, 99).images[0]
        assert levels(other, whole[0]) > 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deterministic_results_do_not_depend_on_the_company(pipe, photos, dtype):
    images, seeds = photos(*[(64, 64)] * 5), [1, 2, 3, 4, 5]
    with pipe.to(dtype=dtype).engine(batch_size=4, deterministic=True) as fast:
        whole = fast.restore(torch.stack(images), STEPS, seeds).images
        assert fast.plan(64, 64).batch == 4
        backwards = fast.restore(torch.stack(images[::-1]), STEPS, seeds[::-1]).images.flip(0)
        assert torch.equal(whole, backwards)
        for image, seed, expected in zip(images, seeds, whole):
            assert torch.equal(fast.restore(image[None], STEPS, seed).images[0], expected)
            assert torch.equal(fast.submit(image[None], STEPS, seed).result(60).images[0], expected)


def test_bfloat16_is_near(pipe, photos):
    images = photos((64, 64), (64, 64))
    expected = torch.stack([image for image, _ in plain(pipe, images, [0, 0], 4)])
    with pipe.to(dtype="bf16").engine() as fast:
        result = fast.restore(torch.stack(images), 4).images
        assert dict(fast.plan(64, 64).dtypes)["velocity"] == "bfloat16"
    assert (result.float() - expected.float()).abs().mean() < 4


def test_steps_may_vary(pipe, photos, levels):
    (image,) = photos((64, 64))
    tape = Tape()
    with pipe.engine(mode="step", capturer=tape) as fast:
        for steps in (1, 3, 2, 3):
            ((expected, _),) = plain(pipe, [image], [1], steps)
            assert levels(fast.restore([image], steps, 1).images[0], expected) <= 1
        assert len(tape.captured) == 1 and tape.captured[0].steps is None
        assert tape.replayed == (3 + 2) + (2 + 2) + (3 + 2)
        with pytest.raises(ValueError, match="at most 256 steps"):
            fast.restore([image], 257)


def test_the_backend_is_that_of_its_making(pipe, photos, monkeypatch):
    with lpmrf_kernels.use_backend("torch"):
        fast = pipe.engine()
    chosen, choose = [], lpmrf_kernels.registry.choose
    monkeypatch.setattr(lpmrf_kernels.registry, "choose", lambda *a, **b: chosen.append(choose(*a, **b)) or chosen[-1])
    with fast:
        assert {b for op, b in fast.plan(64, 64).backends if op != "attention"} == {"torch"}
        for result in (fast.restore(photos((64, 64)), 1), fast.submit(photos((64, 64)), 1).result(60)):
            assert result.finite.all()
    assert set(chosen) == {"torch"}


# ---- buckets


def test_batches_are_split_and_padded_to_buckets(pipe, photos):
    tape = Tape()
    with pipe.engine(batch_size=4, capturer=tape) as fast:
        for _ in range(2):
            fast.restore(torch.stack(photos(*[(64, 64)] * 11)), 1)
        assert [p.batch for p in tape.captured] == [4] and tape.replayed == 5  # 4, 4 and 3 padded: all but the first
        plan = fast.warm_up(100, 60, 2, num_inference_steps=1)
        assert (plan.batch, plan.height, plan.width, plan.steps) == (2, 128, 64, 1)
        assert tape.captured[-1] == plan and "2 x 64x128" in str(fast.captures[-1])


def test_buckets_that_are_not_used_any_more_go(photos, monkeypatch):
    monkeypatch.setattr(engine, "BUCKETS", 2)
    tape = Tape()
    with constant().engine(capturer=tape) as fast:
        for side in (8, 9, 8, 10, 8, 9):
            for _ in range(2):
                fast.restore(photos((side, side)), 1)
        assert [p.height for p in fast._graphs.plans] == [8, 9] or len(fast._graphs.plans) == 2
        assert [p.height for p in tape.captured] == [8, 9, 10, 9]


def test_graphs_over_the_memory_budget_are_captured_again_when_needed(photos):
    tape = Tape(lambda plan: (0, 6_000_000))
    with constant().engine(max_memory="10MB", capturer=tape) as fast:
        for side in (8, 9, 8):
            for _ in range(2):
                assert fast.restore(photos((side, side)), 1).finite.all()
        assert [p.height for p in tape.captured] == [8, 9, 8]


def test_a_capture_that_fails_runs_eagerly_or_raises_where_that_is_asked(photos, caplog):
    def trouble(plan):
        raise RuntimeError("cannot be captured")

    image = photos((8, 8))
    with constant().engine(capturer=Tape(trouble=trouble)) as fast, caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert (fast.restore(image, 1).images[0] == 64).all()
        assert len(caplog.records) == 1
    with constant().engine(capturer=Tape(trouble=trouble), strict=True) as fast:
        fast.restore(image, 1)
        with pytest.raises(CaptureError):
            fast.restore(image, 1)
        with pytest.raises(CaptureError):
            fast.submit(image, 1).result(60)


# ---- weights


@pytest.mark.parametrize("mode", ["eager", "graph", "step"])
def test_new_weights_take_effect_in_captured_graphs(photos, mode):
    pipe, image = constant(0.25), photos((8, 8))
    with pipe.engine(mode=mode, capturer=Tape()) as fast:
        for _ in range(3):
            assert (fast.restore(image, 2).images[0] == 64).all()
        assert set(fast.state_dict()) == {"velocity.value"}
        fast.load_state_dict({"velocity.value": torch.tensor(0.75)})
        assert (fast.restore(image, 2).images[0] == 191).all()
        with torch.no_grad():
            pipe.velocity.value.fill_(1.0)  # behind the engine's back: the weights are shared
        assert (fast.restore(image, 2).images[0] == 255).all()
        assert (fast.submit(image, 2).result(60).images[0] == 255).all()
        with pytest.raises(CheckpointError, match="unexpected"):
            fast.load_state_dict({"velocity.other": torch.tensor(1.0)})


def test_new_weights_of_real_networks(pipe, photos, levels, randomized):
    (image,) = photos((64, 64))
    with pipe.engine(capturer=Tape()) as fast:
        for _ in range(2):
            before = fast.restore([image], STEPS, 1).images[0]
        state = {name: t.clone() for name, t in fast.state_dict().items()}
        changed = {k: t * 1.1 if k.startswith("velocity") and t.is_floating_point() else t for k, t in state.items()}
        fast.load_state_dict(changed)
        ((expected, _),) = plain(pipe, [image], [1])
        after = fast.restore([image], STEPS, 1).images[0]
        assert levels(after, expected) <= 1 and levels(after, before) > 1
        fast.load_state_dict(state)
        assert torch.equal(fast.restore([image], STEPS, 1).images[0], before)


# ---- outputs


def test_outputs_are_copies_unless_a_view_is_asked_for(photos):
    a, b = photos((8, 8)), photos((8, 8), seed=1)
    with constant(noise_std=0.0).engine(batch_size=1) as fast:
        kept = fast.restore(a, 1).posterior_means[0]
        before = kept.clone()
        view = fast.restore(a, 1, view=True).posterior_means[0]
        assert torch.equal(view, before)
        fast.restore(b, 1)
        assert torch.equal(kept, before) and not torch.equal(view, before)
        with pytest.raises(ValueError, match="a view holds one batch, here 1 photos of one size, got 2"):
            fast.restore(a + b, 1, view=True)


@pytest.mark.parametrize("mode", ["eager", "graph", "step"])
def test_a_program_may_feed_the_static_buffers_itself(pipe, photos, mode):
    images = torch.stack(photos((64, 64), (64, 64)))
    with pipe.engine(batch_size=2, mode=mode, capturer=Tape()) as fast:
        expected = fast.restore(images, STEPS, [3, 4])
        plan = fast.plan(64, 64, 2, STEPS)
        buffers = fast.buffers(plan)
        for order in ([0, 1], [1, 0], [0, 1]):
            buffers.pixels.copy_(images[order])
            buffers.seeds.copy_(torch.tensor([3, 4])[order])
            assert fast.replay(plan, STEPS) is buffers and buffers.finite.all()
            for ours, theirs in ((buffers.images, expected.images), (buffers.means, expected.posterior_means)):
                assert (ours.int() - theirs[order].int()).abs().max() <= 1
        if mode != "step":
            with pytest.raises(ValueError, match="this plan has 2 steps, got 3"):
                fast.replay(plan, 3)


def test_lists_come_back_as_lists_and_tensors_as_tensors(photos):
    images = photos((8, 8), (8, 8))
    with constant().engine(batch_size=2) as fast:
        for call in (fast.restore, lambda *a: fast.submit(*a).result(60)):
            result = call(images, 1)
            assert isinstance(result.images, list) and result.images[0].shape == (3, 8, 8)
            result = call(torch.stack(images), 1)
            assert result.images.shape == result.posterior_means.shape == (2, 3, 8, 8)
            assert result.images.dtype == torch.uint8 and result.finite.tolist() == [True, True]


def test_a_photo_whose_result_is_not_finite_fails_alone(photos):
    class Bursts(nn.Module):
        def forward(self, x, t):
            bright = x.mean(dim=(1, 2, 3), keepdim=True) > 0.9
            return torch.where(bright, torch.inf, 0.25 - x)

    white, images = torch.full((3, 8, 8), 255, dtype=torch.uint8), photos((8, 8), (8, 8))
    with PMRFPipeline(Same(), Bursts(), noise_std=0.0).engine(batch_size=4) as fast:
        for call in (fast.restore, lambda *a: fast.submit(*a).result(60)):
            result = call([images[0], white, images[1]], 1)
            assert result.failed == [1] and result.finite.tolist() == [True, False, True]
            assert all((result.images[i] == 64).all() for i in (0, 2))


def test_constant_images_are_images(pipe):
    flat = [torch.full((3, 64, 64), level, dtype=torch.uint8) for level in (0, 128, 255)]
    with pipe.engine(batch_size=4) as fast:
        assert fast.restore(flat, STEPS).finite.all()


def test_on_a_cpu_every_photo_runs_by_itself_side_by_side(photos):
    """Batches of one in the networks, two at once; rows that only pad are not computed."""
    seen, together = [], threading.Barrier(2, timeout=30)

    class Alone(nn.Module):
        def forward(self, y):
            if not y.is_meta:  # no estimate
                seen.append((len(y), torch.get_num_threads()))
                if len(seen) in (1, 2):
                    together.wait()
            return y

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with PMRFPipeline(Alone(), Towards(), noise_std=0.0).engine(batch_size=4) as fast:
            images = photos(*[(8, 8)] * 3)
            result = fast.restore(images, 1)
            assert all(torch.equal(a, b) for a, b in zip(result.posterior_means, images))
            assert seen == [(1, 1)] * 3 and fast.plan(8, 8, 3).batch == 4
            fast.restore(images[:1], 1)
            assert seen[3:] == [(1, 2)]  # alone: all threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_results_are_ordinary_tensors(photos):
    """Restored without gradients, but usable in a program that takes some."""
    with constant().engine() as fast:
        for result in (fast.restore(photos((8, 8)), 1), fast.submit(photos((8, 8)), 1).result(60)):
            assert not any(t.is_inference() for t in (*result.images, *result.posterior_means, result.finite))


# ---- memory


class Greedy(nn.Module):
    """A posterior mean that runs out of memory beyond a number of pixels."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels, self.seen = pixels, []

    def forward(self, y):
        if y.is_meta:  # an estimate
            return y
        self.seen.append((len(y), *y.shape[-2:]))
        if len(y) * y.shape[-2] * y.shape[-1] > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return y


@pytest.mark.parametrize("submitted", [False, True])
def test_out_of_memory_halves_the_bucket_and_is_remembered(photos, submitted):
    pipe = PMRFPipeline(Greedy(2 * 8 * 8), Towards())
    with pipe.engine(batch_size=8, capturer=Tape()) as fast:
        call = (lambda *a: fast.submit(*a).result(60)) if submitted else fast.restore
        images = torch.stack(photos(*[(8, 8)] * 12))
        assert (call(images, 1).images == 64).all()
        seen = fast.stages.posterior_mean.seen
        assert [batch for batch, *_ in seen[:4]] == [8, 4, 2, 2] and max(batch for batch, *_ in seen[2:]) == 2
        assert fast.limit(8, 8) == 2 and fast.limit(9, 9) == 8


@pytest.mark.parametrize("submitted", [False, True])
def test_photos_larger_than_memory_are_cut_into_tiles(photos, levels, submitted):
    pipe = PMRFPipeline(Greedy(2 * 300 * 300), Towards(), noise_std=0.0)
    with pipe.engine(batch_size=2) as fast:
        call = (lambda *a: fast.submit(*a).result(60)) if submitted else fast.restore
        small, large = photos((300, 300), (500, 700))
        result = call([small, large, small], 1)
        assert torch.equal(result.posterior_means[0], small)
        assert levels(result.posterior_means[1], large) <= 1 and (result.images[1] == 64).all()
        assert fast.limit(300, 300) == 2 and fast.limit(500, 700) == 0
        with pytest.raises(ValueError, match="a view holds one batch"):
            fast.restore([large], 1, view=True)


def test_tiles_of_a_real_network_have_no_visible_seams(pipe, photos):
    (image,) = photos((320, 512))
    with pipe.engine() as fast:
        whole = fast.restore([image], 1).posterior_means[0].float()
    with pipe.engine(max_memory="1GB") as fast:
        fast._memory().largest = 320 * 320
        assert len(fast._tiles(320, 512)) > 1
        tiled = fast.restore([image], 1).posterior_means[0].float()
    assert (whole - tiled).abs().mean() < 3


def test_what_an_attempt_held_is_free_when_memory_is_given_back(photos, monkeypatch):
    held, given = [], []
    monkeypatch.setattr(engine, "give_back", lambda device: given.append([x() for x in held]))

    class Full(nn.Module):
        def forward(self, y):
            if len(y) > 1 and not y.is_meta:
                activation = y + 1
                held.append(weakref.ref(activation))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return y

    with PMRFPipeline(Full(), Towards()).engine(batch_size=4, capturer=Tape()) as fast:
        for call in (fast.restore, lambda *a: fast.submit(*a).result(60)):
            assert (call(torch.stack(photos(*[(8, 8)] * 4)), 1).images == 64).all()
    assert given[:2] == [[None], [None, None]]


def test_a_photo_that_memory_does_not_hold_is_one_clear_error(photos):
    with PMRFPipeline(Greedy(10), Towards()).engine(batch_size=2) as fast:
        for call in (fast.restore, lambda *a: fast.submit(*a).result(60)):
            with pytest.raises(OutOfMemory, match="out of memory at 8x8 pixels; use a smaller picture") as caught:
                call(photos((8, 8), (8, 8)), 1)
            assert "\n" not in str(caught.value)
    with PMRFPipeline(Greedy(100), Towards()).engine(batch_size=4, deterministic=True, capturer=Tape()) as fast:
        with pytest.raises(OutOfMemory, match="8x8 pixels, 4 at once"):
            fast.restore(photos((8, 8)), 1)


def test_max_memory_sets_batch_and_tiles(pipe):
    with pipe.engine(batch_size=64) as fast:
        peak = fast.estimate(fast.plan(512, 512)).peak
        weights = fast.weight_bytes
        assert fast.limit(512, 512) == 64
    with pipe.engine(batch_size=64, max_memory=weights + 3 * peak + 1000, capturer=Tape()) as fast:
        assert fast.limit(512, 512) == 3 and fast.limit(1024, 1024) == 0 and fast.plan(512, 512, 3).batch == 3
    with pipe.engine(max_memory="1kB") as fast:
        assert fast.limit(512, 512) == 0 and fast.limit(128, 128) == 1


def test_max_memory_that_holds_no_tile_is_one_clear_error(pipe, photos):
    with pipe.engine(max_memory="1MB") as fast:
        for call in (fast.restore, lambda *a: fast.submit(*a).result(60)):
            for size, shown in (((64, 64), "64x64"), ((600, 600), "256x256")):
                with pytest.raises(OutOfMemory, match=f"max_memory: {shown} pixels take .* 1 MB are given") as caught:
                    call(photos(size), 1)
                assert "\n" not in str(caught.value)


def test_on_a_cpu_a_batch_takes_the_memory_of_those_that_run_at_once(pipe):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pipe.engine(batch_size=32) as fast:
            one, two, many = (fast.estimate(fast.plan(128, 128, batch)) for batch in (1, 2, 32))
            peak, weights = one.peak, fast.weight_bytes
        assert two.peak == pytest.approx(2 * one.peak, rel=0.01) and two.peak < many.peak < 8 * one.peak
        assert many.flops == pytest.approx(32 * one.flops)
        with pipe.engine(batch_size=32, max_memory=weights + 3 * peak * 16) as fast:
            assert fast.limit(512, 512) == 32  # memory for three, of which two run at once
        with pipe.engine(batch_size=32, max_memory=weights + peak * 16 * 3 // 2) as fast:
            assert fast.limit(512, 512) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no /proc")
def test_memory_on_a_cpu_is_not_more_than_predicted():
    """The process's peak against the prediction, by which batches are chosen."""
    code = """if True:
        import torch
        from lpmrf_fast.engine.memory import give_back
        from lpmrf_fast.pipeline import Pipeline

        def status(name):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

        torch.set_num_threads(1)
        with Pipeline.from_pretrained(dtype="fp32").engine() as fast:
            fast.restore(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), 1)
            predicted = fast.estimate(fast.plan(512, 512, 1, 1)).peak
            give_back(torch.device("cpu"))
            before = status("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            fast.restore(torch.zeros(1, 3, 512, 512, dtype=torch.uint8), 1)
            print(status("VmHWM") - before, predicted)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    taken, predicted = map(int, result.stdout.split())
    assert predicted / 4 < taken < predicted


# ---- the caller's surroundings


def test_what_the_caller_has_set_changes_nothing(pipe, photos):
    """Autocast, inference mode, the default device and dtype: the engine's other threads do not have them."""
    images = photos((64, 64), (50, 60))
    with pipe.engine(batch_size=2) as fast:
        expected = fast.restore(images, STEPS, [3, 4]).images

        def same(engine=fast):
            return all(torch.equal(a, b) for a, b in zip(engine.restore(images, STEPS, [3, 4]).images, expected))

        with torch.autocast("cpu", torch.bfloat16):
            assert same() and same(pipe.engine(batch_size=2))
        with torch.device("meta"):
            assert same() and same(pipe.engine(batch_size=2))
        torch.set_default_dtype(torch.float64)
        try:
            assert same() and same(pipe.engine(batch_size=2))
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            other = pipe.engine(batch_size=2)
            assert same() and same(other)
        assert same() and same(other)
        other.load_state_dict(fast.state_dict())
        assert same(other)


def test_weights_that_were_made_in_inference_mode_can_be_replaced(pipe, photos, levels):
    (image,) = photos((64, 64))
    with torch.inference_mode():
        other = copy.deepcopy(pipe)
        for network in other.modules.values():
            for name, p in list(network.named_parameters()):
                owner, _, last = name.rpartition(".")
                setattr(network.get_submodule(owner), last, nn.Parameter(p * 1.0, requires_grad=False))
    with other.engine() as fast:
        assert next(fast.stages.velocity.parameters()).is_inference()
        fast.restore([image], STEPS)
        changed = {k: t * 1.1 if t.is_floating_point() else t for k, t in pipe.engine().state_dict().items()}
        fast.load_state_dict(changed)
        with pipe.engine() as expected:
            expected.load_state_dict(changed)
            assert levels(fast.restore([image], STEPS).images[0], expected.restore([image], STEPS).images[0]) <= 1


# ---- no global state


def test_threads_and_two_engines_at_once(pipe, photos):
    """Each thread gets its own photos back, from one engine and from another one beside it."""
    first, second = constant(0.25).engine(capturer=Tape(), batch_size=2), constant(0.75).engine(capturer=Tape())
    wrong = []

    def work(fast, level, seed):
        for i in range(8):
            images = photos((8, 8), (8, 8), seed=seed + i)
            if i % 2:
                result = fast.restore(images, 1)
            else:
                result = fast.submit(images, 1).result(60)
            if not all((image == level).all() for image in result.images):
                wrong.append("image")
            if not all(torch.equal(a, b) for a, b in zip(result.posterior_means, images)):
                wrong.append("mean")

    with first, second:
        threads = [
            threading.Thread(target=work, args=(fast, level, 100 * i))
            for i, (fast, level) in enumerate([(first, 64), (first, 64), (second, 191), (second, 191)])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_results_of_real_networks_from_two_engines_and_threads(pipe, photos):
    images = photos(*[(64, 64)] * 4)
    with pipe.engine() as fast:
        expected = [fast.restore([x], 1, i).images[0] for i, x in enumerate(images)]
    with pipe.engine() as one, pipe.engine(mode="step") as two:
        futures = [[fast.submit([x], 1, i) for i, x in enumerate(images)] for fast in (one, two)]
        assert all(torch.equal(f.result(60).images[0], e) for f, e in zip(futures[0], expected))
        assert all((f.result(60).images[0].int() - e.int()).abs().max() <= 1 for f, e in zip(futures[1], expected))
        assert one.statistics.images == 4 and one.statistics.idle_share < 1
    assert not [t for t in threading.enumerate() if t.name == "lpmrf-engine"]


def test_closing_while_another_thread_restores_ends_it_and_leaves_nothing_behind(photos):
    begun, go_on, errors = threading.Event(), threading.Event(), []

    class Slow(nn.Module):
        def forward(self, y):
            if not y.is_meta:
                begun.set()
                assert go_on.wait(30)
            return y

    fast = PMRFPipeline(Slow(), Towards()).engine(batch_size=1)

    def work():
        try:
            fast.restore(torch.stack(photos(*[(8, 8)] * 5)), 1)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work), threading.Thread(target=fast.close)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.1)  # it waits for the batch
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert set(errors) <= {"this engine is closed; make another one"} and not fast._buckets


def test_a_futures_callback_never_waits_for_its_own_thread(photos):
    gate, said, done = threading.Event(), [], threading.Event()
    image = photos((8, 8))
    with constant().engine(waiting=1) as fast:

        def follow(_):
            assert gate.wait(30)
            for call in (fast.close, lambda: fast.submit(image, 1), lambda: fast.submit(image, 1)):
                try:
                    call()
                except RuntimeError as error:
                    said.append(str(error))
            done.set()

        fast.submit(image, 1).add_done_callback(follow)
        gate.set()
        assert done.wait(30)
        assert fast.submit(image, 1).result(60).finite.all()
    assert len(said) == 2 and "close the engine in another" in said[0] and "queue is full" in said[1]


def test_closing(photos):
    fast = constant().engine()
    future = fast.submit(photos((8, 8)), 1)
    fast.close()
    assert future.result().finite.all()
    fast.close()
    plan, image = fast.plan(8, 8), photos((8, 8))
    for call in (fast.restore, fast.submit, lambda *_: fast.warm_up(8, 8), lambda *_: fast.replay(plan)):
        with pytest.raises(RuntimeError, match="this engine is closed; make another one"):
            call(image, 1)


# ---- unusable arguments

IMAGE = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("method", ["restore", "submit"])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(images=IMAGE.float()), TypeError, "image 0: an engine takes uint8 tensors, got torch.float32"),
        (dict(images=[np.zeros((8, 8, 3), np.uint8)]), TypeError, "uint8 tensors, got ndarray"),
        (dict(images=IMAGE[0]), ValueError, r"\(N, 3, H, W\) or a list of \(3, H, W\), got the shape"),
        (dict(images=IMAGE[:, :1]), ValueError, r"image 0: must be \(3, H, W\), RGB"),
        (dict(images=IMAGE[..., :0]), ValueError, "with pixels, got the shape"),
        (dict(images=[]), ValueError, "give at least one"),
        (dict(images=None), TypeError, "images must be a tensor .* got NoneType"),
        (dict(num_inference_steps=0), ValueError, "steps must be at least 1, got 0"),
        (dict(num_inference_steps=-1), ValueError, "steps must be at least 1, got -1"),
        (dict(num_inference_steps=2.0), TypeError, "steps must be an int"),
        (dict(seeds=[1, 2]), ValueError, "2 seeds for 1 images"),
        (dict(seeds=[2**63]), ValueError, "ints of 64 bits, got 9223372036854775808"),
        (dict(seeds=[1.5]), ValueError, "ints of 64 bits"),
        (dict(seeds=None), ValueError, "ints of 64 bits, got None"),
        (dict(seeds=True), ValueError, "ints of 64 bits, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_cannot_be_used(method, arguments, error, message):
    with constant().engine() as fast, pytest.raises(error, match=message) as caught:
        getattr(fast, method)(**{"images": IMAGE, "num_inference_steps": 1, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size must be an int of at least 1"),
        (dict(batch_size=True), "batch_size must be an int of at least 1, got True"),
        (dict(waiting=0), "waiting must be an int of at least 1"),
        (dict(waiting=None), "waiting must be an int of at least 1, got None"),
        (dict(mode=""), "mode must be one of graph, step, eager, got ''"),
        (dict(max_memory=0), "such as 8GB or 800MiB, got 0"),
        (dict(mode="graph"), "mode 'graph' needs a CUDA device, these networks are on cpu"),
        (dict(mode="fast"), "mode must be one of graph, step, eager"),
        (dict(max_memory="much"), "such as 8GB or 800MiB, got 'much'"),
        (dict(compile=["vea"]), "no network is called 'vea'"),
        (dict(compile="vea"), "no network is called 'vea'"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(constant(), **options)


@pytest.mark.parametrize("arguments", [(0, 8), (8, -1), (8.5, 8), (8, 8, 0), (8, 8, True)])
def test_buckets_that_cannot_be(arguments):
    with constant().engine() as fast:
        for call in (fast.plan, fast.warm_up, lambda *a: fast.limit(*a[:2]))[: 2 if len(arguments) > 2 else 3]:
            with pytest.raises(ValueError, match="Engine: (height|width|batch) must be an int of at least 1, got"):
                call(*arguments)


def test_seeds_and_images_as_programs_have_them(photos):
    images = photos((8, 8), (8, 8))
    with constant(noise_std=0.1).engine(batch_size=2) as fast:
        expected = fast.restore(images, 1, [5, 5]).images
        for seeds in (5, np.int64(5), np.array([5, 5]), torch.tensor([5, 5]), torch.tensor(5), (5, 5)):
            for given in (images, tuple(images), (image for image in images)):
                assert all(torch.equal(a, b) for a, b in zip(fast.restore(given, 1, seeds).images, expected))


def test_it_says_what_it_is(pipe):
    with pipe.engine(mode="step") as fast:
        assert repr(fast) == "Engine(LatentPMRFPipeline, cpu, mode=step, 0 graphs)"


def test_the_pipeline_stays_as_it_was(pipe):
    networks = dict(pipe.modules)
    with pipe.engine() as fast:
        assert pipe.modules == networks and fast.stages.velocity is not pipe.velocity
    assert isinstance(pipe, LatentPMRFPipeline)


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real graphs and streams: needs a GPU")
@pytest.mark.parametrize("mode", ["graph", "step"])
def test_on_a_gpu(pipe, photos, levels, mode):
    images, seeds = photos(*[(64, 64)] * 6), list(range(6))
    torch.backends.cudnn.allow_tf32 = False
    expected = plain(pipe.to("cuda"), images, seeds)
    with pipe.engine(batch_size=4, mode=mode, strict=True) as fast:
        for _ in range(3):
            results = [fast.submit(images, STEPS, seeds), fast.submit(images[::-1], STEPS, seeds[::-1])]
            results = [results[0].result(60).images, results[1].result(60).images[::-1]]
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                there = fast.restore(torch.stack(images).cuda(), STEPS, seeds).images
                assert there.device.type == "cuda"
            stream.synchronize()
            for result in (*results, there.cpu()):
                assert all(levels(a, b) <= 1 for a, (b, _) in zip(result, expected))
        assert len(fast.captures) == 2 and all(c.seconds > 0 for c in fast.captures)
        assert fast.statistics.images == 36 and 0 <= fast.statistics.idle_share < 1
