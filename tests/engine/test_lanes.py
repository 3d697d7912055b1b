"""Photos side by side on a CPU: at once, each on its share of the threads, which is nobody else's business."""

import threading

import pytest
import torch

import lpmrf_kernels
from lpmrf_fast.engine.lanes import Lanes, use_threads


@pytest.fixture
def lanes():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    made = []

    def make(**options):
        made.append(Lanes(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("count, each", [(1, 4), (2, 2), (3, 1), (4, 1), (6, 1)])
def test_functions_run_at_once_on_their_share_of_the_threads(lanes, count, each):
    together = threading.Barrier(min(count, 4), timeout=60)
    seen, waited = [], set()

    def work():
        if threading.get_ident() not in waited:  # a lane's first
            waited.add(threading.get_ident())
            together.wait()
        torch.ones(10).sum()
        seen.append(torch.get_num_threads())

    one = lanes()
    for _ in range(2):
        seen.clear()
        one.run([work] * count)
        assert seen == [each] * count
    assert torch.get_num_threads() == 4 and threads_of_a_new_thread() == 4


def test_the_share_follows_the_number_of_functions(lanes):
    one, seen = lanes(), []
    for count in (4, 2, 4):
        one.run([lambda: seen.append(torch.get_num_threads())] * count)
    assert seen == [1] * 4 + [2] * 2 + [1] * 4


def test_a_fixed_share_is_one_thread_also_alone(lanes):
    one, seen = lanes(fixed=True), []
    for count in (1, 2, 5):
        one.run([lambda: seen.append(torch.get_num_threads())] * count)
    assert seen == [1] * 8 and torch.get_num_threads() == 4


def test_use_threads_is_the_calling_threads_own(lanes):
    lanes()
    seen = []

    def work():
        use_threads(3, 4)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3] and torch.get_num_threads() == 4 and threads_of_a_new_thread() == 4


def test_an_error_comes_when_all_have_ended(lanes):
    ended = []

    def fails():
        raise ValueError("the second")

    one = lanes()
    with pytest.raises(ValueError, match="the second"):
        one.run([lambda: ended.append(0), fails, lambda: ended.append(2)])
    assert sorted(ended) == [0, 2]
    one.run([lambda: ended.append(3)] * 2)
    assert ended[2:] == [3, 3]


def test_choices_of_backends_go_along(lanes):
    seen = []
    with lpmrf_kernels.use_backend("torch"):
        lanes().run([lambda: seen.append(lpmrf_kernels.registry.forced_backend())] * 3)
    assert seen == ["torch"] * 3


def test_closing_ends_the_threads(lanes):
    one = lanes()
    one.run([lambda: None] * 2)
    one.close()
    one.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lpmrf-lane")]
