"""Launch choice as data: tile sizes and warps of a kernel, by op, problem size and GPU.

An op brings a heuristic that runs everywhere. A table overrides it where someone has measured: first the one shipped
in configs/, then, since it was measured on this very machine, the user's. A table is `<GPU name>.json`:

    {"target": "sm_90", "euler_step": [{"numel": 65536, "BLOCK": 1024, "num_warps": 4}, ...], ...}

Each row holds the sizes that it was measured at, in lower case, and the choice that won, tiles in capitals; the nearest
row in log space answers. Tuning (`tune.py`) is a command that writes such a file: nothing is timed on a path that may
be captured in a CUDA graph.
"""

import itertools
import json
import logging
import math
import os
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger("lpmrf_kernels")


def launch_config(op: str, device: torch.device, default: dict[str, int], **sizes: int) -> dict[str, int]:
    """The choice for `op` at these sizes: `default` (the heuristic's) or the nearest row of this GPU's table.

    A row takes part if it has exactly these sizes and the keys of `default`, so an old table never breaks a newer
    kernel: it is passed over.
    """
    if _watch is not None:
        return _watch(op, default, sizes)
    if device.type != "cuda":
        return default
    keys = sizes.keys() | default.keys()
    row = nearest_row(op, device, lambda row: row.keys() == keys, **sizes)
    return {key: row[key] for key in default} if row else default


def nearest_row(op: str, device: torch.device, takes_part=lambda row: True, **sizes: int) -> dict[str, int]:
    """The row of this GPU's table for `op` that was measured nearest to these sizes; empty if there is none."""
    try:
        gpu = torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):  # a fake tensor of a device that is not here
        return {}
    rows = _table(gpu).get(op, [])
    rows = [row for row in rows if row.keys() >= sizes.keys() and takes_part(row)]
    return min(rows, key=lambda row: sum(math.log(row[k] / max(n, 1)) ** 2 for k, n in sizes.items()), default={})


_watch = None


@contextmanager
def watched(watch):
    """Inside, `watch(op, default, sizes)` answers for `launch_config`, in all threads: a backward runs in its own."""
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None


def choices(**values) -> list[dict[str, int]]:
    """Every combination: choices(BLOCK=(512, 1024), num_warps=(4, 8)) is a list of four, for `Op.candidates`."""
    return [dict(zip(values, picked, strict=True)) for picked in itertools.product(*values.values())]


def table_name(gpu: str) -> str:
    """File name of a GPU's table: "NVIDIA H200" → "NVIDIA-H200.json"."""
    return re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-") + ".json"


def user_folder() -> Path:
    """Where the user's tables are: lpmrf-fast/configs in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpmrf-fast" / "configs"


@cache
def _table(gpu: str) -> dict[str, list[dict[str, int]]]:
    table = {}
    for folder in (Path(__file__).parent / "configs", user_folder()):
        path = folder / table_name(gpu)
        if path.exists():
            try:
                table.update(_read(path))
            except (OSError, ValueError) as error:
                _log.warning("launch table %s is passed over: %s", path, error)
    return table


def forget_tables() -> None:
    """Read the tables anew: a file has changed."""
    _table.cache_clear()


def _read(path: Path) -> dict[str, list[dict[str, int]]]:
    table = json.loads(path.read_text())
    if isinstance(table, dict):
        table.pop("target", None)  # for the compile report
    valid = isinstance(table, dict) and all(
        isinstance(rows, list) and all(isinstance(row, dict) and all(map(_positive, row.values())) for row in rows)
        for rows in table.values()
    )
    if not valid:
        raise ValueError("expected {op: [{size or choice: positive integer, ...}, ...], ...}")
    return table


def _positive(n) -> bool:
    return type(n) is int and n > 0
