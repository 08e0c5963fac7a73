"""Ctrl-C at any point of closing or committing leaves the model restored or committed, and open to further surgery."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery.session import refuse_open_surgery
from tests.surgery.interruptions import interrupted_at
from tests.tiny_models import WIDTH, Nudge, tiny_model, tokens


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def state(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    rows: list[Any] = [type(model), type(config), id(config), {} if config is None else dict(vars(config))]
    for name, module in model.named_modules():
        rows.append((name, id(module), module.training, list(vars(module)), list(module._modules)))
        rows += [list(hooks.items()) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        rows.append(dict(module._forward_pre_hooks_with_kwargs))
        rows += [(key, value) for key, value in vars(module).items() if type(value) is int]
        rows += [id(value) for key, value in vars(module).items() if key == "config"]
    rows += [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return rows


def models() -> dict[str, Callable[[], tuple[nn.Module, int, int]]]:
    """A model, and at every how many lines closing and committing are interrupted; all of them take minutes."""
    return {
        "plain": lambda: (nn.Sequential(*(PlainBlock() for _ in range(5))).eval(), 3, 12),
        "llama": lambda: (tiny_model("llama"), 197, 3988),
    }


def whole(model: nn.Module) -> nn.Module:
    """A stack has to be inside of something."""
    if not isinstance(model, nn.Sequential):
        return model
    outer = nn.Module()
    outer.blocks = model
    return outer


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", models().values(), ids=models())
def test_closing(make: Callable[[], tuple[nn.Module, int, int]]) -> None:
    inner, stride, _ = make()
    model, line, reached = whole(inner), 2, True  # the first line is the `try` that guards the others
    with LayerSurgeon(model, probe=False) as surgeon:
        for k in (1, 2, 4, len(surgeon.stack)):
            surgeon.insert(k, Nudge(seed=k))
        surgeon.commit()
    while reached:
        before = state(model)
        surgeon = LayerSurgeon(model, probe=False)
        surgeon.__enter__()
        surgeon.replace(range(1, 3), Nudge())  # with the splice between its blocks; those before 1 and 4 move
        surgeon.insert(3, Nudge())
        surgeon.insert(4, surgeon.stack[0])
        reached = interrupted_at(line, lambda surgeon=surgeon: surgeon.__exit__(None, None, None))
        assert state(model) == before, line
        refuse_open_surgery(find_stack(model), "test")
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.commit()
        line += stride
    assert line > 100


@pytest.mark.parametrize("make", models().values(), ids=models())
def test_committing(make: Callable[[], tuple[nn.Module, int, int]]) -> None:
    line, reached, outcomes = 1, True, set()
    while reached:
        inner, _, stride = make()
        model = whole(inner)
        before, length = state(model), len(find_stack(model))

        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.replace([1], LinearReplacement(WIDTH))
            reached = interrupted_at(line, surgeon.commit)
            with suppress(StreamlineError):  # it is committed, and closed
                surgeon.remove([2])
                assert 2 in surgeon.plan.removed, line
        outcomes.add(len(find_stack(model)))
        assert len(find_stack(model)) in (length, length - 1)
        if len(find_stack(model)) == length:
            assert state(model) == before, line
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.remove([2])
            surgeon.commit()
        if hasattr(model, "config"):
            says = model.config.streamline_hooks
            spliced = len(find_stack(model)) == length - 2
            assert len(says["history"]) == 1 + spliced and len(says["splices"]) == int(spliced), line
            assert model.config.num_hidden_layers == len(find_stack(model))
            assert type(model).__name__.startswith("Streamlined") is spliced
            model(tokens(1, 4))
        line += stride
    assert outcomes == {length, length - 1}


def test_closing_twice_does_nothing() -> None:
    model = tiny_model("llama")
    surgeon = LayerSurgeon(model)
    with surgeon:
        surgeon.remove([1])
    before = state(model)
    with LayerSurgeon(model) as other:
        other.remove([2])
        inside = state(model)
        surgeon.__exit__(None, None, None)
        assert state(model) == inside
    assert state(model) == before
