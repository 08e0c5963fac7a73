"""A linear map on the residual stream: h + hW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.replacements.registry import register_replacement


@register_replacement("linear")
class LinearReplacement(nn.Module):
    """The residual path and a full linear map beside it, h ↦ h + hW.

    Parameters
    ----------
    features : int
        Width of the residual stream.

    Notes
    -----
    It starts at W = 0, the plain removal of what it stands for; `from_map` starts it at a closed-form solution. It
    has features² parameters, costs 2·features² FLOPs a token and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> state = torch.randn(2, 3, 8)
    >>> torch.equal(LinearReplacement(8)(state), state)
    True
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, features, bias=False)
        nn.init.zeros_(self.projection.weight)

    @classmethod
    def from_map(cls, map_: Tensor) -> LinearReplacement:
        """Start at a given W of shape (features, features), in h + hW."""
        module = cls(map_.shape[0])
        with torch.no_grad():
            module.projection.weight.copy_(map_.T)
        return module

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.projection.in_features}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        return state + self.projection(state)
