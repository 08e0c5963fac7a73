"""Functions that name the block stacks of models which the library does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.modeling import STACK_FINDERS, BlockStack, find_stacks, register_stack_finder
from streamline_hooks.testing import assert_restores
from tests.tiny_models import tiny_model


class Cell(nn.Module):
    """A block without modules inside, which the library's search takes for a bare layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.0 + number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * x


class Grown(nn.Module):
    """A model with its blocks below ``trunk.cells``, counted by ``config.cells``."""

    def __init__(self, cells: int = 5) -> None:
        super().__init__()
        self.config = SimpleNamespace(cells=cells)
        self.trunk = nn.ModuleDict({"cells": nn.ModuleList(map(Cell, range(cells)))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for cell in self.trunk["cells"]:
            x = cell(x)
        return x


@pytest.fixture
def finder() -> Iterator[Callable[..., Any]]:
    """Registers a finder, which is removed after the test."""

    def register(function: Callable[[Any], Any], name: str = "test-finder") -> None:
        register_stack_finder(name, function)
        names.append(name)

    names: list[str] = []
    yield register
    for name in names:
        STACK_FINDERS.pop(name)


def cells_of(model: Any) -> list[BlockStack] | None:
    if not isinstance(model, Grown):
        return None
    return [BlockStack.at(model, "trunk.cells", model.config, "cells")]


def test_surgery_on_a_stack_that_only_a_finder_knows(finder: Callable[..., Any]) -> None:
    model = Grown()
    with pytest.raises(StreamlineError, match=r"No stack.*Grown.*register_stack_finder"):
        find_stack(model)
    finder(cells_of)
    stack = find_stack(model)
    assert (stack.path, len(stack), stack.config, stack.count_attribute) == ("trunk.cells", 5, model.config, "cells")
    assert find_stacks(model)[0].container is stack.container and stack.has_its_config()
    for path in (None, "trunk.cells"):  # the library asks again by path, and must get the same configuration
        assert find_stack(model, path).count_attribute == "cells"
    x = torch.ones(1, 2, 4)
    before = model(x)
    assert_restores(model, batch={"x": x})
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.remove(range(1, 3))
        assert model.config.cells == len(find_stack(model)) == 3
        torch.testing.assert_close(model(x), x * 2 * 5 * 6)
    assert torch.equal(model(x), before) and model.config.cells == 5
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    assert model.config.cells == len(model.trunk["cells"]) == len(find_stack(model)) == 3


def test_a_stack_whose_configuration_has_another_count_has_not_its_config(finder: Callable[..., Any]) -> None:
    finder(cells_of)
    model = Grown()
    stack = find_stack(model)
    model.config.cells = 4
    assert not stack.has_its_config()
    model.config = SimpleNamespace(cells=5)
    assert not stack.has_its_config()
    model.config = SimpleNamespace(trunk=stack.config)  # a part of a configuration
    stack.config.cells = 5
    assert stack.has_its_config()


def test_a_finder_comes_before_the_search_and_only_for_its_models(finder: Callable[..., Any]) -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = (nn.ModuleList(nn.ModuleList([nn.Linear(n, n)]) for _ in range(3)) for n in (9, 2))

    def of_marked(model: Any) -> Any:
        return [BlockStack.at(model, path) for path in ("small", "large")] if isinstance(model, Marked) else None

    model, llama = Marked(), tiny_model("llama")
    finder(lambda model: [], "test-none")
    finder(of_marked)
    finder(lambda model: pytest.fail("the first that knows it is enough") if isinstance(model, Marked) else None, "z")
    assert find_stack(model).path == "small" and [s.path for s in find_stacks(model)] == ["small", "large"]
    assert find_stack(model, "large").path == "large"
    assert find_stack(llama).path == "model.layers" and len(find_stacks(llama)) == 1


def other_blocks(model: Any) -> Any:
    return [replace(cells_of(model)[0], blocks=tuple(map(Cell, range(5))))]  # type: ignore[index]


def shared(model: Any) -> Any:
    model.trunk["cells"][3] = model.trunk["cells"][0]
    return cells_of(model)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "error": (lambda model: model.there_is_none, "AttributeError.*there_is_none"),
    "one": (lambda model: cells_of(model)[0], "returned BlockStack. Expected a list of BlockStack or None"),  # type: ignore[index]
    "paths": (lambda model: ["trunk.cells"], "returned str in a list. Expected.*Return .BlockStack.at"),
    "another model's": (lambda model: cells_of(Grown()), "at 'trunk.cells' that does not match"),
    "path": (lambda model: [replace(cells_of(model)[0], path="trunk")], "at 'trunk' that does not match"),  # type: ignore[index]
    "no list": (lambda model: [BlockStack.at(model, "trunk")], "'trunk' is not a block list of Grown.*ModuleList"),
    "ancestors": (lambda model: [replace(cells_of(model)[0], ancestors=(model,))], "does not match the model"),  # type: ignore[index]
    "other blocks": (other_blocks, "5 blocks for 'trunk.cells', which contains 5 other"),
    "fewer": (lambda model: [replace(s, blocks=s.blocks[1:]) for s in cells_of(model) or ()], "4 blocks.*contains 5"),
    "shared": (shared, "same module at several positions"),
    "count": (lambda model: [BlockStack.at(model, "trunk.cells", SimpleNamespace(n=3), "n")], "'n'.*does not equal.*5"),
    "no count": (lambda model: [BlockStack.at(model, "trunk.cells", model.config)], "count_attribute=None"),
    "its count": (
        lambda model: [replace(cells_of(model)[0], config=SimpleNamespace(cells=9))],  # type: ignore[index]
        "'cells' of SimpleNamespace does not equal the number",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_warned_of_and_not_used(case: str, finder: Callable[..., Any]) -> None:
    function, text = WRONG[case]
    finder(function)
    model = Grown()
    model.layers = nn.ModuleList(nn.ModuleDict({"inner": nn.Linear(4, 4)}) for _ in range(2))
    expected = rf"stack finder 'test-finder' failed for Grown: .*{text}.*del STACK_FINDERS\['test-finder'\]"
    with pytest.warns(UserWarning, match=expected), pytest.raises(StreamlineError, match="No stack"):
        find_stack(model)


def test_names_of_finders() -> None:
    with pytest.raises(StreamlineError, match="'a b' is not a valid name"):
        register_stack_finder("a b", cells_of)
    with pytest.raises(StreamlineError, match="finder=5.*Expected StackFinder"):
        register_stack_finder("five", 5)  # type: ignore[arg-type]
