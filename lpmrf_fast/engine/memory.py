"""Memory: how much there is, and how many photos of a size it holds."""

import ctypes
import gc
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
MIN_TILE = 256
"""Side below which photos are not cut into smaller tiles: networks need some context."""

CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(text: str | int | float) -> int:
    """A number of bytes: 8000000000, "8GB", "7.5 GiB", "800M". Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    number = float(found[1]) * UNITS.get(found[2], 0) if found else 0
    if number < 1:
        raise ValueError(f"expected an amount of memory such as 8GB or 800MiB, got {text!r}")
    return int(number)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device; None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None
    try:  # a container's limit
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return max(0, min(free, limit - used))


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def give_back(device: torch.device) -> None:
    """Hand what nobody uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device.type == "cpu" and (libc := _glibc()):
        libc.malloc_trim(0)


@cache
def keep_blocks() -> bool:
    """Tell glibc's allocator to keep freed blocks of up to 1 GiB for the next use; whether there is a glibc.

    By default every block of 32 MiB or more is a new mapping, whose pages the system zeroes one by one while they are
    written: an activation of that size took twenty times as long. Holds for the process; `give_back` hands all that is
    unused to the system.
    """
    libc = _glibc()
    # Threads have pools of their own, which hold no more than 64 MiB a block: from now on new threads share one.
    return bool(libc) and all([libc.mallopt(*option) for option in ((MMAP, 2**30), (TRIM, 2**31 - 1), (ARENAS, 1))])


TRIM, MMAP, ARENAS = -1, -3, -8
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of malloc.h."""


@cache
def _glibc():
    """The C library, where it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):  # Windows has no CDLL(None)
        return None


class Room:
    """How many photos of a padded size run together, and how large tiles are.

    Starts from a prediction, where there is one (bytes of activations a pixel, and a budget), and learns from every
    failure. rounded(height, width): the size to which a tile would be padded. together: photos of a batch that run at
    the same time at most; the others take next to nothing meanwhile.
    """

    def __init__(
        self,
        batch_size: int,
        rounded: Callable,
        budget: int | None = None,
        bytes_per_pixel: float | None = None,
        together: float = math.inf,
    ):
        self.batch_size, self.rounded, self.bytes_per_pixel = batch_size, rounded, bytes_per_pixel
        self.together = together
        self.pixels = math.inf if budget is None or not bytes_per_pixel else budget / bytes_per_pixel
        """Pixels that fit together, as predicted."""
        self.largest = self.pixels
        """Pixels of the largest photo that runs whole."""
        self.ceilings: dict[tuple[int, int], int] = {}
        """Padded size → the largest batch that memory is known to hold."""

    def limit(self, height: int, width: int) -> int:
        """Photos in the largest batch; 0: one does not fit whole, see `tile`."""
        if self.tile(height, width) is not None:
            return 0
        fits = max(1, self.pixels / (height * width))
        fits = self.batch_size if fits >= self.together else int(min(self.batch_size, fits))
        return min(fits, self.ceilings.get((height, width), fits))

    def shrink(self, height: int, width: int, batch: int) -> bool:
        """That many ran out of memory: half as many from now on, or smaller tiles. False: there is nothing smaller."""
        if batch > 1:
            self.ceilings[height, width] = batch // 2
            return True
        pixels = height * width // 2
        if self._tile(height, width, pixels) is None:
            return False
        self.largest = min(self.largest, pixels)
        return True

    def tile(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width of the tiles of a photo that is too large; None where it is not, or cannot be cut."""
        return self._tile(height, width, self.largest) if height * width > self.largest else None

    def _tile(self, height: int, width: int, pixels: float) -> tuple[int, int] | None:
        h = min(height, max(MIN_TILE, math.isqrt(int(pixels))))
        w = min(width, max(MIN_TILE, int(pixels // h)))
        h = min(height, max(MIN_TILE, int(pixels // w)))
        h, w = self.rounded(h, w)
        return (h, w) if h * w < height * width else None
