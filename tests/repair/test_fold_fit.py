"""The folded map against numpy.linalg.lstsq, its promise, and what it does in the model."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import read_output
from streamline_hooks.repair import solve_least_squares
from streamline_hooks.repair.fold import FoldedMap, measure_fold_moments, solve_fold
from streamline_hooks.statistics import measure_moments
from streamline_hooks.testing import tiny_model as tiny
from tests.surgery.test_zeroed_branches import MODULES as ZEROED_MODULES
from tests.tiny_models import BLOCKS, WIDTH, padded, shuffled_batches, tiny_model, tokens

MODULES = {**ZEROED_MODULES, "qwen3": ("self_attn", "mlp")}
families = st.sampled_from(["llama", "opt", "gpt2", "gpt_neox", "qwen3"])
windows = st.tuples(st.integers(1, BLOCKS - 1), st.integers(1, 3)).map(lambda w: range(w[0], min(w[0] + w[1], BLOCKS)))


def fit_fold(model: nn.Module, window: range, fit: Any, held_out: Any, **options: Any) -> FoldedMap:
    sums = (measure_fold_moments(model, batches, [window], **options)[0] for batches in (fit, held_out))
    return solve_fold(window, *sums)


def states(model: nn.Module, window: range, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, m and y, read by names that are known here, each of shape (tokens, features)."""
    stack, kept = find_stack(model), {}
    before = stack[window.start - 1]
    mlp = before.get_submodule(MODULES[model.config.model_type][1])
    handles = [
        mlp.register_forward_hook(lambda m, args, out: kept.update(m=read_output(out))),
        before.register_forward_hook(lambda m, args, out: kept.update(out=read_output(out))),
        stack[window.stop - 1].register_forward_hook(lambda m, args, out: kept.update(y=read_output(out))),
    ]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    added = kept["m"].reshape(kept["out"].shape)
    return tuple(s.double().flatten(0, 1) for s in (kept["out"] - added, added, kept["y"]))


