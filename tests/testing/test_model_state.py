"""Whatever is changed in a model is named, and nothing is named where nothing is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks.testing.model_state import ModelState
from tests.tiny_models import tiny_model


def _nothing(*given: Any) -> None:
    """A hook without effect."""


def _swap_hooks(model: Any) -> None:
    model.model.norm._forward_hooks.move_to_end(next(iter(model.model.norm._forward_hooks)))


def _backward(model: Any) -> None:
    model(torch.arange(3, 9)[None]).logits.sum().backward()


CHANGES: dict[str, Callable[[Any], object]] = {
    "model.layers.1.mlp is a different module (LlamaMLP) than before": lambda m: setattr(
        m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[1].mlp)
    ),
    "model.extra (Identity) was left in the model": lambda m: m.model.add_module("extra", nn.Identity()),
    "model.layers.5 (LlamaDecoderLayer) is missing": lambda m: m.model.layers.pop(5),
    "a backward hook was left on lm_head": lambda m: m.lm_head.register_full_backward_hook(_nothing),
    "a load-state-dict pre-hook was left on the model": lambda m: m.register_load_state_dict_pre_hook(_nothing),
    "a forward hook that existed before is missing on model.norm": lambda m: m.model.norm._forward_hooks.popitem(),
    "the hooks of _forward_hooks run in a different order on model.norm": _swap_hooks,
    "the gradient of model.norm.weight is a different tensor than before": _backward,
    "model.rotary_emb.inv_freq has different values": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "marked of model.layers.0 is 1; it was missing": lambda m: setattr(m.model.layers[0], "marked", 1),
    "config.marked of the model is True; it was missing": lambda m: setattr(m.config, "marked", True),
    "numbers[1] of model.norm is 7; it was 2": lambda m: m.model.norm.numbers.__setitem__(1, 7),
    "table['a'] of model.norm is a Linear; it was a Linear": lambda m: m.model.norm.table.update(a=nn.Linear(1, 1)),
    "lm_head.weight has different values": lambda m: (
        m.lm_head.weight.data.double().float().neg_() is None or m.lm_head.weight.data.neg_()
    ),
    "generation_config.max_length of the model is": lambda m: setattr(m.generation_config, "max_length", 77),
    "a gradient hook was left on lm_head.weight: _nothing": lambda m: m.lm_head.weight.register_hook(_nothing),
    "a post-accumulate-grad hook was left on lm_head.weight: _nothing": lambda m: (
        m.lm_head.weight.register_post_accumulate_grad_hook(_nothing)
    ),
    "a gradient hook that existed before is missing on model.norm.weight": lambda m: (
        m.model.norm.weight._backward_hooks.popitem()
    ),
    "the gradient of lm_head.weight has different values: the largest absolute difference is 1 at": lambda m: (
        m.lm_head.weight.grad.mul_(2)
    ),
    "scale of model.norm is a tensor with 3 at (1,); it was a tensor with 1 at (1,)": lambda m: (
        m.model.norm.scale.__setitem__(1, 3.0)
    ),
    "numbers[2] of model.norm is a tensor with 4 at (); it was a tensor with 3 at ()": lambda m: m.model.norm.numbers[
        2
    ].add_(1),
    "scale of model.norm is a Tensor; it was a Tensor": lambda m: setattr(m.model.norm, "scale", torch.ones(3)),
    "the model is a Other; it was a LlamaForCausalLM": lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
    "the state dict has different keys: missing ['lm_head.weight'], new []": lambda m: m._modules.pop("lm_head"),
}


@pytest.fixture()
def model() -> Any:
    model = tiny_model("llama")
    model.model.norm.numbers, model.model.norm.table = [1, 2, torch.tensor(3)], {"a": nn.Linear(1, 1)}
    model.model.norm.scale = torch.ones(3)
    model.model.norm.weight.register_hook(_nothing)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    for _ in range(2):
        model.model.norm.register_forward_hook(lambda *given: None)
    return model


@pytest.mark.parametrize("said", CHANGES)
def test_a_change_is_named(model: Any, said: str) -> None:
    before = ModelState(model)
    assert before.changes() == []
    CHANGES[said](model)
    assert [change for change in before.changes() if change.startswith(said)], before.changes()


def test_a_configuration_that_many_modules_hold_is_named_once(model: Any) -> None:
    before = ModelState(model)
    model.config.num_hidden_layers = 5
    (said,) = before.changes()
    assert re.search(r"config\.num_hidden_layers.*5.*6", said)


def test_nan_that_stays_is_no_change(model: Any) -> None:
    model.model.norm.weight.data[0] = torch.nan
    model.model.norm.epsilon = float("nan")
    before = ModelState(model)
    assert before.changes() == []
    model.model.norm.weight.data[1] = torch.nan
    assert len(before.changes()) == 1


def test_a_plain_tensor_that_each_forward_changes_is_no_trace(model: Any) -> None:
    before = ModelState(model)
    before.run_ignoring_changes(lambda: model.model.norm.scale.add_(1))
    model.model.norm.scale.add_(1)
    assert before.changes() == []


def test_sparse_gradients_are_compared() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 3])).sum().backward()
    before = ModelState(model)
    assert before.changes() == []
    model.weight.grad.mul_(2)
    (said,) = before.changes()
    assert "gradient of weight" in said


def test_the_sign_of_a_zero_is_a_change(model: Any) -> None:
    model.model.norm.weight.data[0] = 0.0
    before = ModelState(model)
    model.model.norm.weight.data[0] = -0.0
    (said,) = before.changes()
    assert re.search(r"model\.norm\.weight.*sign of a zero", said)


def test_tied_weights_are_looked_at_under_both_names() -> None:
    model: Any = tiny_model("opt")
    before = ModelState(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert [change.split(" is a different")[0] for change in before.changes()] == ["lm_head.weight"]
