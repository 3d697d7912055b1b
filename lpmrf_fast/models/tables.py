"""What a velocity network computes from its times and the size of its input alone: once a sampling, not in its loop.

A network that can has `prepare(times, height, width)`, which returns `Tables`, and `forward(x, tables=..., step=k)`,
which uses the k-th of the times. Samplers ask for `prepare`; a network without it is simply called with each time.
Where `fuses_euler`, `forward(x, tables=..., step=k, euler=(z, dt))` is the whole step, z + dt · velocity.
"""

from typing import NamedTuple

from torch import Tensor


class BlockTables(NamedTuple):
    """One block's: rotary tables (H, W, heads, head_dim / 4) of its map, and the scales of its adaptive norms.

    scales: one (K, channels) a norm, a row a time; none in an untimed network.
    """

    cos: Tensor
    sin: Tensor
    scales: tuple[Tensor, ...] = ()


class Tables(NamedTuple):
    """A network's, for inputs of `size` (height, width): its levels' blocks in the order in which they run."""

    size: tuple[int, int]
    levels: list[list[BlockTables]]

    def at(self, step: int | Tensor | None, batch: int) -> list[list[BlockTables]]:
        """The levels with scales (batch, channels): those of time `step`, or, for None, one time a batch element.

        step: a tensor is int64 (1,) on the tables' device, for a CUDA graph of one step that serves all of them.
        """

        def rows(scale: Tensor) -> Tensor:
            if isinstance(step, Tensor):
                scale = scale.index_select(0, step)
            elif step is not None:
                scale = scale[step : step + 1]
            return scale.expand(batch, -1)

        return [[BlockTables(b.cos, b.sin, tuple(rows(s) for s in b.scales)) for b in level] for level in self.levels]
