"""Norms, medians from a histogram, and relative magnitudes: equal to NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.statistics.norms import StateNorms
from streamline_hooks.statistics.similarity import token_grams
from tests.statistics.reference import states_of


def norms_of(states: torch.Tensor, *cuts: int) -> StateNorms:
    norms, sizes = StateNorms(len(states)), cuts or (states.shape[1],)
    parts = states.split(sizes, dim=1)
    norms.update([token_grams(list(part), torch.arange(part.shape[1])) for part in parts])
    return norms


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 5))
def test_they_equal_numpy(count: int, places: int, seed: int) -> None:
    states = states_of(places, count, seed=seed)
    exact = states.numpy().astype(np.float64)
    length = np.linalg.norm(exact, axis=-1)
    norms = norms_of(states)
    np.testing.assert_allclose(norms.mean[0], length.mean(1), rtol=1e-12)
    np.testing.assert_allclose(norms.largest, length.max(1), rtol=1e-12)
    lower_median = np.sort(length, axis=1)[:, (count - 1) // 2]
    np.testing.assert_allclose(norms.median, lower_median, rtol=0.0221)
    relative = np.linalg.norm(np.diff(exact, axis=0), axis=-1) / length[:-1]
    np.testing.assert_allclose(norms.relative_magnitude[0], relative.mean(1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1e-3, 1e5])
def test_a_block_that_changes_little_or_much(size: float) -> None:
    """The difference comes from inner products, and is still right to 1e-8."""
    generator = torch.Generator().manual_seed(1)
    before, step = torch.randn(2, 50, 64, generator=generator, dtype=torch.float64)
    norms = norms_of(torch.stack([1000 * before, 1000 * (before + size * step)]))
    expected = size * (step.norm(dim=-1) / before.norm(dim=-1)).mean()
    torch.testing.assert_close(norms.relative_magnitude[0, 0], expected, rtol=1e-7, atol=2e-8)


def test_a_token_that_enters_as_zero_has_no_relative_magnitude() -> None:
    states = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[5.0, 0.0], [3.0, 0.0]]])
    assert norms_of(states).relative_magnitude[0].tolist() == [2.0]


@pytest.mark.parametrize(
    ("lengths", "median"),
    [([1.0, 1.0, 1e4], 1.0), ([1e-30], 0.0), ([1e30], 2.0**64), ([0.0, 0.0, 5.0], 0.0), ([1.0, 2.0, 3.0, 4.0], 2.0)],
)
def test_medians_at_the_edges(lengths: list[float], median: float) -> None:
    """Below 2⁻⁶⁴ it is 0, above 2⁶⁴ the highest cell; of an even number it is the lower one."""
    states = torch.tensor(lengths, dtype=torch.float64)[None, :, None]
    assert norms_of(states).median.item() == pytest.approx(median, rel=0.0221)


def test_the_histogram_counts_every_token_once() -> None:
    states = states_of(3, 30)
    norms = norms_of(states, 7, 0, 23)
    assert norms.histogram.sum(dim=1).tolist() == [30, 30, 30]
    assert torch.equal(norms.histogram, norms_of(states).histogram)
