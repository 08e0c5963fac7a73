"""Blocks merged into one of them: the formula, what stays, and what cannot be merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, UnsupportedSurgery, find_stack, fit_windows, load, save
from streamline_hooks.repair import MergedConfig, insert_replacement
from streamline_hooks.repair.inherited_blocks import merge_blocks
from tests.repair.replacement_modules import FIT, HELD_OUT
from tests.tiny_models import FAMILIES, tiny_model, tokens

WINDOW = range(2, 5)


def matrices(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().double() for name, p in block.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [1.0, 1 / 3, 0.0])
def test_weights_are_the_first_and_the_differences_to_it(family: str, weight: float) -> None:
    model = tiny_model(family)
    stack, before = find_stack(model), copy.deepcopy(model.state_dict())
    found = merge_blocks(stack, WINDOW, weight)
    first, *rest = (matrices(stack[k]) for k in WINDOW)
    for name, merged in matrices(found).items():
        wanted = first[name] + weight * sum(other[name] - first[name] for other in rest)
        torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)
        if weight == 1 / 3:
            torch.testing.assert_close(merged, sum((o[name] for o in rest), first[name]) / 3, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model was changed"
    assert all(p.requires_grad for p in found.parameters() if p.is_floating_point())


def test_norms_stay_and_biases_are_merged() -> None:
    stack: Any = find_stack(tiny_model("gpt2"))
    for k in WINDOW:
        with torch.no_grad():
            stack[k].ln_1.weight.fill_(float(k))
            stack[k].mlp.c_fc.bias.fill_(float(k))
    found: Any = merge_blocks(stack, WINDOW)
    assert bool((found.ln_1.weight == 2.0).all()) and bool((found.mlp.c_fc.bias == 2.0 + 1.0 + 2.0).all())


def test_several_are_not_the_last_alone() -> None:
    """As it is in the published script, which subtracts what it has merged so far."""
    stack: Any = find_stack(tiny_model("llama"))
    found: Any = merge_blocks(stack, WINDOW)
    assert not torch.allclose(found.mlp.up_proj.weight, stack[4].mlp.up_proj.weight, atol=1e-3)


def test_equal_blocks_are_merged_to_themselves(tmp_path: Any) -> None:
    """Whatever the weight is; and the checkpoint is a plain one that says the same."""
    model = tiny_model("llama")
    for k in (3, 4):
        model.model.layers[k].load_state_dict(model.model.layers[2].state_dict())
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([3, 4])
        wanted = model(tokens(2, 6)).logits
    (repair,) = fit_windows(model, [WINDOW], MergedConfig(weight=0.7), FIT, HELD_OUT)
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, repair.window, repair.replacement_module)
        surgeon.commit()
    torch.testing.assert_close(model(tokens(2, 6)).logits, wanted, rtol=1e-4, atol=1e-5)
    loaded = load(save(model, tmp_path / "model"), as_original=True)
    assert torch.equal(loaded(tokens(2, 6)).logits, model(tokens(2, 6)).logits)


def test_low_precision_is_added_up_in_a_wide_one() -> None:
    """In bfloat16, whose step is 2 there, the first difference would be lost each time."""
    stack: Any = find_stack(tiny_model("llama", torch.bfloat16))
    with torch.no_grad():
        for k, value in zip(WINDOW, (256.0, 1.0, 255.0), strict=True):
            stack[k].mlp.up_proj.weight.fill_(value)
    found: Any = merge_blocks(stack, WINDOW, 0.25)
    assert found.mlp.up_proj.weight.dtype == torch.bfloat16
    assert bool((found.mlp.up_proj.weight == 192.0).all())  # 256 - 63.75 - 0.25


def test_blocks_that_are_not_built_alike_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp = nn.Linear(32, 32)
    with pytest.raises(UnsupportedSurgery, match=r"block 3.*model.layers.*mlp.gate_proj.weight"):
        merge_blocks(find_stack(model), WINDOW)
    with pytest.raises(UnsupportedSurgery, match=r"cannot replace a window of 1 .*block 2\b"):
        merge_blocks(find_stack(model), range(2, 3))


def test_the_weights_of_other_blocks_in_a_zeroed_branch_are_trainable(tmp_path: Any) -> None:
    """The branch of the first block is zeroed, so its copy is frozen there; what the others add is trained."""
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(WINDOW.start, "attention")
        stack: Any = find_stack(model)
        kept: Any = merge_blocks(stack, WINDOW, 0.0)
        assert not kept.self_attn.o_proj.weight.any() and not kept.self_attn.o_proj.weight.requires_grad
        merged: Any = merge_blocks(stack, WINDOW)
        assert merged.self_attn.o_proj.weight.any() and merged.self_attn.o_proj.weight.requires_grad
        insert_replacement(surgeon, WINDOW, merged)
        surgeon.commit()
    loaded = load(save(model, tmp_path / "model"))
    assert torch.equal(loaded(tokens(2, 6)).logits, model(tokens(2, 6)).logits)
