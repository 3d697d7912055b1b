"""Inputs, layouts, wrong kernels and guards that the tests of all ops share."""

import importlib.util
import inspect
from contextlib import contextmanager

import pytest
import torch

# "contiguous", "reversed" and "sliced" take any number of dimensions, the others (B, C, H, W).
LAYOUTS = ("contiguous", "channels_last", "transposed", "reversed", "sliced", "expanded")


def arrange(x, layout):
    """The same values in another memory layout. What is not part of a sliced tensor is NaN: reading it shows."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    if layout == "reversed":
        order = tuple(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        room = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
        view = room[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "expanded":
        return x[:, :, :1].expand(x.shape)
    return x.contiguous()


def mutant(kernel, old, new, tmp_path):
    """The kernel with `old` replaced by `new` in its source. Triton reads sources from files, so it becomes one."""
    source = inspect.getsource(kernel.fn)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {kernel.fn.__name__}"
    path = tmp_path / f"mutant{len(list(tmp_path.iterdir()))}.py"  # a new name, or Python runs cached bytecode
    path.write_text("from lpmrf_kernels._triton import jit, tl\n\n\n" + source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    # Helpers of the original's file, such as _box_muller.
    module.__dict__.update({k: v for k, v in kernel.fn.__globals__.items() if not k.startswith("__")})
    spec.loader.exec_module(module)
    return getattr(module, kernel.fn.__name__)


@contextmanager
def guarded_outputs(monkeypatch, room=64):
    """Outputs of `torch.empty_like` lie between guards; a write outside fails the test when the block ends."""
    guards = []

    def empty_like(x, dtype=None, device=None):
        model = original(x, dtype=dtype, device=device)
        if model.is_meta:
            return model
        buffer = torch.full((room + model.numel() + room,), 12345.0, dtype=model.dtype, device=model.device)
        guards.extend((buffer[:room], buffer[room + model.numel() :]))
        return buffer.as_strided(model.shape, model.stride(), room)

    original = torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert guards, "nothing was allocated"
    assert all((guard == 12345.0).all() for guard in guards), "written outside of the output"


class Spy:
    """Stands in for a Triton kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def ops_run(function):
    """Names of the torch ops that ran inside `function`, those below a custom op included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def far_apart(device):
    """A float32 (2, 1, 1, 4) view whose second photo starts 2³¹ elements after the first; no memory is touched."""
    try:
        room = torch.empty(2**31 + 4, device=device)
    except RuntimeError:
        pytest.skip("8.6 GB of address space are not there")
    return room.as_strided((2, 1, 1, 4), (2**31, 4, 4, 1))
