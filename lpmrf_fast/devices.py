"""Which device and dtype a name stands for on this machine."""

import torch

DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
    **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
    **dict.fromkeys(("fp64", "float64", "double"), torch.float64),
}


class DeviceError(ValueError):
    """A device or dtype that this machine does not have; one line."""

    exit_status = 2
    """Of the command line: an argument that cannot be used."""


def default_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name; "auto" is the current GPU where there is one, else the CPU.

    Raises DeviceError, a ValueError, for one that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name such as 'auto', 'cpu' or 'cuda', got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"no device is called {device!r}; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if found.type != "meta" and (found.index or 0) >= (count := _count(found.type)):
        raise DeviceError(f"device {device!r}: PyTorch sees {count} {found.type.upper()} devices; use 'auto' or 'cpu'")
    return found


def _count(kind: str) -> int:
    """Devices of a kind that PyTorch can use here."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:  # a kind that this build has nothing for
        return 0
    return module.device_count() if module.is_available() else 0


def default_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on GPUs that have it and on CPUs with AVX512-BF16 or AMX, else float32.

    float16 on a CPU is refused: it is many times slower than float32 there. Raises DeviceError, a ValueError, and
    TypeError for something that is neither a name nor a float dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise DeviceError(f"no dtype is called {dtype!r}; there are auto, {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    if dtype not in DTYPES.values():
        raise TypeError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == torch.float16 and device.type == "cpu":
        raise DeviceError("float16 is many times slower than float32 on a CPU; use 'auto', 'bf16' or 'fp32'")
    return dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    # PyTorch has no public name for these; one that a version lacks counts as a no.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, test, bool)() for test in tests)
