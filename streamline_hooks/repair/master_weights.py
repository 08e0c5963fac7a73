"""Weights in half precision are trained as float32 copies: a step is smaller than what they can tell apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_WIDE = (torch.float32, torch.float64)


class MasterWeights:
    """What an optimiser changes: the parameters themselves, or copies of those that are narrower than float32.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        Those of the model.

    Attributes
    ----------
    masters : dict of str to torch.nn.Parameter
        Of each its float32 copy, or itself.

    Examples
    --------
    >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> weights = MasterWeights({"weight": weight})
    >>> weight.grad = torch.ones(1, dtype=torch.bfloat16)
    >>> weights.collect()
    >>> optimiser = torch.optim.SGD(weights.masters.values(), lr=1e-3)
    >>> for _ in range(4):
    ...     optimiser.step()
    >>> weights.hand_on()
    >>> round(weights.masters["weight"].item(), 4), weight.item()
    (0.996, 0.99609375)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: p if p.dtype in _WIDE else nn.Parameter(p.detach().to(torch.float32))
            for name, p in self.parameters.items()
        }

    def collect(self) -> None:
        """Add the gradients of the model's parameters to those of the copies."""
        for parameter, master in self._narrow():
            if parameter.grad is not None:
                given = parameter.grad.to(torch.float32)
                master.grad = given if master.grad is None else master.grad.add_(given)
                parameter.grad = None

    def hand_on(self) -> None:
        """Give the model's parameters the values of the copies."""
        with torch.no_grad():
            for parameter, master in self._narrow():
                parameter.copy_(master)

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take values up again, by name."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(values[name])
        self.hand_on()

    def _narrow(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = ((self.parameters[name], master) for name, master in self.masters.items())
        return [(parameter, master) for parameter, master in pairs if master is not parameter]
