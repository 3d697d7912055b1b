"""Graphs behind a budget: what is kept, what goes, what happens when a capture fails. The tape stands in for CUDA."""

import logging

import pytest
import torch
from engine_stand_ins import Tape

from lpmrf_fast.engine.graphs import CaptureError, Graphs, OverBudget
from lpmrf_fast.engine.plan import Plan


def plan(batch):
    return Plan(batch, 8, 8, 1, "cuda:0", (), "graph")


def nothing():
    torch.zeros(1).add_(1)


def held(graphs):
    return [p.batch for p in graphs.plans]


def test_a_capture_is_reported_with_seconds_memory_and_nodes():
    graphs = Graphs(Tape(lambda plan: (3_000_000, 1_000_000)))
    captured = graphs.capture(plan(2), [nothing, nothing])
    assert len(captured.replays) == 2 and captured.nodes > 0 and captured.seconds > 0
    assert graphs.bytes == 4_000_000 and graphs.get(plan(2)) is captured and graphs.get(plan(3)) is None
    (report,) = graphs.reports
    assert report.replays == [] and f"4 MB, {captured.nodes} nodes: 2 x 8x8, 1 step" in str(report)


def test_over_budget_the_least_recently_used_go_and_the_pool_is_kept():
    tape = Tape(lambda plan: (50 if plan.batch == 1 else 0, 20))
    graphs = Graphs(tape, budget=115)
    for batch in (1, 2, 3):
        graphs.capture(plan(batch), [nothing])
    assert held(graphs) == [1, 2, 3] and graphs.bytes == 110
    graphs.get(plan(1))
    graphs.capture(plan(4), [nothing])
    assert held(graphs) == [3, 1, 4] and graphs.bytes == 110  # the pool's 50 stay where they are
    assert (tape.pools, tape.released) == (1, 0)


def test_a_pool_that_others_have_grown_goes_as_a_whole():
    tape = Tape(lambda plan: (80 if plan.batch == 1 else 30, 10))
    graphs = Graphs(tape, budget=100)
    graphs.capture(plan(1), [nothing])
    graphs.capture(plan(2), [nothing])
    assert held(graphs) == [2] and graphs.bytes == 40
    assert (tape.pools, tape.released) == (2, 1) and [p.batch for p in tape.captured] == [1, 2, 2]


def test_a_graph_that_alone_is_over_the_budget_is_out_of_memory():
    tape = Tape(lambda plan: (200, 0))
    graphs = Graphs(tape, budget=100)
    with pytest.raises(OverBudget):
        graphs.capture(plan(1), [nothing])
    assert held(graphs) == [] and graphs.bytes == 0 and tape.released == 1


def test_out_of_memory_in_a_capture_frees_everything():
    def trouble(plan):
        if plan.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    tape = Tape(lambda plan: (10, 1), trouble)
    graphs = Graphs(tape)
    graphs.capture(plan(1), [nothing])
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture(plan(2), [nothing])
    assert held(graphs) == [] and tape.released == 1 and not graphs.failures


def test_a_capture_that_fails_is_said_once_and_not_tried_again(caplog):
    def trouble(plan):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    tape = Tape(trouble=trouble)
    graphs = Graphs(tape)
    with caplog.at_level(logging.WARNING):
        assert graphs.capture(plan(1), [nothing]) is None
        assert graphs.capture(plan(1), [nothing]) is None
        assert graphs.capture(plan(2), [nothing]) is None
    assert len(tape.captured) == 2 and set(graphs.failures) == {plan(1), plan(2)}
    (record,) = caplog.records
    assert record.getMessage().endswith("RuntimeError: operation not permitted when stream is capturing")
    strict = Graphs(Tape(trouble=trouble), strict=True)
    with pytest.raises(CaptureError, match="cannot be captured: RuntimeError: operation not permitted when"):
        strict.capture(plan(1), [nothing])


def test_clear_gives_the_pool_back():
    tape = Tape(lambda plan: (10, 1))
    graphs = Graphs(tape)
    graphs.capture(plan(1), [nothing])
    graphs.clear()
    assert (graphs.plans, graphs.bytes, tape.released) == ([], 0, 1)
    graphs.capture(plan(1), [nothing])
    assert tape.pools == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures real CUDA graphs: needs a GPU")
def test_real_graphs():
    from lpmrf_fast.engine.graphs import CudaDevice

    x, y = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")

    def double():
        torch.mul(x, 2, out=y)

    captured = Graphs(CudaDevice(torch.device("cuda", 0)), strict=True).capture(plan(1), [double])
    for value in (1.0, 3.0):
        x.fill_(value)
        captured.replays[0]()
        torch.cuda.synchronize()
        assert (y == 2 * value).all()
    assert captured.nodes in (None, 1)
