"""The closed form against numpy.linalg.lstsq, and its promise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.repair import solve_least_squares
from streamline_hooks.repair.least_squares import RIDGES
from streamline_hooks.statistics import WindowMoments


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
    solution = solve_least_squares(moments_of(x, y), moments_of(held_x, held_y), ridges=[0.0])
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
    torch.testing.assert_close(solve_least_squares(*pair, ridges=[ridge]).map, expected, rtol=1e-7, atol=1e-9)


@given(st.integers(0, 20), st.integers(3, 40))
def test_it_is_never_above_plain_removal_on_what_it_was_fitted_on(seed: int, count: int) -> None:
    pair = moments_of(*draw(count, seed)), moments_of(*draw(4, seed + 100))
    everything = WindowMoments(6)
    everything.merge(pair[0]), everything.merge(pair[1])
    assert everything.error(solve_least_squares(*pair).map) <= everything.error(torch.zeros(6, 6)) + 1e-12


@given(st.integers(0, 20))
def test_the_ridge_is_the_best_on_held_out_moments(seed: int) -> None:
    fitted, held_out = moments_of(*draw(10, seed, noise=5.0)), moments_of(*draw(200, seed + 100, noise=5.0))
    ridges = [1e-8, 1e-4, 1e-2, 1.0]
    solution = solve_least_squares(fitted, held_out, ridges)
    alone = [solve_least_squares(fitted, held_out, [r]).held_out_error for r in ridges]
    assert solution.ridge == ridges[int(np.argmin(alone))]
    assert solution.held_out_error == min(alone)
    assert solution.removal_error == held_out.error(torch.zeros(6, 6))


@given(st.integers(0, 20), st.integers(3, 40))
def test_the_held_out_error_is_that_of_the_map_that_was_fitted_without_them(seed: int, count: int) -> None:
    """It is computed without the map; here it is computed from it."""
    fitted, held_out = moments_of(*draw(count, seed)), moments_of(*draw(30, seed + 100))
    for ridge in (1e-8, 1e-3, 1.0):
        map_ = torch.linalg.solve(
            fitted.xx + ridge * fitted.xx.trace() / 6 * torch.eye(6, dtype=torch.float64), fitted.xd
        )
        found = solve_least_squares(fitted, held_out, [ridge]).held_out_error
        assert found == pytest.approx(held_out.error(map_), rel=1e-6)


def test_the_ridges_that_are_tried_leave_no_gap() -> None:
    assert (RIDGES[0], RIDGES[-1]) == pytest.approx((1e-8, 10.0))
    for one, other in pairwise(RIDGES):
        assert one < other < 10.001 * one


def test_few_noisy_tokens_ask_for_a_ridge() -> None:
    noisy = solve_least_squares(moments_of(*draw(8, 0, noise=20.0)), moments_of(*draw(500, 1, noise=20.0)))
    plenty = solve_least_squares(moments_of(*draw(5000, 0, noise=0.01)), moments_of(*draw(500, 1, noise=0.01)))
    assert noisy.ridge > 1e-2 > plenty.ridge


def test_what_cannot_be_solved() -> None:
    good = moments_of(*draw(20, 0))
    with pytest.raises(StreamlineError, match=r"held-out.*no token"):
        solve_least_squares(good, WindowMoments(6))
    with pytest.raises(StreamlineError, match=r"fitted.*no token"):
        solve_least_squares(WindowMoments(6), good)
    for sums in ("xx", "xd"):
        bad = moments_of(*draw(20, 0))
        getattr(bad, sums)[0, 0] = float("nan")
        with pytest.raises(StreamlineError, match=r"fitted.*not finite"):
            solve_least_squares(bad, good)
        with pytest.raises(StreamlineError, match=r"held-out.*not finite"):
            solve_least_squares(good, bad)
    zero = moments_of(torch.zeros(5, 6), torch.ones(5, 6))
    with pytest.raises(StreamlineError, match=r"Every state.*zero"):
        solve_least_squares(zero, zero)


def everything(seed: int) -> tuple[WindowMoments, WindowMoments, WindowMoments, np.ndarray, np.ndarray]:
    """Two parts, both together, and the weighted states and targets by which they are made."""
    (x, y), (held_x, held_y) = draw(60, seed), draw(20, seed + 100)
    both = moments_of(torch.cat([x, held_x]), torch.cat([y, held_y]))
    a, b = torch.cat([x, held_x]).numpy(), torch.cat([y, held_y]).numpy()
    weight = 1 / np.linalg.norm(b, axis=-1, keepdims=True)
    return moments_of(x, y), moments_of(held_x, held_y), both, a * weight, (b - a) * weight


@given(st.integers(0, 20), st.integers(1, 6))
def test_low_rank_is_reduced_rank_regression(seed: int, rank: int) -> None:
    """Fitted values of least squares, and of these the best approximation: the textbook's way, on the data itself."""
    fit, held_out, both, x, d = everything(seed)
    solution = solve_least_squares(fit, held_out, ridges=[0.0], rank=rank)
    full = np.linalg.lstsq(x, d, rcond=None)[0]
    _, _, right = np.linalg.svd(x @ full, full_matrices=False)
    expected = full @ right[:rank].T @ right[:rank]
    np.testing.assert_allclose(solution.map.numpy(), expected, rtol=1e-7, atol=1e-8)
    assert np.linalg.matrix_rank(solution.map.numpy(), tol=1e-9) == rank
    plain = torch.linalg.svd(torch.from_numpy(full))
    naive = plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]
    assert both.error(solution.map) <= both.error(naive) + 1e-12


