"""`lpmrf-fast doctor`: what is installed, what this machine has, and what will therefore run."""

import os
import platform
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lpmrf_kernels
from lpmrf_kernels.registry import forced_backend, unavailable

from . import checkpoint
from .engine import Plan, estimate
from .engine.engine import dtypes
from .engine.memory import free_memory, parse_bytes
from .engine.plan import resolved_backends
from .pipeline import Pipeline, default_device, default_dtype

CORE = ("lpmrf-fast", "torch", "triton", "numpy", "safetensors", "Pillow", "tqdm")
OPTIONAL = {
    "scikit-image": "demo",
    "opencv-python-headless": "demo, train",
    "PyYAML": "train",
    "huggingface_hub": "hub",
    "xformers": "attention",
    "flash-attn": "attention",
}
"""Distribution → the extra that brings it."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
ENVIRONMENT += ("THP_MEM_ALLOC_ENABLE", "TRITON_CACHE_DIR", "TRITON_INTERPRET")


def report() -> str:
    """All sections as text."""
    sections = {
        "versions": versions(),
        "optional packages": optional_packages(),
        "machine": machine(),
        "kernels": kernels(),
        "checkpoints": checkpoints(),
        "environment": environment(),
        "ops": ops(),
    }
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections.items())


def plan(
    width: int,
    height: int,
    batch_size: int = 1,
    steps: int = 25,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_memory: str | None = None,
    offline: bool = False,
) -> str:
    """How a batch would run, what it would cost, and whether it fits. The device need not be there."""
    where = default_device() if device == "auto" else torch.device(device)
    absent = where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()
    chosen = torch.bfloat16 if absent and dtype == "auto" else default_dtype(dtype, where)
    pipe = Pipeline.from_pretrained(model, dtype=None, device="cpu", local_files_only=offline)
    for network in pipe.modules.values():
        network.to(chosen)
    H, W = pipe.padded_size(height, width)
    graph = "graph" if where.type == "cuda" else "eager"
    served = resolved_backends(where, forced_backend())
    wanted = Plan(batch_size, H, W, steps, str(where), dtypes(pipe), graph, backends=served)
    cost = estimate(pipe, wanted)
    free = parse_bytes(max_memory) if max_memory else None if absent else free_memory(where)
    if free is None:
        verdict = f"no {where} here to compare with; --max-memory says what it would have"
    elif cost.memory <= free:
        verdict = f"fits: {cost.memory / 1e9:.2f} GB of {free / 1e9:.2f} GB"
    else:
        most = int((free - cost.weights) / estimate(pipe, replace(wanted, batch=1)).peak)
        hint = f"at most {most} at once would" if most > 0 else "photos would be cut into tiles"
        verdict = f"does not fit: {cost.memory / 1e9:.2f} GB of {free / 1e9:.2f} GB; {hint}"
    return f"{cost}\n{verdict}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, indented by two."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def versions() -> list[tuple[str, str]]:
    rows = [("python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(name, installed(name) or "not installed") for name in CORE]
    build = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    return rows + [("torch is built for", build or "CPU only"), ("torchvision", torchvision())]


def torchvision() -> str:
    """Never needed here; one that does not fit torch breaks other packages on import."""
    found = installed("torchvision")
    if found is None:
        return "not installed (not needed)"
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        return (
            f"{found} does not fit torch {torch.__version__} ({line(error)}): not needed here, but it breaks diffusers"
            " and others; pip uninstall torchvision, or install the matching one"
        )
    return f"{found} (not needed)"


def optional_packages() -> list[tuple[str, str]]:
    names = dict(OPTIONAL)
    if installed("opencv-python-headless") is None and installed("opencv-python") is not None:
        names = {("opencv-python" if n.startswith("opencv") else n): extra for n, extra in names.items()}
    return [
        (name, installed(name) or f'not installed (pip install "lpmrf-fast[{extra.split(",")[0]}]")')
        for name, extra in names.items()
    ]


def machine() -> list[tuple[str, str]]:
    flags = cpu_flags()
    rows = [
        ("system", platform.platform()),
        ("cpu", f"{cpu_name()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"),
        ("cpu flags", "unknown here" if flags is None else ", ".join(flags) or f"none of {', '.join(CPU_FLAGS)}"),
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "PyTorch sees no GPU"))
    device = default_device("auto")
    dtype = str(default_dtype("auto", device)).removeprefix("torch.")
    return rows + [("device auto", str(device)), ("dtype auto", f"{dtype} on {device}")]


def kernels() -> list[tuple[str, str]]:
    """Whether the two kinds of kernels can run at all."""
    rows = {"C++ (csrc), on the CPU": ("cpp", "cpu"), "Triton, on CUDA": ("triton", "cuda")}
    reasons = {name: unavailable(*where) for name, where in rows.items()}
    if not torch.cuda.is_available():
        reasons["Triton, on CUDA"] = reasons["Triton, on CUDA"] or "PyTorch sees no GPU"
    return [(name, "ready" if reason is None else f"no: {reason}") for name, reason in reasons.items()]


def cpuinfo(*keys: str) -> str | None:
    """A value of /proc/cpuinfo, of the first key that is there."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    entries = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in rows)}
    return next((entries[key] for key in keys if key in entries), None)


def cpu_name() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str] | None:
    """The instruction sets that matter here; None where the system does not tell."""
    text = cpuinfo("flags", "Features")
    return None if text is None else [flag for flag in CPU_FLAGS if flag in text.split()]


def checkpoints() -> list[tuple[str, str]]:
    rows = []
    for name in checkpoint.bundled():
        try:
            config = checkpoint.read_config(name)
            megabytes = sum(f.stat().st_size for f in (checkpoint.BUNDLED / name).iterdir()) / 1e6
            rows.append((name, f"bundled, {config.get('pipeline')}, {megabytes:.1f} MB"))
        except ValueError as error:
            rows.append((name, f"bundled, unusable: {line(error)}"))
    return rows or [("bundled", "none in this installation; give --model")]


def environment() -> list[tuple[str, str]]:
    """Variables that change what runs, as they are set."""
    names = sorted({*ENVIRONMENT, *(name for name in os.environ if name.startswith("LPMRF_"))} & set(os.environ))
    return [(name, os.environ[name]) for name in names] or [("nothing set", "")]


def ops() -> list[tuple[str, ...]]:
    rows = [("op", "direction", "device", "backend", "others")]
    for served in lpmrf_kernels.backends():
        reasons: dict[str, list[str]] = {}
        for name, reason in served.why_not.items():
            reasons.setdefault(reason, []).append(name)
        others = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        rows.append((served.op, served.direction, served.device, served.backend or "nobody", others))
    return rows


def line(error: BaseException) -> str:
    return " ".join(str(error).split())
