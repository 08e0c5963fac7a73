"""Parameters that are gone are gone from all that an optimiser keeps beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamline_hooks.in_training.progressive_removal import ProgressiveRemoval, drop_parameters
from tests.tiny_models import tiny_model


def test_the_names_beside_the_parameters_are_those_of_what_is_left() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    optimizer = torch.optim.SGD(
        [{"params": list(model[:2].named_parameters())}, {"params": list(model[2:].named_parameters())}], lr=0.1
    )
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this version of torch keeps no names")
    names = {id(parameter): name for group in optimizer.param_groups for parameter, name in pairs(group)}
    drop_parameters(optimizer, [*model[1].parameters(), *model[2].parameters()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == [
        ["0.weight", "0.bias"],
        ["3.weight", "3.bias"],
    ]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_names_are_those_of_the_shortened_model(prefix: str) -> None:
    """By which a state that is saved is read again."""
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW([(f"{prefix}{name}", parameter) for name, parameter in model.named_parameters()])
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this version of torch keeps no names")
    removal = ProgressiveRemoval(model, {1: range(1, 2), 2: range(3, 5)}, optimizer)
    removal.step(1), removal.step(2)
    names = {parameter: f"{prefix}{name}" for name, parameter in model.named_parameters()}
    group = optimizer.param_groups[0]
    assert group["param_names"] == [names[parameter] for parameter in group["params"]]
    assert set(group["params"]) == set(names)


def pairs(group: dict[str, list]) -> zip:
    return zip(group["params"], group["param_names"], strict=True)


def test_an_optimiser_without_names_gains_none() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drop_parameters(optimizer, [model.bias])
    assert optimizer.param_groups[0]["params"] == [model.weight]
    assert "param_names" not in optimizer.param_groups[0]
