"""One pass, every window: equal to NumPy, whatever the batches."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import HiddenStateRecorder, StreamlineError, measure_similarity
from streamline_hooks.statistics import StateSimilarity
from tests.tiny_models import BLOCKS, FAMILIES, padded, shuffled_batches, tiny_model, tokens


def by_numpy(states: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine and mean angular distance of (tokens, features) states, in float64, by the definition."""
    unit = [s / np.linalg.norm(s, axis=-1, keepdims=True) for s in (s.astype(np.float64) for s in states)]
    cosine = np.array([[np.clip((a * b).sum(-1), -1, 1).mean() for b in unit] for a in unit])
    angles = [[np.arccos(np.clip((a * b).sum(-1), -1, 1)).mean() / np.pi for b in unit] for a in unit]
    np.fill_diagonal(cosine, 1.0)
    angular = np.array(angles)
    np.fill_diagonal(angular, 0.0)
    return cosine, angular


def states_of(places: int, tokens_: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = (
        torch.randn(places, 1, tokens_, 8, generator=generator)
        * torch.tensor([1.0, 0.3, 30.0, 0.01])[:places, None, None, None]
    )
    return steps.cumsum(0)


@given(st.integers(1, 40), st.integers(0, 5))
def test_it_equals_numpy(count: int, seed: int) -> None:
    states = states_of(4, count, seed)
    similarity = StateSimilarity(4)
    similarity.update(list(states), torch.ones(1, count))
    cosine, angular = by_numpy([s[0].numpy() for s in states])
    np.testing.assert_allclose(similarity.cosine.numpy(), cosine, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(similarity.angular.numpy(), angular, rtol=1e-7, atol=1e-9)


def test_angular_distance_is_the_mean_of_the_angles() -> None:
    """Not the angle of the mean cosine: two tokens at 0 and 90 degrees."""
    a = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    b = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    similarity = StateSimilarity(2)
    similarity.update([a, b], torch.ones(1, 2))
    assert similarity.angular[0, 1] == pytest.approx(0.25)
    assert np.arccos(similarity.cosine[0, 1].item()) / np.pi == pytest.approx(1 / 3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 9), st.randoms())
def test_shards_merge_to_the_whole(sizes: list[int], seed: int, random: Random) -> None:
    states = states_of(4, sum(sizes), seed)
    whole, parts, order = StateSimilarity(4), [], list(states.split(sizes, dim=2))
    whole.update(list(states), torch.ones(1, sum(sizes)))
    random.shuffle(order)
    for part in order:
        parts.append(StateSimilarity(4))
        parts[-1].update(list(part), torch.ones(part.shape[1:3]))
    total = StateSimilarity(4)
    for part in parts:
        reread = StateSimilarity(4)
        reread.load_state_dict(part.state_dict())
        total.merge(reread)
    assert total.tokens == whole.tokens
    torch.testing.assert_close(total.cosine, whole.cosine, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.angular, whole.angular, rtol=1e-12, atol=1e-15)


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(2, 8), min_size=2, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["left", "right"]),
    st.randoms(),
)
def test_a_model_gives_the_same_whatever_the_batches(
    family: str, lengths: list[int], size: int, side: str, random: Random
) -> None:
    """Batch size, padding side and order, on a float64 model, to a relative 1e-6."""
    model = tiny_model(family, torch.float64)
    batch = padded(lengths, side)
    alone = [
        {"input_ids": i[m.bool()][None], "attention_mask": m[m.bool()][None]}
        for i, m in zip(*batch.values(), strict=True)
    ]
    expected = measure_similarity(model, alone)
    got = measure_similarity(model, shuffled_batches(batch, size, random))
    assert got.tokens == expected.tokens == sum(lengths)
    torch.testing.assert_close(got.cosine, expected.cosine, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.angular, expected.angular, rtol=1e-6, atol=1e-7)


def test_the_pass_measures_the_states_of_the_model_and_no_head_runs() -> None:
    model, heads = tiny_model("llama"), []
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        model(tokens(3, 9))
    model.lm_head.register_forward_hook(lambda *a: heads.append(1))
    model.model.norm.register_forward_hook(lambda *a: heads.append(1))
    similarity = measure_similarity(model, [tokens(3, 9)])
    states = [*(record.inputs[k][0] for k in range(BLOCKS)), record.outputs[BLOCKS - 1][0]]
    cosine, _ = by_numpy([s.flatten(0, 1).numpy() for s in states])
    np.testing.assert_allclose(similarity.cosine.numpy(), cosine, rtol=1e-6)
    assert not heads


def test_what_does_not_fit() -> None:
    with pytest.raises(StreamlineError, match="Got 2 states; expected 3"):
        StateSimilarity(3).update([torch.zeros(1, 1, 2)] * 2, torch.ones(1, 1))
    with pytest.raises(StreamlineError, match="Cannot merge the similarity of 2 states into that of 3"):
        StateSimilarity(3).merge(StateSimilarity(2))
    with pytest.raises(StreamlineError, match="No token has been counted yet"):
        _ = StateSimilarity(3).cosine
