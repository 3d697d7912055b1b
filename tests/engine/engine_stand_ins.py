"""Stand-ins for a GPU.

Tape captures as a CUDA graph does, on the CPU: it records the operations and the very tensors of a run, and a replay
repeats them on those tensors without running any Python of the region. `fake` makes CUDA tensors without data in any
build of PyTorch, and Pure refuses what a capture would: host tensors, values read back, shapes that depend on data.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape:
    """A capturer for `Engine(capturer=...)`. sizes: plan → (bytes that the pool grows by, bytes beside it)."""

    def __init__(self, sizes=lambda plan: (0, 0), trouble=lambda plan: None):
        self.sizes, self.trouble = sizes, trouble
        self.captured, self.replayed, self.pools, self.released = [], 0, 0, 0

    def new_pool(self):
        self.pools += 1
        return self.pools

    def release(self):
        self.released += 1

    def capture(self, runs, pool, plan):
        assert pool == self.pools
        self.captured.append(plan)
        self.trouble(plan)
        for run in runs:
            run()
        tapes = [Recording(run) for run in runs]
        return [self.replay(tape) for tape in tapes], sum(len(tape.calls) for tape in tapes), *self.sizes(plan)

    def replay(self, tape):
        def run():
            self.replayed += 1
            tape.replay()

        return run


class Recording(TorchDispatchMode):
    def __init__(self, run):
        super().__init__()
        self.calls = []
        with torch.no_grad(), self:
            run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        new = {}
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                args, kwargs = tree_map(lambda x: new.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs))
                out = func(*args, **kwargs)
                new.update((id(a), b) for a, b in zip(tree_leaves(recorded), tree_leaves(out)) if isinstance(a, Tensor))


# ---- CUDA tensors without CUDA


@contextmanager
def fake():
    """Tensors made inside are fake, and those of a GPU work without one too, in any build of PyTorch."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            # Methods that enter a device's guard, which asks CUDA for its device: the operations behind them.
            for name, method in UNGUARDED.items():
                stack.enter_context(patch.object(FakeTensor, name, method, create=True))
            # By which tables of measured launches are found.
            stack.enter_context(patch("torch.cuda.get_device_name", lambda device=None: "a GPU without tables"))
        stack.enter_context(FakeTensorMode())
        yield


def assigned(x: Tensor, key, value) -> None:
    view = indexed(x, key)
    torch.ops.aten.copy_(view, value) if isinstance(value, Tensor) else view.fill_(value)


def indexed(x: Tensor, key) -> Tensor:
    key = key if isinstance(key, tuple) else (key,)
    if not any(k is Ellipsis for k in key):
        key = (*key, Ellipsis)
    tensors, axis = [], 0
    for i, k in enumerate(key):
        if isinstance(k, int):
            x = x.select(axis, k)
            continue
        if k is Ellipsis:
            after = sum(other is not None for other in key[i + 1 :])
            tensors += [None] * (x.dim() - axis - after)
            axis = x.dim() - after
            continue
        if k is None:
            x = x.unsqueeze(axis)
        elif isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(x, axis, k.start, k.stop, 1 if k.step is None else k.step)
        tensors.append(k if isinstance(k, Tensor) else None)
        axis += 1
    return torch.ops.aten.index.Tensor(x, tensors) if any(t is not None for t in tensors) else x


UNGUARDED = {
    "__getitem__": indexed,
    "__setitem__": assigned,
    "__invert__": lambda x: torch.ops.aten.bitwise_not(x),
    "contiguous": lambda x, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
        x, memory_format=memory_format
    ),
    "copy_": lambda x, other, non_blocking=False: torch.ops.aten.copy_(x, other, non_blocking),
}


class Impure(AssertionError):
    pass


class Pure(TorchDispatchMode):
    """Refuses what must not happen while a CUDA graph is captured."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        tags = set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # tagged for boolean masks alone
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            tags -= set() if masks else {torch.Tag.dynamic_output_shape}
        if torch.Tag.data_dependent_output in tags or func is torch.ops.aten._local_scalar_dense.default:
            raise Impure(f"{func} reads a value back: the host waits for the device")
        if torch.Tag.dynamic_output_shape in tags:
            raise Impure(f"{func} has a shape that depends on data")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                raise Impure(f"{func} touches a tensor on {tensor.device}: a copy between host and device")
        return out
