"""Weights that follow from the content, and sums that merge."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.statistics import Profile
from streamline_hooks.statistics.bootstrap import ResampledSums, poisson_weights


def test_the_weights_are_poisson_and_independent() -> None:
    contents = [k.to_bytes(4, "little") for k in range(4000)]
    weights = poisson_weights(contents, 50)
    shares = [(weights == k).double().mean().item() for k in range(5)]
    assert shares == pytest.approx([math.exp(-1) / math.factorial(k) for k in range(5)], abs=0.004)
    correlation = np.corrcoef(weights.numpy().T) - np.eye(50)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert torch.equal(poisson_weights(contents[7:9], 20), weights[7:9, :20])  # of the content alone
    assert poisson_weights([], 3).shape == (0, 3) and poisson_weights([b"a"], 0).shape == (1, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.randoms())
def test_sums_equal_numpy_and_merge(sizes: list[int], random: Random) -> None:
    count = sum(sizes)
    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    weights = poisson_weights([bytes([k]) for k in range(count)], 7)
    whole = ResampledSums(3, 7)
    parts = list(zip(values.split(sizes), weights.split(sizes), strict=True))
    random.shuffle(parts)
    for part in parts:
        one = ResampledSums(3, 7)
        one.add(*part)
        whole.merge(one)
    exact = values.double().numpy()
    np.testing.assert_allclose(whole.rows[0], exact.sum(0), atol=1e-12)
    np.testing.assert_allclose(whole.rows[1:], weights.numpy().T @ exact, atol=1e-12)


@pytest.mark.parametrize("weights", [None, torch.ones(2, 3)])
def test_weights_that_do_not_fit(weights: torch.Tensor | None) -> None:
    with pytest.raises(StreamlineError, match=r"Expected \(2.*4\)"):
        ResampledSums(1, 4).add(torch.ones(2, 1), weights)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of sequences whose two states are at an angle that varies from sequence to sequence."""
    generator = torch.Generator().manual_seed(3)
    samples, count, covered, widths = 120, 30, 0, []
    for sample in range(samples):
        angle = (1.0 + 0.3 * torch.randn(count, 1, generator=generator, dtype=torch.float64)).expand(count, 3)
        profile = Profile(2, replicates=100)
        states = [
            torch.tensor([1.0, 0.0]).double().expand(count, 3, 2),
            torch.stack([angle.cos(), angle.sin()], dim=-1),
        ]
        contents = [f"{sample} {k}".encode() for k in range(count)]
        profile.update(states, torch.ones(count, 3), weights=poisson_weights(contents, 100))
        low, high = profile.interval("angular", range(0, 1), 0.9)
        covered += low <= 1.0 / math.pi <= high
        widths.append(high - low)
    assert 0.8 <= covered / samples <= 0.95
    assert np.mean(widths) == pytest.approx(2 * 1.645 * 0.3 / math.pi / math.sqrt(count), rel=0.12)