@settings(max_examples=12)
@given(families, windows, st.integers(0, 5))
def test_it_is_weighted_least_squares_that_pulls_to_the_identity(family: str, window: range, seed: int) -> None:
    model = tiny_model(family).double()
    fit, held_out = tokens(5, 11, seed), tokens(3, 11, seed + 10)
    folded = fit_fold(model, window, [fit], [held_out])
    a, m, y = (
        torch.cat(pair).numpy() for pair in zip(*(states(model, window, ids) for ids in (fit, held_out)), strict=True)
    )
    w = 1 / np.linalg.norm(y, axis=-1, keepdims=True)
    weighted, target = m * w, (y - a) * w
    penalty = np.sqrt(folded.ridge * np.trace(weighted.T @ weighted) / WIDTH) * np.eye(WIDTH)
    expected = np.linalg.lstsq(np.vstack([weighted, penalty]), np.vstack([target, penalty]), rcond=None)[0]
    np.testing.assert_allclose(folded.map.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert folded.window == window


@settings(max_examples=12)
@given(families, windows, st.integers(0, 5))
def test_it_is_never_above_plain_removal_in_what_it_minimizes(family: str, window: range, seed: int) -> None:
    model = tiny_model(family)
    fit, held_out = tokens(4, 9, seed), tokens(1, 4, seed + 10)
    folded = fit_fold(model, window, [fit], [held_out])
    (everything,) = measure_fold_moments(model, [fit, held_out], [window])
    zero = torch.zeros(WIDTH, WIDTH)
    assert everything.error(folded.map - torch.eye(WIDTH)) <= everything.error(zero) + 1e-12
    (plain,) = measure_moments(model, [held_out], [window])
    assert folded.removal_error == pytest.approx(plain.error(zero), rel=1e-4)  # T = I is removal


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_the_model_has_the_error_that_was_predicted(family: str) -> None:
    model, window = tiny_model(family).double(), range(2, 4)
    fit, held_out = tokens(20, 12), tokens(6, 12, seed=1)
    measured = [measure_fold_moments(model, [ids], [window])[0] for ids in (fit, held_out)]
    map_ = solve_least_squares(*measured).map
    with HiddenStateRecorder(model, [3], sites=["block.output"]) as record, torch.no_grad():
        model(held_out)
    y = record.outputs[3][0]
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(1, torch.eye(WIDTH) + map_)
        surgeon.remove(window)
        with HiddenStateRecorder(model, [1], sites=["block.output"]) as record, torch.no_grad():
            model(held_out)
    off = (record.outputs[1][0] - y).square().sum(-1) / y.square().sum(-1)
    assert off.mean().item() == pytest.approx(measured[1].error(map_), rel=1e-4)
    assert off.mean().item() < measured[1].error(torch.zeros_like(map_))


def test_a_map_fitted_on_the_whole_state_is_another_one() -> None:
    model, window = tiny_model("llama"), range(2, 4)
    fit, held_out = tokens(30, 12), tokens(10, 12, seed=1)
    folded = fit_fold(model, window, [fit], [held_out])
    whole = solve_least_squares(*(measure_moments(model, [ids], [window])[0] for ids in (fit, held_out)))
    (apart,) = measure_fold_moments(model, [held_out], [window])
    assert folded.held_out_error < apart.error(whole.map) and folded.held_out_error < folded.removal_error


@settings(max_examples=6)
@given(st.integers(1, 6), st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_batches_and_padding_make_no_difference(size: int, side: str, random: Random) -> None:
    model = tiny_model("llama")
    batch = padded([9, 4, 7, 2, 9, 5], side)
    (whole,) = measure_fold_moments(model, shuffled_batches(batch, 1, Random(0)), [range(2, 4)])
    (parts,) = measure_fold_moments(model, shuffled_batches(batch, size, random), [range(2, 4)])
    assert whole.tokens == parts.tokens == 36
    for name in ("xx", "xd"):
        ours, theirs = getattr(whole, name), getattr(parts, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_several_windows_share_a_pass_that_ends_with_the_last() -> None:
    model = tiny_model("llama")
    batches, chosen = [tokens(3, 9), tokens(2, 9, seed=1)], [range(1, 3), range(2, 3), range(3, 5), range(1, 2)]
    runs: list[int] = []
    handles = [
        block.register_forward_hook(lambda *given, k=k: runs.append(k)) for k, block in enumerate(find_stack(model))
    ]
    together = measure_fold_moments(model, batches, chosen)
    for handle in handles:
        handle.remove()
    assert runs == [0, 1, 2, 3, 4] * 2  # once a batch, and not the last block
    for window, sums in zip(chosen, together, strict=True):
        (alone,) = measure_fold_moments(model, batches, [window])
        assert torch.equal(sums.xx, alone.xx) and torch.equal(sums.xd, alone.xd) and sums.dd == alone.dd
        folded = solve_fold(window, sums, alone)
        assert folded.window == window


def test_it_is_fitted_in_a_model_that_is_being_operated_on() -> None:
    """The numbers are then those of the model as it is now."""
    model, batches = tiny_model("llama"), [tokens(4, 9)]
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        inside = fit_fold(model, range(2, 4), batches, batches)
        surgeon.commit()
    assert torch.equal(fit_fold(model, range(2, 4), batches, batches).map, inside.map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_summed_wide(dtype: torch.dtype) -> None:
    model, window = tiny_model("llama", dtype), range(2, 4)
    ids = tokens(6, 10)
    (sums,) = measure_fold_moments(model, [ids], [window])
    _, m, y = states(model, window, ids)
    w = 1 / y.square().sum(-1, keepdim=True)
    expected = (m * w).T @ m
    torch.testing.assert_close(sums.xx, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    folded = fit_fold(model, window, [ids], [tokens(3, 10, seed=1)])
    with LayerSurgeon(model) as surgeon:
        surgeon.fold(1, folded.map)
        surgeon.remove(window)


# Saying no


def test_a_window_at_the_beginning_is_refused() -> None:
    with pytest.raises(UnsupportedSurgery, match=r"blocks 0.*1"):
        fit_fold(tiny_model("llama"), range(0, 2), [tokens(2, 6)], [tokens(2, 6)])


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "bert", "mamba"])
def test_what_cannot_be_folded_is_refused_before_the_pass(model_type: str) -> None:
    model = tiny(model_type, blocks=3)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *given: forwards.append(1))
    with pytest.raises(UnsupportedSurgery, match=r"mlp branch of block 0.*folded"):
        fit_fold(model, range(1, 2), [tokens(2, 6)], [tokens(2, 6)])
    handle.remove()
    assert not forwards


class MlpFirst(nn.Module):
    """A plain block whose attention works on what its MLP has added."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state = state + self.mlp(state)
        normed = self.norm(state)
        return state + self.attention(normed, normed, normed, need_weights=False)[0]


def test_attention_behind_the_mlp_is_refused() -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(*(MlpFirst() for _ in range(3)))).eval()
    batch = {"input": torch.randn(2, 6, 16)}
    with pytest.raises(UnsupportedSurgery, match=r"block 0.*MLP"):
        fit_fold(model, range(1, 2), [batch], [batch], probe=batch)
