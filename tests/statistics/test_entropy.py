"""The entropy of EntroDrop's buckets: equal to NumPy's histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.statistics.norms import StateEntropy
from tests.statistics.reference import entropy, states_of


def entropy_of(*sequences: torch.Tensor) -> StateEntropy:
    sums = StateEntropy(len(sequences[0]))
    sums.update([list(states) for states in sequences])
    return sums


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 1), st.integers(0, 5))
def test_it_equals_numpy(sizes: list[int], seed: int) -> None:
    """Float64 states, so that both put a number on the edge of two buckets into the same one."""
    sequences = [states_of(3, size, seed=seed + k).double() for k, size in enumerate(sizes)]
    counted = [(s, n) for s, n in zip(sequences, sizes, strict=True) if n > 1]
    expected = np.average(
        [[entropy(place.numpy()) for place in s] for s, _ in counted], axis=0, weights=[n for _, n in counted]
    )
    got = entropy_of(*sequences)
    np.testing.assert_allclose(got.mean[0], expected, atol=1e-9)
    assert got.count[0] == sum(n for _, n in counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_states(dtype: torch.dtype) -> None:
    """The few values of a narrow state that lie on an edge may go to either bucket."""
    states = states_of(3, 200, seed=1).to(dtype)
    expected = [entropy(place.double().numpy()) for place in states]
    np.testing.assert_allclose(entropy_of(states).mean[0], expected, atol=0.01)


def test_what_is_known_of_it() -> None:
    even = torch.linspace(0, 1, 20)[:, None].expand(20, 3)
    assert entropy_of(torch.stack([even, 7 - 5 * even])).mean[0].tolist() == pytest.approx([np.log(20)] * 2)
    assert entropy_of(torch.ones(1, 9, 4)).mean[0].item() == 0.0
    assert entropy_of(torch.tensor([[[0.0], [1e-44]]])).mean[0].item() == 0.0  # a range that 1/x cannot hold
    noise = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0))
    massive = noise.clone()
    massive[:, 0] = 1e4  # one massive token stretches the range of all features
    assert entropy_of(massive).mean[0] < 0.1 * entropy_of(noise).mean[0]
    spread = torch.cat([noise, noise.sign()])
    assert entropy_of(spread).mean[0].diff() < 0


def test_sequences_of_one_token_are_left_out() -> None:
    assert entropy_of(torch.randn(2, 1, 4)).count[0] == 0
    assert entropy_of(torch.randn(2, 0, 4)).count[0] == 0
