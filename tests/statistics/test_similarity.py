"""Cosine and angle of every two places: equal to NumPy, and right where two states all but agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.statistics.similarity import StateSimilarity, as_slice_if_consecutive, token_grams
from tests.statistics.reference import angles, cosines, states_of


def of_one_sequence(states: torch.Tensor) -> StateSimilarity:
    similarity = StateSimilarity(len(states))
    similarity.update([token_grams(list(states), torch.arange(states.shape[1]))])
    return similarity


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 5))
def test_it_equals_numpy(count: int, places: int, seed: int) -> None:
    states = states_of(places, count, seed=seed)
    similarity = of_one_sequence(states)
    np.testing.assert_allclose(similarity.cosine[0], cosines(states.numpy()).mean(0), atol=1e-12)
    np.testing.assert_allclose(similarity.angular[0], angles(states.numpy()).mean(0), atol=1e-7)


def test_angular_distance_is_the_mean_of_the_angles() -> None:
    """Not the angle of the mean cosine: two tokens at 0 and 90 degrees."""
    similarity = of_one_sequence(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    assert similarity.angular[0, 0, 1] == pytest.approx(0.25)
    assert np.arccos(similarity.cosine[0, 0, 1].item()) / np.pi == pytest.approx(1 / 3)


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 0.0])
def test_the_angle_between_states_that_all_but_agree(step: float) -> None:
    """Products in float32 would be wrong in the fourth digit; identical directions are at exactly 0."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 576, generator=generator)
    states = torch.stack([a, a + step * torch.randn(64, 576, generator=generator), 3 * a, -a])
    angular = of_one_sequence(states).angular[0]
    expected = angles(states.numpy()).mean(0)
    np.testing.assert_allclose(angular, expected, atol=1e-7)
    assert angular[0, 2] == 0.0 and angular[0, 3].item() == pytest.approx(1.0, abs=1e-7)
    assert (angular[0, 1] == 0.0) == (step == 0.0)
    unit = (states / states.norm(dim=-1, keepdim=True))[:2]
    in_float32 = (unit[0] * unit[1]).sum(-1).clamp(-1, 1).arccos().mean() / torch.pi
    if step in (1e-4, 1e-6):
        assert abs(in_float32 - expected[0, 1]) > 1e-5


def test_zero_and_huge_states() -> None:
    states = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[1e38, 0.0]], [[1e-38, 1e-38]]])
    cosine = of_one_sequence(states).cosine[0]
    assert cosine[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0] and cosine[1, 3] == 1.0
    assert cosine[3, 4] == pytest.approx(0.5**0.5)
    assert of_one_sequence(states.double() * 1e100).cosine[0, 1, 3] == 1.0


@given(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12).map(sorted), st.integers(1, 4))
def test_tokens_are_chosen_and_cut_up_without_a_trace(chosen: list[int], at_once: int) -> None:
    states = states_of(4, 31)
    expected = torch.einsum("atd,btd->tab", states.double(), states.double())[chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamline_hooks.statistics.similarity.BYTES_AT_ONCE", {"cpu": at_once * 8 * 4 * 8})
        torch.testing.assert_close(token_grams(list(states), torch.tensor(chosen)), expected, rtol=1e-12, atol=1e-12)
    part = as_slice_if_consecutive(torch.tensor(chosen))
    assert torch.arange(31)[part].tolist() == chosen
    assert isinstance(part, slice) == (chosen[-1] - chosen[0] == len(chosen) - 1)


def test_states_of_different_shapes() -> None:
    with pytest.raises(StreamlineError, match=r"1 have.*\(2.*4\).*0, \(2.*3\)"):
        token_grams([torch.zeros(2, 3), torch.zeros(2, 4)], torch.arange(2))
