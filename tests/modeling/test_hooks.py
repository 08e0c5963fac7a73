"""What one call was given is nothing to the next, whichever part of the model is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import HiddenStateRecorder, find_stack
from streamline_hooks.modeling.hooks import WatchedMask
from streamline_hooks.training import HiddenStateMonitor
from tests.tiny_models import padded, tiny_model, tokens


def called_in_turn(model: Any) -> None:
    """A padded batch, and then the inner model without a mask: all its tokens are real."""
    model(**padded([3, 8], "right"))
    model.model(tokens(2, 8, seed=3))


def test_a_recorder_takes_no_mask_of_an_earlier_call() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), HiddenStateRecorder(model, blocks=[2], tokens="last") as record:
        called_in_turn(model)
    with torch.no_grad(), HiddenStateRecorder(model, blocks=[2]) as whole:
        called_in_turn(model)
    last = whole.outputs[2]
    assert torch.equal(record.outputs[2][0], torch.stack([last[0][0, 2], last[0][1, 7]]))
    assert torch.equal(record.outputs[2][1], last[1][:, -1])


def test_a_monitor_takes_no_mask_of_an_earlier_call() -> None:
    model = tiny_model("llama").train()
    with HiddenStateMonitor(model, every=1) as monitor:
        called_in_turn(model)
        found = monitor.step()
    assert found is not None and found.tokens == 3 + 8 + 16


def test_a_watched_mask_is_of_one_call() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), WatchedMask(find_stack(model)) as watched:
        called_in_turn(model)
    assert watched.mask is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_ends_a_call_too() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), WatchedMask(find_stack(model)) as watched:
        with pytest.raises(IndexError):
            model(tokens(2, 8) + 10_000, attention_mask=torch.zeros(2, 8, dtype=torch.long))
        model.model(tokens(2, 8))
        assert watched.mask is None
