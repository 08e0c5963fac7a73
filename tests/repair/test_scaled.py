"""Prune&Comp's factor by its definition, and carried out."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery
from streamline_hooks.repair.fold import MagnitudeRatio, fit_scale
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_scale import multiplied
from tests.surgery.test_surgeon import fingerprint, logits
from tests.tiny_models import BLOCKS, padded, shuffled_batches, tiny_model, tokens

families = st.sampled_from(["llama", "opt", "gpt2", "gpt_neox", "qwen3"])
windows = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 3)).map(lambda w: range(w[0], min(w[0] + w[1], BLOCKS)))


def states(model: nn.Module, window: range, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What enters and leaves, in float64, of shape (sequences, tokens, features)."""
    with HiddenStateRecorder(model) as record, torch.no_grad():
        model(ids)
    return tuple(s[0].double().numpy() for s in (record.inputs[window.start], record.outputs[window.stop - 1]))


@settings(max_examples=12)
@given(families, windows, st.integers(0, 5))
def test_the_factor_is_that_of_the_published_code(family: str, window: range, seed: int) -> None:
    """Which runs one sequence at a time, and averages ratios of mean magnitudes over features, then over sequences."""
    model, ids = tiny_model(family), tokens(5, 11, seed)
    x, y = states(model, window, ids)
    each = [(np.abs(b).mean(axis=0) / np.abs(a).mean(axis=0)).mean() for a, b in zip(x, y, strict=True)]
    (scaled,) = fit_scale(model, [window], [ids[:2], ids[2:]])
    assert scaled.factor == pytest.approx(np.mean(each), rel=1e-6) and scaled.window == window
    size = (y**2).sum(-1)
    assert scaled.removal_error == pytest.approx((((y - x) ** 2).sum(-1) / size).mean(), rel=1e-6)
    assert scaled.scaled_error == pytest.approx((((y - scaled.factor * x) ** 2).sum(-1) / size).mean(), rel=1e-6)


@settings(max_examples=6)
@given(st.integers(1, 6), st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_batches_and_padding_make_no_difference(size: int, side: str, random: Random) -> None:
    model, batch = tiny_model("llama"), padded([9, 4, 7, 2, 9, 5], side)
    (whole,) = fit_scale(model, [range(2, 4)], [{k: v[n : n + 1] for k, v in batch.items()} for n in range(6)])
    (parts,) = fit_scale(model, [range(2, 4)], shuffled_batches(batch, size, random))
    assert parts.factor == pytest.approx(whole.factor, rel=1e-5)
    assert parts.scaled_error == pytest.approx(whole.scaled_error, rel=1e-4)


def test_a_state_twice_as_large_has_the_factor_two() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    gap, mask = MagnitudeRatio(), torch.ones(3, 7)
    mask[0, :4], mask[2] = 0, 0
    y = 2 * x
    y[0, :4], y[2] = 1e9, float("nan")  # padding counts for nothing
    gap.update(x, y, mask)
    assert gap.factor == pytest.approx(2.0) and gap.sequences == 2 and gap.tokens == 10
    assert gap.error(2.0) == pytest.approx(0.0, abs=1e-12) and gap.error(1.0) == pytest.approx(0.25)


def test_no_block_after_the_window_is_run() -> None:
    model, runs = tiny_model("llama"), []
    handles = [b.register_forward_hook(lambda *given, k=k: runs.append(k)) for k, b in enumerate(model.model.layers)]
    fit_scale(model, [range(1, 3)], [tokens(2, 6)])
    for handle in handles:
        handle.remove()
    assert runs == [0, 1, 2]


@settings(max_examples=8)
@given(families, windows.filter(lambda w: len(w) < BLOCKS))
def test_carried_out_it_is_the_state_behind_the_cut_multiplied(family: str, window: range) -> None:
    model = tiny_model(family).double()
    before = fingerprint(model)
    (scaled,) = fit_scale(model, [window], [tokens(4, 9)])
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        expected = multiplied(model, window.start, scaled.factor)
        surgeon.scale(window.stop, scaled.factor)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
        assert set(surgeon.plan.folded) == set(range(window.stop, BLOCKS))
    assert fingerprint(model) == before


def test_one_window_after_the_other_as_published() -> None:
    """The second factor is measured in the model that the first has changed; both act together."""
    model, batches = tiny_model("llama").double(), [tokens(4, 9)]
    (first,) = fit_scale(model, [range(1, 2)], batches)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.scale(2, first.factor)
        with LayerSurgeon(model) as later:
            (second,) = fit_scale(model, [range(2, 3)], batches)
            later.remove([2])  # the original block 3
            expected = multiplied(model, 2, second.factor)
            later.scale(3, second.factor)
            torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


# Saying no


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_a_norm_behind_a_branch_is_refused(model_type: str) -> None:
    model = tiny(model_type, blocks=4)
    (scaled,) = fit_scale(model, [range(1, 2)], [tokens(2, 6)])
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        with pytest.raises(UnsupportedSurgery, match=r"a norm follows.*Gemma 2 and 3"):
            surgeon.scale(2, scaled.factor)


def test_a_feature_that_is_always_zero_is_named() -> None:
    x = torch.ones(1, 3, 4)
    x[..., 2] = 0
    with pytest.raises(StreamlineError, match=r"feature 2.*zero"):
        MagnitudeRatio().update(x, x, torch.ones(1, 3))
    with pytest.raises(StreamlineError, match=r"magnitude.*no token"):
        fit_scale(tiny_model("llama"), [range(1, 2)], [])
