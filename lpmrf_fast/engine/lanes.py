"""The photos of a batch side by side on a CPU: each by itself, on its share of the threads.

A network's small operations gain little from a second thread, and wait for it each time: two photos on one thread each
take much less time than two on two threads, one after the other. A photo alone has all threads.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

_setting = threading.Lock()


class Lanes:
    """Runs functions side by side. Raises what the first of those that failed has raised, when all have ended.

    fixed: each on one thread, one alone too, because the number of threads may change the last bits of a result.
    """

    def __init__(self, fixed: bool = False):
        self.fixed = fixed
        self._pool: ThreadPoolExecutor | None = None

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        threads = torch.get_num_threads()
        lanes = min(threads, len(functions))
        if lanes < 2 and not self.fixed:
            for function in functions:
                function()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, "lpmrf-lane")
        # Every lane has a list of its own: an executor with more threads than lanes would start more at once.
        lists = [functions[lane::lanes] for lane in range(lanes)]

        def work(mine: Sequence[Callable[[], None]]) -> None:
            use_threads(1 if self.fixed else threads // lanes, threads)
            for function in mine:
                function()

        # Choices of backends go along: a context cannot be entered twice at once.
        futures = [self._pool.submit(contextvars.copy_context().run, work, mine) for mine in lists]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def use_threads(count: int, elsewhere: int) -> None:
    """The calling thread's operations use `count` threads; threads that have not begun to work yet, `elsewhere`."""
    if torch.get_num_threads() == count:  # the call also fixes what a new thread starts with
        return
    with _setting:
        torch.set_num_threads(count)
        # It sets the default of new threads too. Set again in one that ends, that changes nobody else's number.
        restore = threading.Thread(target=torch.set_num_threads, args=(elsewhere,))
        restore.start()
        restore.join()
