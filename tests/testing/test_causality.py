"""A look at later tokens is seen however small it is, is blamed on the right block, and nothing else is blamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon
from streamline_hooks.testing import assert_causal
from tests.tiny_models import WIDTH, tiny_model

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


class Leak(nn.Module):
    """A hundredth of the mean over all tokens, earlier and later."""

    def forward(self, state: Tensor) -> Tensor:
        return state + 0.01 * state.mean(dim=1, keepdim=True)


@dtypes
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("place", [1, 5, 6])
def test_a_small_leak_is_seen_and_blamed_where_it_is(place: int, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    where = "enters block" if place < 6 else "leaves block 5"
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.insert(place, Leak())
        blamed = f"{where} {place} " if place < 6 else where
        with pytest.raises(AssertionError, match=rf"first state to change.*{blamed}"):
            assert_causal(model)
    assert_causal(model)


class Sink(nn.Module):
    """One feature of the first token becomes very large, as in large language models."""

    def forward(self, state: Tensor) -> Tensor:
        large = torch.zeros_like(state)
        large[:, 0, 0] = 1e4
        return state + large


def test_a_token_of_a_very_large_norm_hides_no_guilty_block() -> None:
    model = tiny_model("llama", torch.bfloat16)
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.insert(1, Sink())
        surgeon.insert(3, Leak())
        with pytest.raises(AssertionError, match=r"first state to change.*enters block 3 "):
            assert_causal(model, changed_tokens=[1])


@dtypes
def test_a_module_may_leak_only_as_much_as_its_own_noise(dtype: torch.dtype) -> None:
    """A module that gives other numbers each time is not blamed for that, and its leak is still seen."""

    class Noisy(nn.Module):
        def __init__(self, leak: float) -> None:
            super().__init__()
            self.leak, self.calls = leak, 0
            self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

        def forward(self, state: Tensor) -> Tensor:
            self.calls += 1
            size = 1 + 0.02 * (self.calls % 2)
            return (state * size + self.leak * state.mean(dim=1, keepdim=True)).to(state.dtype)

    assert_causal(Noisy(0.0), features=WIDTH)
    with pytest.raises(AssertionError, match="later tokens"):
        assert_causal(Noisy(2.0), features=WIDTH)


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_random_numbers_hide_no_leak(leak: float) -> None:
    """Dropout that is always on draws the same each time: its noise is not allowed for."""

    class Dropping(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return nn.functional.dropout(state, 0.5, training=True) + leak * state.mean(dim=1, keepdim=True)

    model = tiny_model("llama")
    before = torch.get_rng_state()
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.insert(2, Dropping())
        for check in (lambda: assert_causal(Dropping(), features=WIDTH), lambda: assert_causal(model)):
            if not leak:
                check()
                continue
            with pytest.raises(AssertionError, match="later tokens"):
                check()
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_without_bounds_is_told() -> None:
    class Sometimes(nn.Module):
        calls = 0

        def forward(self, state: Tensor) -> Tensor:
            self.calls += 1
            return state * (self.calls % 2 - 1)

    with pytest.raises(AssertionError, match=r"two runs.*NaN or infinity"):
        assert_causal(Sometimes(), features=WIDTH)


def test_noise_that_could_hide_a_leak_is_told() -> None:
    class Noisy(nn.Module):
        calls = 0

        def forward(self, state: Tensor) -> Tensor:
            self.calls += 1
            return state * (1 + self.calls % 2) + state.mean(dim=1, keepdim=True)

    with pytest.raises(AssertionError, match=r"two runs.*differ by .* of the norm.*deterministic"):
        assert_causal(Noisy(), features=WIDTH)


def test_a_module_that_works_in_place_is_not_blamed_for_looking_ahead() -> None:
    class InPlace(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            state += 0.5 * state
            return state

    class LeaksInPlace(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            state += state.mean(dim=1, keepdim=True)
            return state

    assert_causal(InPlace(), features=WIDTH)
    with pytest.raises(AssertionError, match="LeaksInPlace"):
        assert_causal(LeaksInPlace(), features=WIDTH)


def test_a_token_that_becomes_nan_has_moved() -> None:
    class Nan(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return torch.where(state[:, -1:] > 3, torch.nan, state)

    class AlwaysNan(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return state * torch.nan

    with pytest.raises(AssertionError, match="of the expected tensor"):
        assert_causal(AlwaysNan(), features=WIDTH)
    with pytest.raises(AssertionError, match=r"NaN.*batch 0.*0.*1 of"):
        assert_causal(Nan(), features=WIDTH)
