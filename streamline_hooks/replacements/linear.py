"""Linear maps on the residual stream, of the state or of the normalised state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.replacements.registry import register_module


@register_module("linear")
class LinearReplacement(nn.Module):
    """The residual path and a linear map beside it, h ↦ h + hW.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    rank : int, optional
        Make W the product of a (d, rank) and a (rank, d) matrix.
    diagonal : bool
        Make W diagonal: each feature is scaled.

    Raises
    ------
    StreamlineError
        If the rank is not between 1 and d, or a diagonal map is given one.

    Notes
    -----
    It starts at W = 0, the plain removal of what it stands for; `start_at` starts it at a closed-form solution. Of two
    factors only the second is zero then, or neither would ever get a gradient. Full it has d² parameters, of low rank
    2·d·rank, diagonal d; it costs 2 FLOPs a token for each and takes no cache slot.

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
        if any(type(size) is not int or size < 1 for size in sizes) or not isinstance(diagonal, bool):
            raise StreamlineError(
                f"features={features!r}, rank={rank!r}, diagonal={diagonal!r} make no linear map. Expected whole "
                "numbers above 0, and True or False. Pass the width of the model's states as features."
            )
        if rank is not None and (diagonal or not 1 <= rank <= features):
            raise StreamlineError(
                f"A linear map of {features} features cannot have rank={rank!r}, diagonal={diagonal!r}; expected a "
                f"rank from 1 to {features}, or a diagonal map without one."
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
        """Start at a given W of shape (features, features), in h + hW; see `start_at`."""
        if not isinstance(map_, Tensor) or map_.ndim != 2 or map_.shape[0] != map_.shape[1]:
            shape = tuple(map_.shape) if isinstance(map_, Tensor) else type(map_).__name__
            raise StreamlineError(f"map_={shape} is no map. Expected a tensor of shape (features, features). Pass W.")
        module = cls(map_.shape[0], rank, diagonal)
        module.start_at(map_)
        return module

    def start_at(self, map_: Tensor) -> None:
        """Make the map W, or what is nearest to it among the maps that this one can be.

        Parameters
        ----------
        map_ : torch.Tensor
            W of shape (features, features), for h + hW. Of low rank, W itself if its rank is no higher, else its
            truncated singular value decomposition, which is not the best one in the error that W was fitted by:
            `streamline_hooks.repair.solve` gives that. Diagonal, the diagonal of W.
        """
        with torch.no_grad():
            if isinstance(self.projection, Diagonal):
                self.projection.weight.copy_(map_.diagonal())
            elif isinstance(self.projection, nn.Linear):
                self.projection.weight.copy_(map_.T)
            else:
                left, values, right = torch.linalg.svd(map_.detach().double().cpu())
                # The second factor is scaled: where it is zero it can still grow.
                shrunk = values[: self.rank, None] * right[: self.rank]
                for layer, matrix in zip(self.projection.children(), (left[:, : self.rank], shrunk), strict=True):
                    layer.get_parameter("weight").copy_(matrix.T)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * sum(p.numel() for p in self.projection.parameters())

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        shape = {"diagonal": True} if self.diagonal else {} if self.rank is None else {"rank": self.rank}
        return {"features": self.features, **shape}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.projection(state)
        return state + mapped


class Diagonal(nn.Module):
    """Each feature times its own weight, all zero at first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, state: Tensor) -> Tensor:
        """Map (..., features) to the same shape."""
        return state * self.weight


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
