"""The bound of Neural Block Linearization against NumPy, against the error that it bounds, and where it must refuse."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.selection.criteria import CanonicalBound, cca_bounds, score_windows
from streamline_hooks.selection.criteria.cca import StateCovariances
from tests.selection.criteria.test_covariances import by_qr
from tests.selection.criteria.test_state_criteria import states_of
from tests.tiny_models import BLOCKS, WIDTH, padded, shuffled_batches, tiny_model, tokens

WINDOWS = [range(0, 2), range(1, 4), range(3, BLOCKS)]


def bound_of(x: torch.Tensor, y: torch.Tensor) -> CanonicalBound:
    covariances = StateCovariances([("x", "y")])
    covariances.update({"x": x[None], "y": y[None]}, torch.ones(1, len(x)))
    return CanonicalBound(covariances, "x", "y")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(
    st.sampled_from(["llama", "gpt_neox", "qwen3", "gemma3"]),
    st.lists(st.integers(20, 30), min_size=4, max_size=6),
    st.integers(1, 6),
    st.sampled_from(["left", "right"]),
    st.randoms(),
)
def test_it_equals_numpy(family: str, lengths: list[int], size: int, side: str, random: Random) -> None:
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    sequences = states_of(model, batch)
    expected = []
    for w in WINDOWS:
        x, y = (np.concatenate([s[k] for s in sequences]) for k in (w.start, w.stop))
        expected.append(-(1 - by_qr(x, y) ** 2).sum())
    model.train()
    got = score_windows("cca", WINDOWS, model=model, batches=shuffled_batches(batch, size, random))
    assert model.training
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.integers(20, 80), st.integers(1, 6), st.integers(0, 9))
def test_it_bounds_the_error_of_the_best_linear_map(count: int, features: int, seed: int) -> None:
    x = normal(count, features, seed=seed)
    y = x @ normal(features, features, seed=seed + 1) + 0.5 * normal(count, features, seed=seed + 2) ** 3
    a, b = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    missed = b - a @ np.linalg.lstsq(a, b, rcond=None)[0]
    assert (missed**2).sum() / (b**2).sum() <= bound_of(x, y).value + 1e-12


def test_it_is_zero_for_any_linear_map_and_the_width_for_none() -> None:
    x = normal(4000, 6)
    assert bound_of(x, x @ normal(6, 6, seed=1) + 5.0).value < 1e-9
    assert bound_of(x, normal(4000, 6, seed=2)).value == pytest.approx(6.0, abs=0.05)
    # Half of y's directions, whatever their size, follow from x.
    y = torch.cat([x[:, :3] * 1e-3, normal(4000, 3, seed=3) * 1e3], dim=1)
    assert bound_of(x, y).value == pytest.approx(3.0, abs=0.05)


def test_so_few_tokens_that_all_is_correlated_by_chance_are_refused() -> None:
    """The bound would be 0, and every window as good as linear."""
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"64 tokens.*of 32"):
        score_windows("cca", WINDOWS, model=model, batches=[tokens(2, 32)])
    assert min(score_windows("cca", [range(0, 6)], model=model, batches=[tokens(2, 33)])) < 0
    with pytest.raises(StreamlineError, match="No token"):
        score_windows("cca", WINDOWS, model=model, batches=[])


def test_memory_does_not_grow_with_the_text() -> None:
    bounds = cca_bounds(tiny_model("llama"), [tokens(3, 30)] * 3, [range(0, 2), range(1, 3), range(0, 3)])
    (covariances,) = {id(b.covariances): b.covariances for b in bounds}.values()  # one for all windows
    assert len(covariances.pairs) == 2 + 2 + 3 and covariances.tokens == 270  # entrances, exits, windows
    assert all(covariances.covariance(*pair).numel() == WIDTH**2 for pair in covariances.pairs)
