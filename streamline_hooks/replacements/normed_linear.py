"""A linear map of the normalised state beside the residual path: h + RMSNorm(h)W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.replacements.registry import register_module


@register_module("normed_linear")
class NormedLinearReplacement(nn.Module):
    """The residual path and a linear map of the normalised state beside it, h ↦ h + RMSNorm(h)W.

    A branch of a pre-norm block reads the normalised state; what stands in its place can do so too. Engines know it as
    a block's attention that is linear (``deci`` in llama.cpp).

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    eps : float
        Of the norm.

    Notes
    -----
    It starts at W = 0, and its norm at weights of one. It has d² + d parameters, costs 2·d² FLOPs a token, and takes no
    cache slot.

    Examples
    --------
    >>> state = torch.randn(2, 3, 8)
    >>> torch.equal(NormedLinearReplacement(8)(state), state)
    True
    """

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, eps)
        self.projection = nn.Linear(features, features, bias=False)
        nn.init.zeros_(self.projection.weight)

    @classmethod
    def from_map(cls, map_: Tensor, weight: Tensor, eps: float) -> NormedLinearReplacement:
        """Start at a given W of shape (features, features), and a norm's weights of shape (features,)."""
        module = cls(len(map_), eps)
        with torch.no_grad():
            module.projection.weight.copy_(map_.T)
            module.norm.weight.copy_(weight)
        return module

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.projection.weight.numel()

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.projection.in_features, "eps": self.norm.eps}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(self.norm(state))
        return state + mapped
