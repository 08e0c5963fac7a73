"""Modes and ``requires_grad`` of removed blocks follow the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon
from streamline_hooks.modeling import inference
from tests.tiny_models import tiny_model, tokens


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


SURGERIES: dict[str, Callable[[LayerSurgeon], Any]] = {
    "removed": lambda surgeon: surgeon.remove(range(1, 3)),
    "replaced": lambda surgeon: surgeon.replace(range(1, 3), nn.Identity()),
    "one kept": lambda surgeon: surgeon.remove(range(0, 5)),
    "none kept": lambda surgeon: surgeon.replace(range(0, 6), copy.deepcopy(surgeon.stack[2])),
    "exchanged": lambda surgeon: surgeon.exchange(2, copy.deepcopy(surgeon.stack[2])),
    "zeroed": lambda surgeon: surgeon.zero_branch(1, "mlp"),
}


@pytest.mark.parametrize("surgery", SURGERIES.values(), ids=SURGERIES)
@pytest.mark.parametrize("to", [False, True])
def test_flags_that_are_set_inside_reach_the_blocks_that_are_out(
    surgery: Callable[[LayerSurgeon], Any], to: bool
) -> None:
    model = tiny_model("llama").train(not to).requires_grad_(to)
    with LayerSurgeon(model, probe=False) as surgeon:
        surgery(surgeon)
        model.train(to)
        for parameter in model.parameters():
            parameter.requires_grad = not to
    assert set(modes(model).values()) == {to} and set(trainable(model).values()) == {not to}


@pytest.mark.parametrize("surgery", SURGERIES.values(), ids=SURGERIES)
def test_flags_that_nobody_sets_come_back_as_they_were(surgery: Callable[[LayerSurgeon], Any]) -> None:
    model = tiny_model("llama").eval()
    layers = model.model.layers
    layers[1].train()
    layers[4].mlp.train()
    layers[2].requires_grad_(False)
    layers[5].self_attn.q_proj.requires_grad_(False)
    before = modes(model), trainable(model)
    with LayerSurgeon(model) as surgeon:
        surgery(surgeon)
        with inference(model), torch.no_grad():
            model(tokens(1, 5))
    assert (modes(model), trainable(model)) == before


def test_flags_of_some_submodules_follow_those_of_the_other_blocks() -> None:
    model = tiny_model("llama").eval()
    model.model.layers[1].mlp.train()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        for layer in model.model.layers:
            layer.self_attn.train()
            layer.mlp.requires_grad_(False)
        model.model.layers[0].input_layernorm.train()  # one block alone
        model.lm_head.requires_grad_(False)
    out = [model.model.layers[k] for k in (1, 2)]
    assert all(set(modes(block.self_attn).values()) == {True} for block in out)
    assert [set(modes(block.mlp).values()) for block in out] == [{True}, {False}]
    assert not any(block.input_layernorm.training or block.training for block in out)
    for block in out:
        assert set(trainable(block.mlp).values()) == {False}
        assert set(trainable(block.self_attn).values()) == {True}


def test_two_kept_blocks_that_change_together_are_followed() -> None:
    """One alone may have been meant alone; see the next test."""
    model = tiny_model("llama").eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 5))
        for layer in model.model.layers:
            layer.mlp.train().requires_grad_(False)
    for layer in model.model.layers:
        assert layer.mlp.training and not layer.mlp.up_proj.weight.requires_grad
        assert not layer.training and layer.self_attn.q_proj.weight.requires_grad


def test_a_mode_that_is_set_for_the_only_kept_block_stays_its_own() -> None:
    model = tiny_model("llama").eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(0, 5))
        model.model.layers[0].train().requires_grad_(False)
    assert [layer.training for layer in model.model.layers] == [False] * 5 + [True]
    assert [layer.mlp.up_proj.weight.requires_grad for layer in model.model.layers] == [True] * 5 + [False]


def test_a_mode_of_the_model_reaches_a_removed_block_that_alone_has_another() -> None:
    """What the kept blocks show is no change at all."""
    model = tiny_model("llama").eval()
    model.model.layers[1].train()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        model.eval()
    assert set(modes(model).values()) == {False}
    model.model.layers[1].eval()
    model.model.layers[4].train()
    with LayerSurgeon(model) as surgeon:
        model.train()
        surgeon.remove([1])
        model.eval()
        surgeon.remove([4])
        with LayerSurgeon(model) as inner:
            inner.remove([0])
            model.train()
            model.eval()
    assert set(modes(model).values()) == {False}


@pytest.mark.parametrize("wanted", [False, True])
def test_flags_that_are_set_before_and_after_a_removal(wanted: bool) -> None:
    """None of the blocks stays, and around them all is in the end as it was at first."""
    model = tiny_model("llama").train(wanted).requires_grad_(wanted)
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.exchange(0, copy.deepcopy(surgeon.stack[0]))
        model.train(not wanted).requires_grad_(not wanted)
        surgeon.remove(range(1, 6))
        model.train(wanted).requires_grad_(wanted)
    assert set(modes(model).values()) == {wanted} and set(trainable(model).values()) == {wanted}


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_inside_holds_nothing_of_the_removed_blocks(make: Callable[[Any], Any]) -> None:
    model = tiny_model("llama").eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        removed, copied = surgeon.stack[1], make(model)
        copied.train()
        assert set(modes(copied).values()) == {True} and not removed.training
    assert set(modes(model).values()) == {False}
    copied.eval()
    assert set(modes(copied).values()) == {False}


def test_a_commit_lets_go_of_the_removed_blocks() -> None:
    model = tiny_model("llama").eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        removed = weakref.ref(surgeon.stack[1])
        surgeon.commit()
    del surgeon
    gc.collect()
    assert removed() is None
    assert set(modes(model.train()).values()) == {True} and "train" not in vars(model.model.layers)


def test_a_commit_keeps_the_mode_that_was_set_inside() -> None:
    model = tiny_model("llama").train()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        model.eval()
        surgeon.commit()
    assert set(modes(model).values()) == {False}


def test_a_nested_surgeon_hands_a_mode_on() -> None:
    model = tiny_model("llama").train()
    with LayerSurgeon(model) as outer:
        outer.remove([0])
        with LayerSurgeon(model) as inner:
            inner.remove([0])
            model.eval().requires_grad_(False)
    assert set(modes(model).values()) == {False} and set(trainable(model).values()) == {False}
