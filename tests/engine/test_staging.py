"""The queue: order, back-pressure, memory that runs out, errors, shutdown. Lanes here are scripted."""

import threading
import time

import pytest
import torch

from lpmrf_fast.engine.plan import Plan
from lpmrf_fast.engine.staging import Job, Outcome, Statistics, Worker

PLAN = Plan(4, 8, 8, 1, "cpu", ())


class Lane:
    """Batches that land when they are told to; a row's image is its seed."""

    def __init__(self, slots=2, trouble=lambda seeds: None, gate=None):
        self.slots, self.trouble, self.gate = slots, trouble, gate
        self.launched, self.landed, self.flying, self.most = [], [], 0, 0

    def launch(self, plan, rows, seeds, steps):
        self.trouble(seeds)
        self.launched.append(list(seeds))
        self.flying += 1
        self.most = max(self.most, self.flying)
        return Flight(self, seeds)


class Flight:
    def __init__(self, lane, seeds):
        self.lane, self.seeds = lane, seeds

    def ready(self):
        return self.lane.gate is None or self.lane.gate.is_set()

    def result(self):
        if self.lane.gate is not None:
            assert self.lane.gate.wait(10)
        self.lane.flying -= 1
        self.lane.landed.append(list(self.seeds))
        values = torch.tensor(self.seeds)
        return Outcome(values, -values, values >= 0, (0.25, 1.0, 0.5))


def job(*seeds):
    def cut():
        rows = [(torch.zeros(3, 8, 8), seed) for seed in seeds]
        return rows, lambda done: [int(image) for image, *_ in done]

    return Job(cut, 1)


def worker(lane, most=4, retreat=None, waiting=2):
    def give_up(plan, error):
        raise error

    return Worker(lane, lambda job: (PLAN, min(most, len(job.left))), retreat or give_up, waiting)


def put(w, *jobs):
    for j in jobs:
        w.put(j)
    return [j.future for j in jobs]


def test_batches_come_back_whole_and_in_order():
    lane = Lane()
    w = worker(lane, most=3, waiting=10)
    futures = put(w, job(1, 2), job(*range(10, 18)), job(3))
    assert [f.result(10) for f in futures] == [[1, 2], list(range(10, 18)), [3]]
    assert lane.launched == lane.landed == [[1, 2], [10, 11, 12], [13, 14, 15], [16, 17], [3]]
    w.close()
    s = w.statistics
    assert (s.images, s.batches) == (11, 5) and (s.copy_in, s.compute, s.copy_out) == (1.25, 5.0, 2.5)


def test_the_next_batch_is_launched_before_the_last_has_landed_and_no_more():
    gate = threading.Event()
    lane = Lane(gate=gate)
    w = worker(lane, waiting=10)
    futures = put(w, *(job(i) for i in range(5)))
    deadline = time.monotonic() + 10
    while len(lane.launched) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert lane.launched == [[0], [1]] and lane.landed == []
    gate.set()
    assert [f.result(10) for f in futures] == [[i] for i in range(5)]
    assert lane.most == 2
    w.close()


def test_a_full_queue_makes_the_caller_wait():
    gate = threading.Event()
    lane = Lane(slots=1, gate=gate)
    w = worker(lane, waiting=2)
    futures, done = [], threading.Event()

    def feed():
        for i in range(6):
            futures.extend(put(w, job(i)))
        done.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert not done.wait(0.1)
    assert len(futures) <= 4  # one in flight, one in the thread's hand, two waiting
    gate.set()
    assert done.wait(10)
    feeder.join()
    assert [f.result(10) for f in futures] == [[i] for i in range(6)]
    w.close()


