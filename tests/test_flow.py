"""lpmrf_fast.flow: one direction of time, exact Euler steps on straight paths, state in float32, times for training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpmrf_fast import flow


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the path


def test_time_runs_from_source_to_clean():
    source, clean = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    assert torch.equal(flow.interpolant(source, clean, 0.0), source)
    assert torch.equal(flow.interpolant(source, clean, 1.0), clean)
    t = torch.tensor([0.0, 0.25])
    x = flow.interpolant(source, clean, t)
    assert torch.equal(x[0], source[0])
    torch.testing.assert_close(x[1], 0.75 * source[1] + 0.25 * clean[1])


def test_velocity_is_the_derivative_of_the_interpolant():
    source, clean = randn(2, 3, 4, 4, dtype=torch.float64), randn(2, 3, 4, 4, seed=1, dtype=torch.float64)
    for t in (0.0, 0.3, 0.9):
        slope = (flow.interpolant(source, clean, t + 0.1) - flow.interpolant(source, clean, t)) / 0.1
        torch.testing.assert_close(slope, flow.velocity_target(source, clean), rtol=1e-12, atol=1e-12)


def test_the_official_convention_runs_the_other_way():
    """A network that predicts source - clean from sigma = 1 - t, and knows where it is by sigma alone."""
    source, clean = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    seen = []

    def official(x, sigma):
        seen.append(sigma)
        return source - clean

    t = torch.tensor([0.0, 0.75])
    assert torch.equal(flow.time_reversed(official, source, t), flow.velocity_target(source, clean))
    assert torch.equal(seen[0], torch.tensor([1.0, 0.25]))


# ---- Euler


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 60),
    eps=st.floats(0, 0.9),
    shape=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_number_of_steps_is_exact_on_a_straight_path(steps, eps, shape, seed):
    source, clean = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    v = flow.velocity_target(source, clean)
    end = flow.sample(lambda z, t: v, flow.interpolant(source, clean, eps), steps, eps)
    # One rounding a step: the steps telescope from eps to 1.
    assert (end - clean).abs().max() <= (steps + 3) * 2**-23 * (source.abs() + clean.abs()).max()


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_euler_of_a_known_equation(steps):
    """dz/dt = z: each step multiplies by 1 + 1/K."""
    end = flow.sample(lambda z, t: z, torch.ones(1, 1, 2, 2, dtype=torch.float64), steps)
    torch.testing.assert_close(end, torch.full_like(end, (1 + 1 / steps) ** steps), rtol=1e-12, atol=0)


def test_velocity_is_asked_at_the_start_of_each_step():
    asked, seen = [], []
    z = torch.zeros(1, 1, 1, 1)

    def velocity(state, t):
        asked.append(t)
        return torch.full_like(state, 2 * t)

    end = flow.sample(velocity, z, 4, callback=lambda k, t, state: seen.append((k, t, state.item())))
    assert asked == [0, 0.25, 0.5, 0.75]
    assert seen == [(0, 0.25, 0.0), (1, 0.5, 0.125), (2, 0.75, 0.375), (3, 1.0, 0.75)]
    assert end.item() == 0.75 and z.item() == 0


def test_time_grid():
    assert flow.time_grid(1) == [0, 1]
    assert flow.time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert flow.time_grid(2, eps=0.5) == [0.5, 0.75, 1]
    assert all(b > a for a, b in zip(flow.time_grid(1000, 0.1), flow.time_grid(1000, 0.1)[1:]))


@pytest.mark.parametrize(
    "source, state",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_is_at_least_float32(source, state):
    seen = []

    def velocity(z, t):
        seen.append(z.dtype)
        return torch.full(z.shape, 2.0**-10, dtype=torch.bfloat16)

    end = flow.sample(velocity, torch.ones(1, 1, 2, 2, dtype=source), 16)
    assert set(seen) == {state} and end.dtype == state
    # Each step adds 2^-14 to 1, which bfloat16 could not hold.
    torch.testing.assert_close(end, torch.full_like(end, 1 + 2**-10), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "steps, eps, error", [(0, 0, ValueError), (-3, 0, ValueError), (2.5, 0, TypeError), (True, 0, TypeError),
                          (5, 1.0, ValueError), (5, -0.1, ValueError), (5, math.nan, ValueError)]
)  # fmt: skip
def test_nonsense_is_refused(steps, eps, error):
    with pytest.raises(error, match="number of steps|eps"):
        flow.sample(lambda z, t: z, torch.zeros(1, 1, 1, 1), steps, eps)


# ---- times to train at


@pytest.mark.parametrize("mode", flow.TIME_SAMPLINGS)
def test_times_are_reproducible_and_cover_the_path(mode):
    def draw(n, seed):
        return flow.sample_times(n, mode, torch.Generator().manual_seed(seed))

    t = draw(4096, 0)
    assert t.dtype == torch.float32 and t.shape == (4096,)
    assert 0 <= t.min() and t.max() < 1
    assert torch.equal(t, draw(4096, 0)) and not torch.equal(t, draw(4096, 1))
    if mode == "logit-normal":
        t = torch.special.ndtr(torch.logit(t))
    # Kolmogorov-Smirnov distance to the uniform distribution; 0.03 has a chance of 1e-3 for independent draws.
    distance = (t.sort().values - torch.arange(4096) / 4096).abs().max()
    assert distance < 0.03


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_stratified_times_hit_each_interval_once(batch, seed):
    t = flow.sample_times(batch, "stratified", torch.Generator().manual_seed(seed)).double()
    # Half a unit in the last place of t may round over a border.
    k = torch.arange(batch)
    assert (t >= k / batch - 2**-24).all() and (t <= (k + 1) / batch + 2**-24).all() and t.max() < 1


def test_no_time_rounds_up_to_one(monkeypatch):
    """(B - 1 + u) / B does in float32, for the largest u that torch.rand draws."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, 1 - 2**-24))
    assert flow.sample_times(7, "stratified").max() < 1


def test_unknown_time_sampling():
    with pytest.raises(ValueError, match="uniform, stratified, logit-normal, got 'lognormal'"):
        flow.sample_times(4, "lognormal")
