"""How providers are timed: in turns on a CPU, inside CUDA graphs on a GPU."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

from lpmrf_kernels.tune import seconds_in_a_graph


def time_all(functions: Mapping[str, Callable[[], object]], device: str, budget: float) -> dict[str, list[float]]:
    """Seconds a call of each function, several times each, for about `budget` seconds together.

    On a CPU they take turns in one process, so that other load meets all of them alike: compare medians of one run.
    On a GPU each is captured into a CUDA graph of several calls, after warming up, and the replays are timed.
    """
    if device.startswith("cuda"):
        return {name: seconds_in_a_graph(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm
    end, names, shuffled = time.perf_counter() + budget, list(functions), random.Random(0)
    while time.perf_counter() < end or len(times[names[0]]) < 5:
        for name in names:
            started = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - started)
        # Nobody always follows the same one, nor ever itself, with the caches full of its own tensors.
        last = names[-1]
        shuffled.shuffle(names)
        if names[0] == last:
            names.append(names.pop(0))
    return times


def quantile(times: list[float], share: float) -> float:
    """The smallest time that `share` of them do not exceed; 0.5 is the median."""
    if share == 0.5:
        return statistics.median(times)
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]
