"""Least-squares maps for windows, and for the last projection of a replacement, from moments alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.errors import StreamlineError
from streamline_hooks.precision import widen
from streamline_hooks.statistics import WindowMoments

RIDGES: tuple[float, ...] = tuple(10.0**e for e in (-8, -7, -6, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))


@dataclass(frozen=True)
class ClosedForm:
    """A least-squares map and how it was chosen.

    Attributes
    ----------
    map : torch.Tensor
        W of shape (features, features), float64, for x ↦ x + Wᵀx.
    ridge : float
        The penalty, in units of the mean eigenvalue of Σ w xxᵀ.
    held_out_error : float
        Mean relative squared error on the held-out moments, of the map that was fitted without them.
    removal_error : float
        The same for plain removal, W = 0.
    """

    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def solve(
    fit: WindowMoments,
    held_out: WindowMoments,
    ridges: Sequence[float] = RIDGES,
    *,
    rank: int | None = None,
    diagonal: bool = False,
) -> ClosedForm:
    """Solve for the W that minimises Σ w‖y − x − Wᵀx‖² + λ‖W‖², with λ chosen on held-out moments.

    Parameters
    ----------
    fit : WindowMoments
        To fit on.
    held_out : WindowMoments
        Of other sequences, to choose λ by. Once it is chosen they join the fit.
    ridges : sequence of float
        The λ to try, in units of the mean eigenvalue of Σ w xxᵀ, which makes them the same for every model.
    rank : int, optional
        The best W among those of this rank or less.
    diagonal : bool
        The best diagonal W, which is least squares feature by feature.

    Returns
    -------
    ClosedForm
        On the moments that it was fitted on, never above plain removal.

    Raises
    ------
    StreamlineError
        If either holds no token, the moments are not finite, or no W has the rank.

    Notes
    -----
    W(λ) = (Sxx + λI)⁻¹ Sxδ through one eigendecomposition, Sxx = V diag(s) Vᵀ. Its error on any moments is
    tr Sδδ − 2 tr WᵀSxδ + tr WᵀSxxW, which takes no pass over data; and, written with R = VᵀSxδ and c = 1/(s + λ) as
    tr S'δδ − 2 cᵀdiag(R S'δx V) + cᵀ(RRᵀ ∘ VᵀS'xxV)c, no product of matrices for another λ either.

    What a W of low rank loses against W(λ) is ‖(Sxx + λI)^½ (W(λ) − W)‖², so that the best is the truncated singular
    value decomposition in that metric, not the plain one: W(λ)VVᵀ with V the first eigenvectors of SδxW(λ)
    (reduced-rank regression; Izenman, J. Multivar. Anal. 5, 1975). It takes one more eigendecomposition for each λ.
    """
    for name, moments in (("fitted", fit), ("held-out", held_out)):
        if not moments.tokens:
            raise StreamlineError(f"The {name} moments hold no token; give more calibration sequences.")
        if not (torch.isfinite(moments.xx).all() and torch.isfinite(moments.xd).all()):
            raise StreamlineError(f"The {name} moments are not finite; look for NaN or overflow in the states.")
    if rank is not None and (diagonal or rank < 1):
        raise StreamlineError(
            f"No map has rank={rank}, diagonal={diagonal}; give a rank of 1 or more, or diagonal=True."
        )
    shaped = _diagonal_maps if diagonal else partial(ridge_maps, rank=rank)
    plain = rank is None and not diagonal
    errors = _errors(fit, held_out, ridges) if plain else [held_out.error(w) for w in shaped(fit, ridges)]
    best = min(range(len(errors)), key=errors.__getitem__)
    everything = copy.deepcopy(fit)
    everything.merge(held_out)
    chosen = next(shaped(everything, [ridges[best]]))
    return ClosedForm(chosen, ridges[best], errors[best], held_out.error(torch.zeros_like(fit.xd)))


def _rotated(moments: WindowMoments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return eigenvalues, eigenvectors and mean eigenvalue of Sxx, and Sxδ in that basis."""
    values, vectors = torch.linalg.eigh(moments.xx)
    values = values.clamp_min(0.0)
    return values, vectors, _positive(values.mean()), vectors.T @ moments.xd


def _errors(fit: WindowMoments, held_out: WindowMoments, ridges: Sequence[float]) -> list[float]:
    """Return the held-out error of the full map of each ridge."""
    values, vectors, mean, rotated = _rotated(fit)
    xx, xd = held_out.xx.to(vectors), held_out.xd.to(vectors)
    linear = (rotated * (vectors.T @ xd)).sum(1)
    square = (rotated @ rotated.T) * (vectors.T @ xx @ vectors)
    shrunk = torch.stack([1 / (values + ridge * mean) for ridge in ridges])
    totals = held_out.dd - 2 * shrunk @ linear + ((shrunk @ square) * shrunk).sum(1)
    return [float(total) / held_out.tokens for total in totals]


def ridge_maps(moments: WindowMoments, ridges: Sequence[float], rank: int | None = None) -> Iterator[Tensor]:
    """Yield the least-squares map for each ridge, optionally of low rank."""
    values, vectors, mean, rotated = _rotated(moments)
    for ridge in ridges:
        full = vectors @ (rotated / (values + ridge * mean)[:, None])
        if rank is None:
            yield full
        else:
            explained = moments.xd.T @ full
            kept = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:]
            yield full @ kept @ kept.T


