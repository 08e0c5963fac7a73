"""Models that carry hooks of their user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, find_stack
from streamline_hooks.modeling import read_output, write_output
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, tiny_model, tokens

families = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 7), use_cache=False).logits


def steer(model: nn.Module, k: int) -> None:
    """The usual hooks: one that changes the state on its way in, one that does on its way out."""
    block = find_stack(model)[k]
    block.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True)
    block.register_forward_hook(lambda m, args, output: write_output(output, read_output(output) + 1))


@families
def test_the_recorder_sees_what_the_hooks_made_of_the_state(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad(), HiddenStateRecorder(model) as plain:
        model(tokens(2, 7))
    steer(model, 2)
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        model(tokens(2, 7))
    assert torch.equal(record.inputs[2][0], 2 * plain.inputs[2][0])
    assert torch.equal(record.outputs[2][0], record.inputs[3][0])
    assert not torch.equal(record.outputs[2][0], plain.outputs[2][0])


@families
def test_hooks_stay_through_surgery_and_go_and_come_with_their_block(family: str) -> None:
    model, ran = tiny_model(family), []
    for k, block in enumerate(find_stack(model).blocks):
        block.register_forward_hook(lambda m, args, output, k=k: ran.append(k))
        block.register_forward_pre_hook(lambda m, args, k=k: ran.append(k))
    before = [(list(b._forward_hooks.items()), list(b._forward_pre_hooks.items())) for b in find_stack(model).blocks]
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), Nudge())
        surgeon.insert(BLOCKS, Nudge())
        logits(model)
    assert ran == [0, 0, 3, 3, 4, 4, 5, 5]
    ran.clear()
    logits(model)
    assert ran == [k for k in range(BLOCKS) for _ in range(2)]
    after = [(list(b._forward_hooks.items()), list(b._forward_pre_hooks.items())) for b in find_stack(model).blocks]
    assert after == before


def test_a_splice_runs_ahead_of_the_users_hooks() -> None:
    """insert(k, m) changes the state that block k is called with; hooks on block k, old or new, belong to block k."""
    model, nudge, end, seen = tiny_model("llama"), Nudge(seed=1), Nudge(seed=2), {}
    with torch.no_grad(), HiddenStateRecorder(model) as plain:
        model(tokens(2, 7))
    block, last = find_stack(model)[2], find_stack(model)[-1]

    def see(name: str) -> Any:
        return lambda m, args: seen.update({name: args[0].clone()})

    block.register_forward_pre_hook(see("old"))
    last.register_forward_hook(lambda m, args, output: seen.update(end=read_output(output).clone()))
    with torch.no_grad(), LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.insert(2, nudge)
        surgeon.insert(BLOCKS, end)
        handle = block.register_forward_pre_hook(see("new"))
        model(tokens(2, 7))
        handle.remove()
        assert torch.equal(seen["old"], nudge(plain.inputs[2][0]))
        assert torch.equal(seen["new"], seen["old"]) and torch.equal(record.inputs[2][0], seen["old"])
        assert torch.equal(record.outputs[BLOCKS - 1][0], seen["end"])


def test_removing_with_steering_hooks_is_bypassing_with_them() -> None:
    model = tiny_model("llama")
    steer(model, 0)
    steer(model, 4)
    steer(model, 2)
    stack = find_stack(model)
    handle = stack[2].register_forward_pre_hook(lambda m, args: m.__setattr__("entering", args[0] / 2), prepend=False)
    after = stack[2].register_forward_hook(lambda m, args, output: write_output(output, m.entering))
    expected = logits(model)
    handle.remove(), after.remove()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("order", ["inside", "across"])
def test_hooks_added_and_removed_while_a_recorder_is_open(order: str) -> None:
    model, ran = tiny_model("llama"), []
    block = find_stack(model)[1]
    early = block.register_forward_hook(lambda m, args, output: ran.append("early"))
    with HiddenStateRecorder(model) as record:
        late = block.register_forward_hook(lambda m, args, output: ran.append("late"))
        if order == "inside":
            early.remove(), late.remove()
        logits(model)
    logits(model)
    assert len(record.outputs[1]) == 1
    assert ran == ([] if order == "inside" else ["early", "late"] * 2)
    early.remove(), late.remove()
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_a_hook_that_stops_the_forward_leaves_nothing_of_ours() -> None:
    model = tiny_model("llama")

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise ZeroDivisionError("the user's own")

    handle = find_stack(model)[3].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
        surgeon.insert(2, Nudge())
        logits(model)
    assert len(record.inputs[3]) == 1 and record.inputs[4] == []
    assert [list(b._forward_hooks) for b in find_stack(model).blocks].count([]) == BLOCKS - 1
    handle.remove()
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_full_backward_hooks_and_global_hooks() -> None:
    model, gradients, called = tiny_model("llama"), [], []
    block = find_stack(model)[3]
    block.register_full_backward_hook(lambda m, given, out: gradients.append(out[0].norm().item()))
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: called.append(m))
    try:
        with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model) as record:
            nudge = surgeon.insert(3, Nudge())
            model(tokens(2, 7), use_cache=False).logits.square().mean().backward()
    finally:
        handle.remove()
    assert nudge in called and len(record.inputs[3]) == 1
    assert len(gradients) == 1 and nudge.weight.grad is not None
