"""Windows are in the numbering of a training's start, whoever committed what since, and when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack, load, save
from streamline_hooks.in_training.progressive_removal import ProgressiveRemoval
from tests.tiny_models import BLOCKS, tiny_model


def remove_by_hand(model: nn.Module, *blocks: int) -> None:
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(blocks)
        surgeon.commit()


def plain() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)


def llama() -> nn.Module:
    return tiny_model("llama").train()


@pytest.mark.parametrize("make", [llama, plain])
@pytest.mark.parametrize("before", [0, 1])
def test_the_start_is_when_it_was_made_whoever_removes_first(make: Callable[[], nn.Module], before: int) -> None:
    """Before the start too, whose numbers do not count."""
    model = make()
    if before:
        remove_by_hand(model, 5)
    stack = find_stack(model)
    removal = ProgressiveRemoval(model, {2: range(1, 2), 3: range(3, 4)})
    removal.step(1)
    remove_by_hand(model, 0)
    assert removal.step(2).blocks == (1,) and removal.step(3).blocks == (3,)  # type: ignore[union-attr]
    left = [2, 4, 5][: 3 - before]
    assert list(find_stack(model).blocks) == [stack[k] for k in left]


@pytest.mark.parametrize("make", [llama, plain])
def test_two_at_once_have_each_its_own_start(make: Callable[[], nn.Module]) -> None:
    model = make()
    blocks = find_stack(model).blocks
    first = ProgressiveRemoval(model, {1: range(0, 1), 3: range(3, 4)}, run="first")
    early = ProgressiveRemoval(model, {2: range(1, 2)}, run="early")
    first.step(1), early.step(1)
    late = ProgressiveRemoval(model, {3: range(3, 4)}, run="late")  # its block 3 is 4 of the others
    first.step(2), early.step(2), late.step(2)
    assert list(find_stack(model).blocks) == [blocks[k] for k in (2, 3, 4, 5)]
    first.step(3)
    assert late.step(3).blocks == (3,)  # type: ignore[union-attr]
    assert list(find_stack(model).blocks) == [blocks[k] for k in (2, 5)]


def test_blocks_that_went_without_a_surgeon_are_noticed() -> None:
    model = llama()
    removal = ProgressiveRemoval(model, {1: range(1, 2)})
    del model.model.layers[0]
    with pytest.raises(StreamlineError, match=r"6 blocks.*5 were.*LayerSurgeon"):
        removal.step(1)


@pytest.mark.parametrize("make", [llama, plain])
def test_a_training_that_is_resumed_before_its_first_removal_knows_its_start(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    schedule = {3: range(1, 2), 4: range(3, 4)}
    model = make()
    removal = ProgressiveRemoval(model, schedule)
    remove_by_hand(model, 0)
    removal.step(1)
    save(model, tmp_path)
    for n in (2, 3, 4):
        removal.step(n)
    resumed = load(tmp_path, into=None if make is llama else make()).train()
    with pytest.raises(StreamlineError, match=r"0 steps.*'train"):
        ProgressiveRemoval(resumed, schedule).step(1)
    removal = ProgressiveRemoval(resumed, schedule)
    for n in (2, 3, 4):
        removal.step(n)
    one, other = model.state_dict(), resumed.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert ProgressiveRemoval(resumed, {1: range(1, 2)}, run="another").step(1).plan.removed == (1,)  # type: ignore[union-attr]
