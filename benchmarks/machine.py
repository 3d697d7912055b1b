"""What a number was measured on: device, clocks, power, driver, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "xformers", "flash-attn", "liger-kernel", "natten")
GPU_STATE = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "pstate", "temperature.gpu")


def describe(device: str) -> dict:
    """One entry a run; rows add `gpu_state` of their own."""
    cuda = device.startswith("cuda")
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        # PyTorch's own word says which build it is; its metadata may not.
        "versions": {name: installed(name) for name in PACKAGES if installed(name)} | {"torch": torch.__version__},
        "commit": commit(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LPMRF_", "OMP_", "THP_"))},
    }
    if cuda:
        p = torch.cuda.get_device_properties(device)
        found |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        found |= {"memory_bytes": p.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= gpu_state(device, ("driver_version", "clocks.max.sm", "clocks.max.mem", *GPU_STATE))
    elif hasattr(os, "getloadavg"):
        found["load_average"] = round(os.getloadavg()[0], 1)  # what else ran beside it
    return found


def gpu_state(device: str, fields=GPU_STATE) -> dict[str, str]:
    """What nvidia-smi says of the GPU now; nothing where it is not there."""
    if not device.startswith("cuda"):
        return {}
    which = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", f"GPU-{which}"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in text.strip().split(",")), strict=False))


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """The checkout's commit, with -dirty where files differ from it; of a copy without git, what LPMRF_COMMIT says."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LPMRF_COMMIT", "unknown")
