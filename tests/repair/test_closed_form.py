"""The closed form against numpy.linalg.lstsq, and its promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError, WindowMoments
from streamline_hooks.repair import kind_named, solve


def moments_of(x: torch.Tensor, y: torch.Tensor) -> WindowMoments:
    moments = WindowMoments(x.shape[-1])
    moments.update(x[None], y[None], torch.ones(1, len(x)))
    return moments


def draw(count: int, seed: int, noise: float = 1.0, features: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    map_ = torch.randn(features, features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = x + x @ map_ + noise * torch.randn(count, features, generator=generator, dtype=torch.float64)
    y[::11] *= 50.0
    return x, y


@given(st.integers(0, 20))
def test_without_a_ridge_it_is_weighted_least_squares(seed: int) -> None:
    x, y = draw(60, seed)
    held_x, held_y = draw(20, seed + 100)
    solution = solve(moments_of(x, y), moments_of(held_x, held_y), ridges=[0.0])
    a, b = torch.cat([x, held_x]).numpy(), torch.cat([y, held_y]).numpy()
    weight = 1 / np.linalg.norm(b, axis=-1, keepdims=True)
    expected = np.linalg.lstsq(a * weight, (b - a) * weight, rcond=None)[0]
    np.testing.assert_allclose(solution.map.numpy(), expected, rtol=1e-8, atol=1e-9)


@given(st.integers(0, 20), st.floats(0.0, 10.0))
def test_a_ridge_is_a_penalty_in_units_of_the_mean_eigenvalue(seed: int, ridge: float) -> None:
    x, y = draw(60, seed)
    pair = moments_of(x, y), moments_of(*draw(20, seed + 100))
    everything = WindowMoments(6)
    everything.merge(pair[0]), everything.merge(pair[1])
    penalty = ridge * everything.xx.trace() / 6 * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(everything.xx + penalty, everything.xd)
    torch.testing.assert_close(solve(*pair, ridges=[ridge]).map, expected, rtol=1e-7, atol=1e-9)


@given(st.integers(0, 20), st.integers(3, 40))
def test_it_is_never_above_plain_removal_on_what_it_was_fitted_on(seed: int, count: int) -> None:
    pair = moments_of(*draw(count, seed)), moments_of(*draw(4, seed + 100))
    everything = WindowMoments(6)
    everything.merge(pair[0]), everything.merge(pair[1])
    assert everything.error(solve(*pair).map) <= everything.error(torch.zeros(6, 6)) + 1e-12


@given(st.integers(0, 20))
def test_the_ridge_is_the_best_on_held_out_moments(seed: int) -> None:
    fitted, held_out = moments_of(*draw(10, seed, noise=5.0)), moments_of(*draw(200, seed + 100, noise=5.0))
    ridges = [1e-8, 1e-4, 1e-2, 1.0]
    solution = solve(fitted, held_out, ridges)
    alone = [solve(fitted, held_out, [r]).held_out_error for r in ridges]
    assert solution.ridge == ridges[int(np.argmin(alone))]
    assert solution.held_out_error == min(alone)
    assert solution.removal_error == held_out.error(torch.zeros(6, 6))


def test_few_noisy_tokens_ask_for_a_ridge() -> None:
    noisy = solve(moments_of(*draw(8, 0, noise=20.0)), moments_of(*draw(500, 1, noise=20.0)))
    plenty = solve(moments_of(*draw(5000, 0, noise=0.01)), moments_of(*draw(500, 1, noise=0.01)))
    assert noisy.ridge > 1e-2 > plenty.ridge


def test_what_cannot_be_solved() -> None:
    good = moments_of(*draw(20, 0))
    with pytest.raises(StreamlineError, match="The held-out moments hold no token"):
        solve(good, WindowMoments(6))
    with pytest.raises(StreamlineError, match="The fitted moments hold no token"):
        solve(WindowMoments(6), good)
    bad = moments_of(*draw(20, 0))
    bad.xx[0, 0] = float("nan")
    with pytest.raises(StreamlineError, match="The fitted moments are not finite"):
        solve(bad, good)
    zero = moments_of(torch.zeros(5, 6), torch.ones(5, 6))
    with pytest.raises(StreamlineError, match="Every state that enters the window is zero"):
        solve(zero, zero)


def test_kinds() -> None:
    solution = solve(moments_of(*draw(60, 0)), moments_of(*draw(20, 1)))
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(kind_named("linear").start(solution)(x), x + x @ solution.map.float())
    assert kind_named("none").start(solution) is None
    with pytest.raises(StreamlineError, match="The kind of replacement 'cubic' is unknown. Known: none, linear"):
        kind_named("cubic")
