"""Random weights that matter: large enough that every block shows in the logits, small enough to stay finite."""

from __future__ import annotations

import math

import torch
from torch import nn

_NOISE = 0.05  # on what is not a matrix, and on what keeps the values it was made with
_GAIN = 0.2 * math.sqrt(32)  # a matrix of 32 inputs gets a standard deviation of 0.2


def redraw(model: nn.Module, seed: int) -> None:
    """Draw the weights of a model again.

    Matrices are drawn from a normal distribution whose standard deviation is 0.2 for 32 inputs, and falls with the
    square root of their number. Vectors (norms, biases, gates), and tensors whose values all have one sign (which
    then means something: the decay of a state space, a mixing weight), keep their values and get a little noise.
    Frozen parameters, such as sinusoidal positions, stay.

    Parameters
    ----------
    model : torch.nn.Module
        The model, changed in place.
    seed : int
        Of a generator of its own; the global random state is neither read nor changed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
        for parameter in model.parameters():
            if not (parameter.is_floating_point() and parameter.requires_grad):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.ndim > 1 and not _of_one_sign(parameter):
                parameter.copy_(noise * deviation(owners[id(parameter)], parameter))
            else:
                parameter.copy_(parameter.float() + _NOISE * noise)


def deviation(owner: nn.Module, weight: torch.Tensor) -> float:
    """The standard deviation that a matrix is drawn with, from 0.1 to 0.5."""
    convolution = isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    inputs = weight[0].numel() if convolution else weight.shape[-1]
    return min(max(_GAIN / math.sqrt(inputs), 0.1), 0.5)


def _of_one_sign(values: torch.Tensor) -> bool:
    return bool(values.any()) and bool((values >= 0).all() or (values <= 0).all())
