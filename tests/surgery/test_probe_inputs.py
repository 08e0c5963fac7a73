"""What models without text are held against: surgery on them is checked on images, sounds and pairs too."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack
from streamline_hooks.hidden_state import read_output, write_output
from streamline_hooks.surgery.probe import given_to_probe, observe
from tests.other_models import OTHERS, made


@pytest.fixture(autouse=True)
def every_warning_is_an_error() -> Iterator[None]:
    """Where a removal is not held against anything, a warning says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held against")
        yield


@pytest.mark.parametrize("name", OTHERS)
def test_a_removal_is_held_against_the_bypassed_blocks(name: str) -> None:
    model, case = made(name), OTHERS[name]
    stack = find_stack(model, case.path(model))
    assert set(given_to_probe(model, stack[1])) == set(case.given)
    truth = observe(stack, range(1, 2))
    assert truth is not None
    decodes = "decoder_input_ids" in truth.given or name in ("llava text", "gemma3 text")
    assert truth.cached == decodes, "a decoder has a cache, and nothing else here has"
    with LayerSurgeon(model, case.path(model)) as surgeon:
        surgeon.remove([1])


@pytest.mark.parametrize("name", OTHERS)
def test_a_block_that_does_more_without_another_is_seen(name: str) -> None:
    """A planted fault: the last block adds something once it has another number of blocks before it."""
    model, case = made(name), OTHERS[name]
    stack = find_stack(model, case.path(model))
    forward, length = stack[2].forward, len(stack)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if len(list(stack.container.children())) == length:
            return output
        return write_output(output, read_output(output) + torch.arange(32).sin())

    stack[2].forward = faulty
    with (
        LayerSurgeon(model, case.path(model)) as surgeon,
        pytest.raises(UnsupportedSurgery, match="other logits than with them"),
    ):
        surgeon.remove([1])