def test_memory_that_runs_out_is_tried_again_with_less():
    limit = {"rows": 4}

    def trouble(seeds):
        if len(seeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    lane = Lane(trouble=trouble)

    def retreat(plan, error):
        assert lane.flying == 0  # what flew has landed: its memory is free
        limit["rows"] //= 2
        return "batch"

    w = Worker(lane, lambda job: (PLAN, min(limit["rows"], len(job.left))), retreat, 10)
    futures = put(w, job(7), job(1, 2, 3, 4), job(5, 6))
    assert [f.result(10) for f in futures] == [[7], [1, 2, 3, 4], [5, 6]]
    assert limit["rows"] == 1
    w.close()


def test_a_job_that_is_cut_anew_starts_again():
    tiles = {"count": 1}

    def cut():
        rows = [(torch.zeros(3, 8, 8), 10 * tiles["count"] + i) for i in range(tiles["count"])]
        return rows, lambda done: [int(image) for image, *_ in done]

    def trouble(seeds):
        if seeds[0] < 40:
            raise MemoryError

    def retreat(plan, error):
        tiles["count"] *= 2
        return "tiles"

    w = Worker(Lane(trouble=trouble), lambda job: (PLAN, 1), retreat, 2)
    (future,) = put(w, Job(cut, 1))
    assert future.result(10) == [40, 41, 42, 43]
    w.close()


def test_an_error_is_the_jobs_own():
    def trouble(seeds):
        if 13 in seeds:
            raise RuntimeError("some kernel failed")

    w = worker(Lane(trouble=trouble), most=1, waiting=10)
    good, bad, after = put(w, job(1), job(2, 13, 3), job(4))
    assert good.result(10) == [1] and after.result(10) == [4]
    with pytest.raises(RuntimeError, match="some kernel failed"):
        bad.result(10)
    w.close()


def test_an_error_while_landing_is_the_jobs_own(monkeypatch):
    lane = Lane()
    result = Flight.result

    def failing(self):
        outcome = result(self)
        if 2 in self.seeds:
            raise RuntimeError("the copy failed")
        return outcome

    monkeypatch.setattr(Flight, "result", failing)
    w = worker(lane, most=1, waiting=10)
    futures = put(w, job(1), job(2, 5), job(3))
    assert futures[0].result(10) == [1] and futures[2].result(10) == [3]
    with pytest.raises(RuntimeError, match="the copy failed"):
        futures[1].result(10)
    w.close()


def test_closing_finishes_what_was_submitted():
    lane = Lane()
    w = worker(lane, waiting=100)
    futures = put(w, *(job(i) for i in range(20)))
    w.close()
    w.close()
    assert all(f.done() for f in futures) and [f.result() for f in futures] == [[i] for i in range(20)]
    with pytest.raises(RuntimeError, match="this engine is closed"):
        w.put(job(1))
    assert not [t for t in threading.enumerate() if t.name == "lpmrf-engine"]


def test_closing_may_cancel_what_has_not_begun():
    gate = threading.Event()
    lane = Lane(slots=1, gate=gate)
    w = worker(lane, waiting=100)
    futures = put(w, *(job(i) for i in range(20)))
    threading.Timer(0.05, gate.set).start()
    w.close(cancel=True)
    assert all(f.done() for f in futures) and futures[-1].cancelled()
    assert all(f.cancelled() or f.result() == [i] for i, f in enumerate(futures))


def test_a_cancelled_job_is_not_run():
    gate = threading.Event()
    lane = Lane(slots=1, gate=gate)
    w = worker(lane, waiting=10)
    futures = put(w, job(1), job(2), job(3), job(4))
    assert futures[3].cancel()
    gate.set()
    w.close()
    assert [4] not in lane.launched and futures[2].result() == [3]


def test_statistics_can_be_read():
    s = Statistics(started=1.0, finished=5.0, images=8, compute=3.0)
    assert (s.seconds, s.images_per_second, s.idle_share) == (4.0, 2.0, 0.25)
    assert "8 images in 4.00 s, 2.00 images/s" in str(s) and "device idle 25 %" in str(s)
    assert (Statistics().idle_share, Statistics().images_per_second) == (0.0, 0.0) and str(Statistics())
