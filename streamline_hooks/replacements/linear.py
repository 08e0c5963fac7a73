"""Linear replacements of the hidden state or of the normalized hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import StreamlineError
from streamline_hooks.replacements.registry import register_module


@register_module("linear")
class LinearReplacement(nn.Module):
    """Linear map on a residual path, h ↦ h + hW.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    rank : int, optional
        Rank of W, which is then the product of a (d, rank) and a (rank, d) matrix. Default: full rank.
    diagonal : bool
        Whether W is diagonal, so that each feature is scaled.

    Raises
    ------
    StreamlineError
        If a size is not a positive int, the rank exceeds the features, or a rank is combined with `diagonal`.

    Notes
    -----
    The initial W is zero, which equals plain removal; `start_at` sets W to a closed-form solution. In a low-rank map
    only the second factor is initially zero, because two zero factors would receive no gradient. The module has d²
    parameters (2·d·rank with a rank, d if diagonal), needs 2 FLOPs per token for each, and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> state = torch.randn(2, 3, 8)
    >>> torch.equal(LinearReplacement(8, rank=2)(state), state)
    True
    """

    def __init__(self, features: int, rank: int | None = None, diagonal: bool = False) -> None:
        super().__init__()
        sizes = [features] if rank is None else [features, rank]
        whole = all(type(size) is int and size >= 1 for size in sizes) and isinstance(diagonal, bool)
        if not whole or (rank is not None and (diagonal or rank > features)):
            raise StreamlineError(
                f"features={features!r}, rank={rank!r}, diagonal={diagonal!r} is not a valid linear map. Expected "
                "integers of at least 1, a rank of at most features, and no rank with diagonal=True. Pass the width of "
                "the model's hidden states as features."
            )
        self.features, self.rank, self.diagonal = features, rank, diagonal
        self.projection: nn.Module
        if diagonal:
            self.projection = Diagonal(features)
        elif rank is None:
            self.projection = nn.Linear(features, features, bias=False)
            nn.init.zeros_(self.projection.weight)
        else:
            first, second = nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=False)
            nn.init.zeros_(second.weight)
            self.projection = nn.Sequential(first, second)

    @classmethod
    def from_map(cls, map_: Tensor, rank: int | None = None, diagonal: bool = False) -> LinearReplacement:
        """Build a replacement from W of shape (features, features), see `start_at`."""
        if not isinstance(map_, Tensor) or map_.ndim != 2 or map_.shape[0] != map_.shape[1]:
            shape = tuple(map_.shape) if isinstance(map_, Tensor) else type(map_).__name__
            raise StreamlineError(
                f"map_={shape} is not a map. Expected a tensor of shape (features, features). Pass W."
            )
        module = cls(map_.shape[0], rank, diagonal)
        module.start_at(map_)
        return module

    def start_at(self, map_: Tensor) -> None:
        """Set the map to W of shape (features, features); a diagonal map takes the diagonal of W.

        A low-rank map takes the truncated singular value decomposition of W. This does not minimize the error that W
        was fitted with; `streamline_hooks.repair.solve_least_squares` returns the low-rank map that does.
        """
        with torch.no_grad():
            if isinstance(self.projection, Diagonal):
                self.projection.weight.copy_(map_.diagonal())
            elif isinstance(self.projection, nn.Linear):
                self.projection.weight.copy_(map_.T)
            else:
                left, values, right = torch.linalg.svd(map_.detach().double().cpu())
                # The singular values scale the second factor: where they are zero, it can still be trained.
                scaled = values[: self.rank, None] * right[: self.rank]
                for layer, matrix in zip(self.projection.children(), (left[:, : self.rank], scaled), strict=True):
                    layer.get_parameter("weight").copy_(matrix.T)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token: two per weight of the map."""
        return 2 * sum(p.numel() for p in self.projection.parameters())

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        shape = {"diagonal": True} if self.diagonal else {} if self.rank is None else {"rank": self.rank}
        return {"features": self.features, **shape}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(state)
        return state + mapped


class Diagonal(nn.Module):
    """Multiply each feature by a weight, initially zero."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, state: Tensor) -> Tensor:
        """Map (..., features) to the same shape."""
        return state * self.weight


@register_module("normed_linear")
class NormedLinearReplacement(nn.Module):
    """Linear map of the normalized state on a residual path, h ↦ h + RMSNorm(h)W.

    As a replacement of an attention branch, llama.cpp runs it as linear attention (architecture ``deci``).

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    eps : float
        Epsilon of the norm.

    Notes
    -----
    Initially W is zero and the weights of the norm are one. The module has d² + d parameters, needs 2·d² FLOPs per
    token, and takes no cache slot.

    Examples
    --------
    >>> import torch
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
        """Build a replacement from W of shape (features, features) and norm weights of shape (features,)."""
        module = cls(len(map_), eps)
        with torch.no_grad():
            module.projection.weight.copy_(map_.T)
            module.norm.weight.copy_(weight)
        return module

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token: two per weight of the map."""
        return 2 * self.projection.weight.numel()

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        return {"features": self.projection.in_features, "eps": self.norm.eps}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(self.norm(state))
        return state + mapped
