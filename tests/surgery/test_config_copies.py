"""Which modules and configurations receive the copy of a changed configuration."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.surgery.config_copies import root_of_config
from tests.surgery.test_own_config import Both, PlainConfig, PlainModel, pair
from tests.tiny_models import BLOCKS


@pytest.mark.parametrize("container", [SimpleNamespace, argparse.Namespace])
def test_a_configuration_that_contains_the_changed_one_is_copied_too(container: Any) -> None:
    config, state = PlainConfig(), torch.ones(1, 2, 8)
    settings = container(model=config, seed=1)
    teacher, student = PlainModel(config), PlainModel(config)
    teacher.settings, student.settings = settings, settings
    with LayerSurgeon(student) as surgeon:
        surgeon.remove([1])
        assert student.settings.model is student.config and student.config.n_layer == 3
        assert teacher.settings is settings and settings.model is config and config.n_layer == 4
        teacher(state)
    assert student.settings is settings and student.config is config


def test_the_model_inside_a_module_of_several_models_is_the_root_of_its_configuration() -> None:
    teacher, student = pair()
    both = Both(teacher, student)
    assert root_of_config(find_stack(both, "student.model.layers")) is student
    assert root_of_config(find_stack(student)) is student
    assert root_of_config(find_stack(student.model)) is student.model


class Wrapper(nn.Module):
    """Holds the configuration of the model inside it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_module_around_the_model_has_the_configuration_of_the_committed_model() -> None:
    teacher, student = pair()
    wrapper = Wrapper(student)
    with LayerSurgeon(student) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    assert wrapper.config is student.config is not teacher.config
    assert wrapper.config.num_hidden_layers == BLOCKS - 2
