"""Moments equal NumPy, merge, and give the error of any linear map."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import HiddenStateRecorder, StreamlineError
from streamline_hooks.statistics import WindowMoments, measure_moments
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, padded, shuffled_batches, tiny_model, tokens


def pair(count: int, features: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, count, features, generator=generator)
    y = x @ torch.randn(features, features, generator=generator) + torch.randn(1, count, features, generator=generator)
    y[:, ::7] *= 100.0  # massive activations
    return x, y


@given(st.integers(1, 50), st.integers(0, 5))
def test_they_equal_numpy(count: int, seed: int) -> None:
    x, y = pair(count, seed=seed)
    moments = WindowMoments(5)
    moments.update(x, y, torch.ones(1, count))
    a, b = x[0].double().numpy(), y[0].double().numpy()
    w = 1 / (b**2).sum(-1)
    np.testing.assert_allclose(moments.xx.numpy(), (a * w[:, None]).T @ a, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moments.xd.numpy(), (a * w[:, None]).T @ (b - a), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(moments.dd, (w * ((b - a) ** 2).sum(-1)).sum(), rtol=1e-10)


@given(st.integers(1, 50), st.integers(0, 5))
def test_the_error_of_any_map_needs_no_further_pass(count: int, seed: int) -> None:
    x, y = pair(count, seed=seed)
    moments = WindowMoments(5)
    moments.update(x, y, torch.ones(1, count))
    w = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    missed = (y.double() - x.double() - x.double() @ w).square().sum(-1) / y.double().square().sum(-1)
    assert moments.error(w) == pytest.approx(missed.mean().item(), rel=1e-9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_shards_merge_to_the_whole(sizes: list[int]) -> None:
    x, y = pair(sum(sizes))
    whole, total = WindowMoments(5), WindowMoments(5)
    whole.update(x, y, torch.ones(1, sum(sizes)))
    for a, b in reversed(list(zip(x.split(sizes, 1), y.split(sizes, 1), strict=True))):
        part, reread = WindowMoments(5), WindowMoments(5)
        part.update(a, b, torch.ones(a.shape[:2]))
        reread.load_state_dict(part.state_dict())
        total.merge(reread)
    assert total.tokens == whole.tokens
    torch.testing.assert_close(total.xx, whole.xx, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(total.xd, whole.xd, rtol=1e-11, atol=1e-13)
    assert total.dd == pytest.approx(whole.dd, rel=1e-12)


def test_padding_is_left_out() -> None:
    x, y = pair(6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded, cut = WindowMoments(5), WindowMoments(5)
    padded.update(x, y, mask)
    cut.update(x[:, 2:], y[:, 2:], torch.ones(1, 4))
    assert padded.tokens == 4 and torch.equal(padded.xx, cut.xx)


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
    """Batch size, padding side and order, on a float64 model, to a relative 1e-6; against the states themselves."""
    model, windows = tiny_model(family, torch.float64), [range(1, 4), range(0, BLOCKS)]
    batch = padded(lengths, side)
    expected = [WindowMoments(WIDTH) for _ in windows]
    for ids, mask in zip(*batch.values(), strict=True):
        with torch.no_grad(), HiddenStateRecorder(model) as record:
            model(ids[mask.bool()][None])
        for window, sums in zip(windows, expected, strict=True):
            x = record.inputs[window.start][0]
            sums.update(x, record.outputs[window.stop - 1][0], torch.ones(x.shape[:2]))
    got = measure_moments(model, shuffled_batches(batch, size, random), windows)
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == sum(lengths)
        torch.testing.assert_close(a.xx, b.xx, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.xd, b.xd, rtol=1e-6, atol=1e-9)
        assert a.dd == pytest.approx(b.dd, rel=1e-6)


def test_the_pass_ends_after_the_last_block_needed() -> None:
    model, called = tiny_model("llama"), []
    for k, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, a, o, k=k: called.append(k))
    measure_moments(model, [tokens(5, 4)], [range(0, 2), range(1, 4)])
    assert called == [0, 1, 2, 3]


def test_what_does_not_fit() -> None:
    with pytest.raises(StreamlineError, match=r"\(1.*2.*4\).*\(1.*2.*4\).*Expected.*5"):
        WindowMoments(5).update(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 2))
    for other, said in (
        (WindowMoments(4), "4 features and weighted=True"),
        (WindowMoments(5, False), "5 features and weighted=False"),
    ):
        with pytest.raises(StreamlineError, match=rf"with {said}.*5.*weighted=True"):
            WindowMoments(5).merge(other)
    with pytest.raises(StreamlineError, match="No token"):
        WindowMoments(5).error(torch.zeros(5, 5))


def test_without_weights_the_sums_are_plain_and_so_is_the_error() -> None:
    x, y = torch.randn(1, 6, 3), torch.randn(1, 6, 3)
    moments = WindowMoments(3, weighted=False)
    moments.update(x, y, torch.tensor([[1, 1, 1, 1, 1, 0]]))
    a, d = x[0, :5].double(), y[0, :5].double() - x[0, :5].double()
    torch.testing.assert_close(moments.xx, a.T @ a)
    torch.testing.assert_close(moments.xd, a.T @ d)
    assert moments.error(torch.zeros(3, 3)) == pytest.approx(float(d.square().sum()) / 5)
    reread = WindowMoments(3)
    reread.load_state_dict(moments.state_dict())
    assert not reread.weighted


@given(st.integers(1, 30), st.integers(0, 5))
def test_an_error_may_be_measured_by_the_norm_of_a_larger_state(count: int, seed: int) -> None:
    """Where the states are parts of it: m, and y − a, relative to y."""
    x, y = pair(count, seed=seed)
    whole = y + 3 * torch.randn(1, count, 5, generator=torch.Generator().manual_seed(seed + 50))
    moments = WindowMoments(5)
    moments.update(x, y, torch.ones(1, count), relative_to=whole)
    w = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    missed = (y.double() - x.double() - x.double() @ w).square().sum(-1) / whole.double().square().sum(-1)
    assert moments.error(w) == pytest.approx(missed.mean().item(), rel=1e-9)
    with pytest.raises(StreamlineError, match=r"Expected.*5 features"):
        moments.update(x, y, torch.ones(1, count), relative_to=whole[..., :4])