@given(st.integers(0, 20), st.integers(1, 5), st.floats(1e-4, 10.0))
def test_no_other_map_of_the_rank_is_better_with_its_penalty(seed: int, rank: int, ridge: float) -> None:
    fit, held_out, both, _, _ = everything(seed)
    found = solve_least_squares(fit, held_out, ridges=[ridge], rank=rank).map
    penalty = ridge * float(both.xx.trace()) / 6 / both.tokens

    def objective(map_: torch.Tensor) -> float:
        return both.error(map_) + penalty * float(map_.square().sum())

    left, values, right = torch.linalg.svd(found)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 1.0):
        a, b = (size * torch.randn(6, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        other = (left[:, :rank] * values[:rank] + a) @ (right[:rank] + b.T)
        assert objective(found) <= objective(other) + 1e-12
    assert both.error(found) <= both.error(torch.zeros(6, 6)) + 1e-12


def test_a_plain_decomposition_would_be_worse() -> None:
    """What the metric is for: features of very different size."""
    x, y = draw(200, 0)
    x[:, 0] *= 30.0
    pair = moments_of(x[:150], y[:150]), moments_of(x[150:], y[150:])
    both = moments_of(x, y)
    best, full = (solve_least_squares(*pair, ridges=[1e-8], rank=rank).map for rank in (2, None))
    left, values, right = torch.linalg.svd(full)
    assert both.error(best) < 0.99 * both.error(left[:, :2] * values[:2] @ right[:2])


@given(st.integers(0, 20))
def test_diagonal_is_least_squares_feature_by_feature(seed: int) -> None:
    fit, held_out, both, x, d = everything(seed)
    found = solve_least_squares(fit, held_out, ridges=[0.0], diagonal=True).map
    expected = [np.linalg.lstsq(x[:, k : k + 1], d[:, k], rcond=None)[0][0] for k in range(6)]
    np.testing.assert_allclose(found.numpy(), np.diag(expected), rtol=1e-9, atol=1e-12)
    full = solve_least_squares(fit, held_out, ridges=[0.0]).map
    assert both.error(full) <= both.error(found) <= both.error(torch.zeros(6, 6))


def test_the_ridge_of_a_shape_is_its_own() -> None:
    fit, held_out = moments_of(*draw(10, 1, noise=5.0)), moments_of(*draw(200, 101, noise=5.0))
    ridges = [1e-8, 1e-4, 1e-2, 1.0]
    for shape in ({"rank": 2}, {"diagonal": True}):
        solution = solve_least_squares(fit, held_out, ridges, **shape)  # type: ignore[arg-type]
        alone = [solve_least_squares(fit, held_out, [r], **shape).held_out_error for r in ridges]  # type: ignore[arg-type]
        assert (solution.ridge, solution.held_out_error) == (ridges[int(np.argmin(alone))], min(alone))


@pytest.mark.parametrize("shape", [{"rank": 0}, {"rank": 2, "diagonal": True}])
def test_a_shape_that_is_none(shape: dict[str, int]) -> None:
    pair = moments_of(*draw(20, 0)), moments_of(*draw(20, 1))
    with pytest.raises(StreamlineError, match=r"rank=.*of 1.*diagonal=True"):
        solve_least_squares(*pair, **shape)  # type: ignore[arg-type]
