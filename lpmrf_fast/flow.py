"""Rectified flow: the straight path from a source to clean data, its velocity, and Euler's method along it.

One direction of time: t runs from 0 (source) to 1 (clean), x_t = (1 - t) · source + t · clean, v = clean - source and
z += Δt · v. Sources: rectified flow, arXiv 2209.03003; PMRF, arXiv 2410.00418.
"""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from lpmrf_kernels import euler_step

TIME_SAMPLINGS = ("uniform", "stratified", "logit-normal")


def interpolant(source: Tensor, clean: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) · source + t · clean; t in [0, 1] is a number, or (B,) with one time a batch element."""
    if isinstance(t, Tensor):
        t = t.reshape(-1, *[1] * (source.dim() - 1))
    return (1 - t) * source + t * clean


def velocity_target(source: Tensor, clean: Tensor) -> Tensor:
    """The velocity of every point of the straight path, which a network learns: clean - source."""
    return clean - source


def time_grid(num_steps: int, eps: float = 0.0) -> list[float]:
    """The num_steps + 1 even knots from eps to 1.

    Raises TypeError for a number of steps that is no integer, ValueError for none or an eps outside [0, 1).
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral):
        raise TypeError(f"the number of steps must be an int, got {num_steps!r}")
    num_steps = int(num_steps)
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {num_steps}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps, the first time, must be in [0, 1), got {eps}")
    return [eps + (1 - eps) * k / num_steps for k in range(num_steps)] + [1.0]


def sample(
    velocity: Callable[[Tensor, float], Tensor],
    z: Tensor,
    num_steps: int,
    eps: float = 0.0,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Euler's method from the source z at t = eps to t = 1: z_{k+1} = z_k + (t_{k+1} - t_k) · v(z_k, t_k).

    velocity(z, t) takes the state and the time as a float and returns any float dtype; the state is at least float32
    and float64 for a float64 source. callback(k, t, z), k counted from 0, sees the state z that step k reached and
    its time t = t_{k+1}. Nothing is mutated; returns the state at t = 1. Exact on straight paths.
    """
    return integrate(lambda k, z, t, dt: euler_step(z, velocity(z, t), dt), z, num_steps, eps, callback)


def integrate(
    step: Callable[[int, Tensor, float, float], Tensor],
    z: Tensor,
    num_steps: int,
    eps: float = 0.0,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """`sample` with steps of one's own: step(k, z, t, dt) returns the state at t + dt."""
    times = time_grid(num_steps, eps)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for k, (t, after) in enumerate(zip(times, times[1:])):
        z = step(k, z, t, after - t)
        if callback is not None:
            callback(k, after, z)
    return z


def time_reversed(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Our velocity v(x, t) from a network of the official Latent-PMRF convention.

    Such a network takes sigma = 1 - t (1 = source, 0 = clean) and predicts source - clean.
    """
    return -network(x, 1 - t)


def velocity(network: Callable[..., Tensor], x: Tensor, t: Tensor | float, time_runs_down: bool = False) -> Tensor:
    """Our velocity v(x, t) from a network of either official convention.

    The attribute `time_runs_down` of a network says which, `time_runs_down` here is for one that has none. False:
    PMRF's (HDiT), which is ours. True: Latent-PMRF's (LooUFormer). One whose `time_embed_dim` is None takes no time.
    """
    timed = network if getattr(network, "time_embed_dim", 0) is not None else lambda x, _: network(x)
    if getattr(network, "time_runs_down", time_runs_down):
        return time_reversed(timed, x, t)
    return timed(x, t)


def sample_times(
    batch: int,
    mode: str = "uniform",
    generator: torch.Generator | None = None,
    device=None,
) -> Tensor:
    """Times (batch,) float32 in [0, 1) to train at; `device` defaults to the generator's.

    "uniform": independent draws. "stratified": one draw from each of `batch` equal intervals, in order: fewer batches
    see one part of the path only (k-diffusion's stratified_uniform, as PMRF trains). "logit-normal": the sigmoid of
    normal draws, most of them in the middle of the path (arXiv 2403.03206).
    Raises ValueError for another mode.
    """
    if mode not in TIME_SAMPLINGS:
        raise ValueError(f"time sampling must be one of {', '.join(TIME_SAMPLINGS)}, got {mode!r}")
    if device is None:
        device = generator.device if generator is not None else "cpu"
    if mode == "logit-normal":
        return torch.randn(batch, generator=generator, device=device).sigmoid_().clamp_(max=1 - 2**-24)
    u = torch.rand(batch, generator=generator, device=device)
    if mode == "uniform":
        return u
    # (batch - 1 + u) / batch can round up to 1.
    return ((torch.arange(batch, device=device) + u) / batch).clamp_(max=1 - 2**-24)
