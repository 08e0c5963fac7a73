"""The last projection of a stand-in by least squares, on the features that it has or has inherited.

A stand-in that cannot hold the linear map of the closed form (an inherited block, a network without a map beside it)
is run beside the window, on the states that enter it. What it lacks, e = y − module(x), is explained by the features f
that its last projection receives: the change Δ of that projection minimises Σ w‖e − Δᵀf‖² + λ‖Δ‖², so that the ridge
pulls to the weights that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.precision import widen
from streamline_hooks.repair.closed_form import RIDGES, ClosedForm, solve
from streamline_hooks.statistics import WindowMoments


class ProjectionMoments(WindowMoments):
    """Weighted second moments of the features f before a last projection and of what the stand-in lacks.

    With e = y − module(x), y the state after the window and each token's weight w = 1/‖y‖², it sums Σ w ffᵀ, Σ w feᵀ
    and Σ w‖e‖², so that `error` tells the mean relative squared error of any change Δ of the projection; and
    Σ w‖y − x‖², which is that of plain removal.

    Parameters
    ----------
    inputs : int
        Features before the projection, with one for its bias; none where there is no projection.
    outputs : int
        Width of the residual stream.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs)
        self.xd = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.removed = 0.0

    def add(self, features: Tensor, made: Tensor, entering: Tensor, leaving: Tensor) -> None:
        """Add tokens.

        Parameters
        ----------
        features : torch.Tensor
            Of shape (tokens, inputs).
        made, entering, leaving : torch.Tensor
            What the stand-in makes, and the states before and after the window, of shape (tokens, outputs).
        """
        x, y = widen(entering), widen(leaving)
        norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        f, e = widen(features) / norm, (y - widen(made)) / norm
        self.xx, self.xd = self.xx.to(f.device), self.xd.to(f.device)
        self.xx.addmm_(f.T, f)
        self.xd.addmm_(f.T, e)
        self.dd += float(e.square().sum())
        self.removed += float(((y - x) / norm).square().sum())
        self.tokens += len(y)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        super().merge(other)
        self.removed += other.removed

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a file."""
        return {**super().state_dict(), "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        super().load_state_dict(state)
        self.removed = float(state["removed"])

    @property
    def unchanged(self) -> float:
        """Mean relative squared error of the stand-in as it is."""
        return self.dd / self.tokens

    @property
    def removal(self) -> float:
        """Mean relative squared error of plain removal."""
        return self.removed / self.tokens


def solve_projection(fit: ProjectionMoments, held_out: ProjectionMoments) -> ClosedForm:
    """Solve for the change of a last projection; its ridge is chosen on held-out moments.

    Returns
    -------
    ClosedForm
        With Δ of shape (inputs, features) as its map. On the moments that it was fitted on, its error is not above
        that of the stand-in as it is; and where a smaller ridge than the best on the held-out moments brings it below
        plain removal, not above that either.
    """
    solution = solve(fit, held_out)
    everything = merged(fit, held_out)
    smaller = [ridge for ridge in sorted(RIDGES, reverse=True) if ridge < solution.ridge]
    while smaller and everything.error(solution.map) > everything.removal:
        solution = solve(fit, held_out, [smaller.pop(0)])
    return solution


def merged(fit: ProjectionMoments, held_out: ProjectionMoments) -> ProjectionMoments:
    """The sums of both parts of the tokens."""
    everything = ProjectionMoments(*fit.xd.shape)
    for part in (fit, held_out):
        everything.merge(part)
    return everything


def change(projection: nn.Module, map_: Tensor) -> None:
    """Add a solution to a last projection.

    Parameters
    ----------
    projection : torch.nn.Linear or Conv1D
    map_ : torch.Tensor
        Δ of shape (inputs, features), the last row of which is for the bias where there is one.
    """
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        rows = weight.shape[0] if isinstance(projection, Conv1D) else weight.shape[1]
        added = map_[:rows] if isinstance(projection, Conv1D) else map_[:rows].T
        weight.copy_(weight.double() + added.to(weight.device))
        if isinstance(bias, Tensor):
            bias.copy_(bias.double() + map_[rows].to(bias.device))


def solvable(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer with weights of its own in floating point."""
    weight = getattr(module, "weight", None)
    plain = type(module) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    return plain and isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
