"""Weights that Accelerate has offloaded are read from its hooks."""

from __future__ import annotations

import accelerate
import torch
from torch import Tensor, nn

from streamline_hooks.core import load_offloaded_weights
from streamline_hooks.core.devices import ComputedWeights, offload_hooks


class Scaled(nn.Module):
    """A model that has a parameter outside its submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


def test_edited_weights_of_a_model_with_a_parameter_outside_its_submodules_are_read() -> None:
    model = Scaled()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected["inner.weight"].neg_()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for part, hook in offload_hooks(model):
        if part is model.inner:
            hook.weights_map = ComputedWeights(hook.weights_map, "weight", torch.neg)
    weights = load_offloaded_weights(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
