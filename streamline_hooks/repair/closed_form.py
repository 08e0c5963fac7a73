"""The best linear repair of a window, from its moments alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
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
    """Eigenvalues, eigenvectors and mean eigenvalue of Sxx, and Sxδ in that basis."""
    values, vectors = torch.linalg.eigh(moments.xx)
    values = values.clamp_min(0.0)
    return values, vectors, _positive(values.mean()), vectors.T @ moments.xd


def _errors(fit: WindowMoments, held_out: WindowMoments, ridges: Sequence[float]) -> list[float]:
    """The held-out error of each ridge's full map."""
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
    """The mean eigenvalue, unless there is nothing to fit."""
    if mean == 0:
        raise StreamlineError("Every state that enters the window is zero; there is nothing to fit.")
    return mean
