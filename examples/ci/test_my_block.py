"""Tests of a custom block, with one assertion for each property."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from my_block import Bottleneck

from streamline_hooks import LayerSurgeon
from streamline_hooks.testing import (
    assert_cached_generation_matches,
    assert_causal,
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
    assert_restores,
    assert_shapes,
)


def test_block() -> None:
    assert_shapes(Bottleneck(32), features=32)
    assert_causal(Bottleneck(32), features=32)


@contextmanager
def with_my_block(model: Any) -> Iterator[None]:
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(3, 5), Bottleneck(32))
        yield


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_model_with_block(tiny_model: Callable[..., Any], model_type: str) -> None:
    model = tiny_model(model_type)
    with with_my_block(model):
        assert_shapes(model)
        assert_causal(model)
        assert_cached_generation_matches(model)


def test_replacement_is_reversible(tiny_model: Callable[..., Any]) -> None:
    assert_restores(tiny_model("llama"), with_my_block)


def test_surgery(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert_identity_preserves_output(model)
    assert_removal_equals_shorter_model(model, range(2, 4))
