"""The captured region: degraded pixels to restored pixels as tensor operations only.

Nothing in here reads a value back, waits, or touches the host: seeds and times are device tensors, and a step's Δt is
a constant of the plan (or a device tensor too, where one captured step serves any number of them). Every operation
keeps the photos of a batch apart, so that padding rows cannot touch their neighbours.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lpmrf_kernels as ops

from .. import flow
from .plan import Plan

MAX_STEPS = 256
"""Rows of the table of times in mode "step"."""


class Buffers:
    """A bucket's static tensors: a captured graph reads and writes these very addresses.

    pixels (B, 3, H, W) uint8, channels-last: photos in. seeds (B,) int64.
    images, means (B, 3, H, W) uint8, channels-last: restored photos and posterior means out. finite (B,) bool: False
    where a value was NaN or infinite; that photo's pixels are then worth nothing.
    times (K,), steps (K,): t and Δt of the Euler steps, in the state's dtype. tables: what the velocity network knows
    from the times alone. For mode "step": next (1,) int64, the step that comes next, and state, the flow's.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype):
        def pixels():
            shape = (plan.batch, plan.height, plan.width, 3)
            return torch.zeros(shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)

        self.pixels, self.images, self.means = pixels(), pixels(), pixels()
        self.seeds = torch.zeros(plan.batch, dtype=torch.int64, device=device)
        self.finite = torch.zeros(plan.batch, dtype=torch.bool, device=device)
        self.times = torch.zeros(plan.steps or MAX_STEPS, dtype=dtype, device=device)
        self.steps = torch.zeros_like(self.times)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)
        self.state: Tensor | None = None  # its shape, and that of the tables, shows in a first run
        self.tables = None
        self.stale = False
        """Whether tables are those of other times or weights."""
        self._grid = None

    def row(self, index: int) -> "Buffers":
        """Buffers of one photo, whose pixels, seed and results are those of a row of these."""
        one = copy.copy(self)
        for name in ("pixels", "images", "means", "seeds", "finite"):
            setattr(one, name, getattr(self, name)[index : index + 1])
        one.times, one.steps, one.next = (torch.zeros_like(t) for t in (self.times, self.steps, self.next))
        return one

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in tree_leaves(list(vars(self).values())) if isinstance(t, Tensor))

    def set_grid(self, num_steps: int, eps: float) -> None:
        """Write the knots of `num_steps` even steps, unless they are there."""
        if self._grid != (num_steps, eps):
            if num_steps > len(self.times):
                raise ValueError(
                    f'mode "step" takes at most {len(self.times)} steps, got {num_steps}; use mode "graph"'
                )
            knots = flow.time_grid(num_steps, eps)
            for tensor, values in ((self.times, knots[:-1]), (self.steps, [b - a for a, b in zip(knots, knots[1:])])):
                tensor[:num_steps].copy_(torch.tensor(values, dtype=tensor.dtype, device="cpu"))
            self._grid, self.stale = (num_steps, eps), True


@dataclass(frozen=True)
class Segment:
    """A part of the chain that is captured by itself."""

    name: str
    run: Callable[[], None]
    repeats: bool = False
    """Runs once an Euler step, not once."""


class Region:
    """The chain of a pipeline's stages, written into a bucket's buffers.

    stages: a pipeline, or anything with its predict_mean, encode, add_noise, tables, velocity_at, euler_step, decode,
        state_dtype and eps.
    mark(name): a context entered around each stage, for those who count.
    """

    def __init__(self, stages, mark: Callable = lambda name: nullcontext()):
        self.stages, self.mark = stages, mark

    def segments(self, plan: Plan, buffers: Buffers) -> list[Segment]:
        """What to run, in order, for one restoration."""
        if plan.steps is None:
            return [
                Segment("pixels to source", lambda: self._begin(buffers)),
                Segment("one step", lambda: self._step(buffers), repeats=True),
                Segment("state to pixels", lambda: self._finish(buffers, buffers.state)),
            ]
        return [Segment("pixels to pixels", lambda: self._whole(plan, buffers))]

    def refresh(self, buffers: Buffers) -> None:
        """Make tables again, in place, that are those of other times or weights."""
        if buffers.stale and buffers.tables is not None:
            new = self.stages.tables(buffers.times, *buffers.state.shape[-2:])
            for old, values in zip(tree_leaves(buffers.tables), tree_leaves(new)):
                if isinstance(old, Tensor):
                    old.copy_(values)
        buffers.stale = False

    def _whole(self, plan: Plan, buffers: Buffers) -> None:
        z = self._source(buffers)
        knots = flow.time_grid(plan.steps, self.stages.eps)
        with self.mark("velocity"):
            for k, (t, after) in enumerate(zip(knots, knots[1:])):
                z = self.stages.euler_step(z, buffers.times[k], after - t, buffers.tables, k)
        self._finish(buffers, z)

    def _begin(self, buffers: Buffers) -> None:
        z = self._source(buffers)
        buffers.state.copy_(z)
        buffers.next.zero_()

    def _step(self, buffers: Buffers) -> None:
        z = buffers.state
        with self.mark("velocity"):
            t, dt = (values.index_select(0, buffers.next) for values in (buffers.times, buffers.steps))
            v = self.stages.velocity_at(z, t, buffers.tables, buffers.next)
            z.copy_(torch.addcmul(z, dt.view(1, 1, 1, 1), v.to(z.dtype)))
            buffers.next.add_(1)

    def _source(self, buffers: Buffers) -> Tensor:
        stages, mark = self.stages, self.mark
        with mark("from uint8"):
            y = ops.from_uint8(buffers.pixels, dtype=stages.state_dtype)
        with mark("posterior mean"):
            mean = stages.predict_mean(y)
        with mark("to uint8"):
            finite = mean.isfinite().flatten(1).all(1)
            buffers.finite.copy_(finite)
            buffers.means.copy_(ops.to_uint8(mean))
        with mark("encode"):
            z = stages.encode(mean)
        with mark("source noise"):
            z = stages.add_noise(z, buffers.seeds)
        if buffers.state is None:  # a first run; graphs are captured after it
            with mark("tables"):
                buffers.state, buffers.tables = torch.empty_like(z), stages.tables(buffers.times, *z.shape[-2:])
        return z

    def _finish(self, buffers: Buffers, z: Tensor) -> None:
        with self.mark("decode"):
            x = self.stages.decode(z)
        with self.mark("to uint8"):
            buffers.finite.logical_and_(x.isfinite().flatten(1).all(1))
            buffers.images.copy_(ops.to_uint8(x))
