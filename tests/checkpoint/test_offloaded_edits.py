"""Branches of blocks on disk are zeroed, folded and scaled as those in memory, without loading the blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.checkpoint import open_checkpoint, save
from streamline_hooks.checkpoint.offloaded import offloaded_weights
from streamline_hooks.core import ComputedWeights, offload_hooks
from tests.checkpoint.block_by_block import on_disk, written
from tests.surgery.test_fold import a_map
from tests.tiny_models import WIDTH, tokens


def edit(surgeon: LayerSurgeon) -> None:
    """Edits of one another's weights: two maps, factors on top of them, a zeroed branch before and after."""
    surgeon.zero_branch(4, "attention")
    surgeon.fold(1, a_map(WIDTH))
    surgeon.scale(1, 1.5)
    surgeon.fold(1, a_map(WIDTH).flip(0))
    surgeon.fold(3, a_map(WIDTH), "attention")
    surgeon.scale(3, 0.75)
    surgeon.zero_branch(5, "mlp")
    surgeon.remove([2])


def read(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in offloaded_weights(find_stack(model))}


def computed(model: Any) -> list[Any]:
    return [hook for _, hook in offload_hooks(model) if isinstance(hook.weights_map, ComputedWeights)]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16), ("gpt_neox", torch.float32)]
)
def test_the_weights_are_those_of_the_same_surgery_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, whole = written(tmp_path, family, dtype)
    whole = copy.deepcopy(whole)
    before, model = dict(copy.deepcopy(whole).state_dict()), open_checkpoint(folder)
    with LayerSurgeon(whole) as surgeon:
        edit(surgeon)
        plan = surgeon.commit()
    with LayerSurgeon(model) as surgeon:
        edit(surgeon)
        assert all(on_disk(model))
        inside = model(tokens(2, 9)).logits
        assert surgeon.commit() == plan
    assert all(on_disk(model)) and computed(model)
    wanted, found = dict(whole.named_parameters()), read(model)
    changed = 0
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight) and found[name].dtype == weight.dtype == dtype, name
        changed += name in before and not torch.equal(before[name], weight)
    assert changed >= 8
    assert torch.equal(model(tokens(2, 9)).logits, inside)
    torch.testing.assert_close(inside, whole(tokens(2, 9)).logits, rtol=1e-4, atol=1e-4)
    mine, theirs = save(model, tmp_path / "apart", max_shard_size="30KB"), save(whole, tmp_path / "whole")
    again, other = (type(whole).from_pretrained(path, dtype="auto") for path in (mine, theirs))
    for (name, weight), value in zip(again.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(weight, value) and weight.dtype == value.dtype, name


def test_closing_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    model = open_checkpoint(written(tmp_path)[0])
    before = read(model)
    with LayerSurgeon(model) as surgeon:
        edit(surgeon)
        assert any(not torch.equal(value, before[name]) for name, value in read(model).items() if name in before)
    after = read(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert not computed(model) and all(on_disk(model))


def test_the_weights_of_one_block_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the branches of many blocks are looked for, whose inputs come from one forward."""
    model, loaded = open_checkpoint(written(tmp_path)[0]), []
    surgery: Any = __import__("sys").modules["streamline_hooks.surgery.fold"]
    original = surgery.require_proportional

    def watched(*args: Any) -> None:
        loaded.append(on_disk(model).count(False))
        original(*args)

    monkeypatch.setattr(surgery, "require_proportional", watched)
    with LayerSurgeon(model) as surgeon:
        surgeon.scale(0, 1.5)
        assert all(on_disk(model))
    assert loaded == [1] * 12