def _diagonal_maps(moments: WindowMoments, ridges: Sequence[float]) -> Iterator[Tensor]:
    squares = moments.xx.diagonal()
    mean = _positive(squares.mean())
    for ridge in ridges:
        yield torch.diag(moments.xd.diagonal() / (squares + ridge * mean))


def _positive(mean: Tensor) -> Tensor:
    """Return the mean eigenvalue, or raise if it is zero."""
    if mean == 0:
        raise StreamlineError("Every state that enters the window is zero; there is nothing to fit.")
    return mean


class ProjectionMoments(WindowMoments):
    """Moments of the features f before a last projection and of its error e = y − module(x), of width `outputs`.

    With w = 1/‖y‖² it sums Σ w ffᵀ, Σ w feᵀ, Σ w‖e‖² and Σ w‖y − x‖², the last of plain removal. The change Δ of the
    projection minimises Σ w‖e − Δᵀf‖² + λ‖Δ‖², so the ridge pulls towards the present weights. `inputs` counts one
    feature for a bias, and is 0 without a projection.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs)
        self.xd = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.removed = 0.0

    def add(self, features: Tensor, made: Tensor, entering: Tensor, leaving: Tensor) -> None:
        """Add tokens: features (tokens, inputs), and states of shape (tokens, outputs)."""
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
        """Add the sums of other tokens."""
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
        """Mean relative squared error of the replacement as it is."""
        return self.dd / self.tokens

    @property
    def removal(self) -> float:
        """Mean relative squared error of plain removal."""
        return self.removed / self.tokens


def solve_projection(fit: ProjectionMoments, held_out: ProjectionMoments) -> ClosedForm:
    """Solve for the change Δ of a last projection, with the ridge chosen on held-out moments.

    If the error on all moments is above that of plain removal, smaller ridges are tried.
    """
    solution = solve(fit, held_out)
    everything = merged(fit, held_out)
    smaller = [ridge for ridge in sorted(RIDGES, reverse=True) if ridge < solution.ridge]
    while smaller and everything.error(solution.map) > everything.removal:
        solution = solve(fit, held_out, [smaller.pop(0)])
    return solution


def merged(fit: ProjectionMoments, held_out: ProjectionMoments) -> ProjectionMoments:
    """Return the sums of both parts."""
    everything = ProjectionMoments(*fit.xd.shape)
    for part in (fit, held_out):
        everything.merge(part)
    return everything


def change(projection: nn.Module, map_: Tensor) -> None:
    """Add Δ of shape (inputs, features) to a Linear or Conv1D; its last row belongs to the bias, if there is one."""
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        rows = weight.shape[0] if isinstance(projection, Conv1D) else weight.shape[1]
        added = map_[:rows] if isinstance(projection, Conv1D) else map_[:rows].T
        weight.copy_(weight.double() + added.to(weight.device))
        if isinstance(bias, Tensor):
            bias.copy_(bias.double() + map_[rows].to(bias.device))


def solvable(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer with floating-point weights."""
    weight = getattr(module, "weight", None)
    plain = type(module) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    return plain and isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
