"""Covariances equal NumPy's and keep their digits; canonical correlations against another way to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.selection.criteria.cca import StateCovariances, canonical_correlations

FEATURES = 5


def pair(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, count, FEATURES, generator=generator)
    mix = torch.randn(FEATURES, FEATURES, generator=generator)
    return x, x @ mix + torch.randn(1, count, FEATURES, generator=generator)


def summed(x: torch.Tensor, y: torch.Tensor) -> StateCovariances:
    covariances = StateCovariances([("x", "y")])
    covariances.update({"x": x, "y": y}, torch.ones(x.shape[:2]))
    return covariances


def by_qr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Canonical correlations as the cosines between the spaces that the centred samples span."""
    (qx, _), (qy, _) = np.linalg.qr(x - x.mean(0)), np.linalg.qr(y - y.mean(0))
    return np.linalg.svd(qx.T @ qy, compute_uv=False)


@given(st.integers(2, 60), st.integers(0, 5))
def test_they_equal_numpy(count: int, seed: int) -> None:
    x, y = pair(count, seed)
    both = np.cov(np.concatenate([x[0].double(), y[0].double()], axis=1).T, bias=True)
    got = summed(x, y)
    for name, block in {
        ("x", "x"): both[:FEATURES, :FEATURES],
        ("x", "y"): both[:FEATURES, FEATURES:],
        ("y", "y"): both[FEATURES:, FEATURES:],
    }.items():
        np.testing.assert_allclose(got.covariance(*name).numpy(), block, rtol=1e-9, atol=1e-11)


def test_padding_is_left_out() -> None:
    x, y = pair(8)
    covariances = StateCovariances([("x", "y")])
    covariances.update({"x": x, "y": y}, torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]))
    covariances.update({"x": x, "y": y}, torch.zeros(1, 8))
    assert covariances.tokens == 5
    assert torch.equal(covariances.covariance("x", "y"), summed(x[:, 2:7], y[:, 2:7]).covariance("x", "y"))


def test_a_large_mean_costs_no_digits() -> None:
    """Raw second moments would lose all but two of them here."""
    x, y = (state.double() for state in pair(40))
    far, near = StateCovariances([("x", "y")]), summed(x, y)
    for part in (slice(0, 7), slice(7, 40)):
        far.update({"x": x[:, part] + 1e7, "y": y[:, part] - 1e7}, torch.ones(1, x[:, part].shape[1]))
    torch.testing.assert_close(far.covariance("x", "y"), near.covariance("x", "y"), rtol=1e-6, atol=1e-7)


def test_a_place_is_summed_once_for_all_its_pairs() -> None:
    covariances = StateCovariances([(0, 1), (0, 2), (1, 2), (0, 2)])
    assert covariances.pairs == [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]


@given(st.integers(12, 60), st.integers(0, 5))
def test_canonical_correlations_are_cosines_between_spaces(count: int, seed: int) -> None:
    x, y = pair(count, seed)
    got = summed(x, y)
    rho, rank = canonical_correlations(*(got.covariance(*p) for p in (("x", "x"), ("x", "y"), ("y", "y"))))
    assert rank == FEATURES
    np.testing.assert_allclose(rho.numpy(), by_qr(x[0].double().numpy(), y[0].double().numpy()), atol=1e-9)


@given(st.integers(0, 10))
def test_they_do_not_change_with_the_basis_or_the_scale(seed: int) -> None:
    """Not even where one feature is a million times as large as another, as of massive activations."""
    x, y = (state.double() for state in pair(50, seed))
    scale = torch.tensor([1e-3, 1.0, 10.0, 1e3, 1e6], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(FEATURES, FEATURES, dtype=torch.float64))[0]
    rho, other = (
        canonical_correlations(*(s.covariance(*p) for p in (("x", "x"), ("x", "y"), ("y", "y"))))[0]
        for s in (summed(x, y), summed(x * scale, y @ turned))
    )
    torch.testing.assert_close(rho, other, rtol=1e-7, atol=1e-8)


def test_directions_without_variance_are_left_out() -> None:
    x, y = pair(50)
    x[..., 0], y[..., 1], y[..., 2] = 3.0, y[..., 3], 0.0  # of x four vary, of y three
    got = summed(x, y)
    rho, rank = canonical_correlations(*(got.covariance(*p) for p in (("x", "x"), ("x", "y"), ("y", "y"))))
    assert (len(rho), rank) == (3, 3)
    expected = by_qr(x[0, :, 1:].double().numpy(), y[0][:, [0, 1, 4]].double().numpy())
    np.testing.assert_allclose(rho.numpy(), expected, atol=1e-9)
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert canonical_correlations(nothing, nothing, nothing)[1] == 0


def test_a_covariance_of_nothing_raises() -> None:
    with pytest.raises(StreamlineError, match="No token"):
        StateCovariances([("x", "y")]).covariance("x", "y")
