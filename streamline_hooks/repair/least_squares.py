"""Solve for the least-squares map of a window, or for the last projection of a replacement, from moments."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.core import StreamlineError, to_float64
from streamline_hooks.modeling import sum_order_tolerance
from streamline_hooks.statistics import WindowMoments

RIDGES: tuple[float, ...] = tuple(10.0**e for e in (-8, -7, -6, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))


@dataclass(frozen=True)
class ClosedForm:
    """A least-squares map with its ridge and its errors.

    Attributes
    ----------
    map : torch.Tensor
        W of shape (features, features), float64, for x ↦ x + Wᵀx.
    ridge : float
        The chosen penalty, in units of the mean eigenvalue of Σ w xxᵀ.
    held_out_error : float
        Mean relative squared error on the held-out moments of the map fitted without them.
    removal_error : float
        Mean relative squared error of plain removal, W = 0, on the held-out moments.

    Examples
    --------
    >>> import torch
    >>> solution = ClosedForm(torch.zeros(4, 4), ridge=1e-3, held_out_error=0.2, removal_error=0.5)
    >>> solution.held_out_error < solution.removal_error
    True
    """

    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def solve_least_squares(
    fit: WindowMoments,
    held_out: WindowMoments,
    ridges: Sequence[float] = RIDGES,
    *,
    rank: int | None = None,
    diagonal: bool = False,
) -> ClosedForm:
    """Solve for the W that minimizes Σ w‖y − x − Wᵀx‖² + λ‖W‖², with λ chosen on held-out moments.

    x and y are the states before and after a window, and w is the weight of a token.

    Parameters
    ----------
    fit : WindowMoments
        Moments to fit on.
    held_out : WindowMoments
        Moments of other sequences to choose λ on. The returned map is fitted on both.
    ridges : sequence of float
        Values of λ to try, in units of the mean eigenvalue of Σ w xxᵀ, which makes them independent of the model.
    rank : int, optional
        Restrict W to this rank.
    diagonal : bool
        Restrict W to a diagonal matrix.

    Returns
    -------
    ClosedForm
        On the moments that it is fitted on, the error of the map is never above that of plain removal.

    Raises
    ------
    StreamlineError
        If moments contain no token or are not finite, or if `rank` is below 1 or combined with `diagonal`.

    Notes
    -----
    W(λ) = (Sxx + λI)⁻¹ Sxδ is computed for all λ from one eigendecomposition, Sxx = V diag(s) Vᵀ. The error of W on any
    moments is tr Sδδ − 2 tr WᵀSxδ + tr WᵀSxxW, so no pass over data is needed. With R = VᵀSxδ and c = 1/(s + λ) the
    held-out error is tr S'δδ − 2 cᵀdiag(R S'δx V) + cᵀ(RRᵀ ∘ VᵀS'xxV)c, so another λ needs no matrix product either.

    The best W of low rank is the truncated singular value decomposition of W(λ) in the metric Sxx + λI: W(λ)VVᵀ, where
    V are the first eigenvectors of SδxW(λ) (reduced-rank regression; Izenman, J. Multivar. Anal. 5, 1975).

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import WindowMoments
    >>> generator = torch.Generator().manual_seed(0)
    >>> fit, held_out = WindowMoments(4), WindowMoments(4)
    >>> for moments in (fit, held_out):
    ...     x = torch.randn(1, 100, 4, generator=generator)
    ...     moments.update(x, 1.5 * x, torch.ones(1, 100))
    >>> solution = solve_least_squares(fit, held_out)
    >>> torch.allclose(solution.map, 0.5 * torch.eye(4, dtype=torch.float64), atol=1e-6)
    True
    """
    for name, moments in (("fitted", fit), ("held-out", held_out)):
        if not moments.tokens:
            raise StreamlineError(f"The {name} moments contain no token. Pass more calibration sequences.")
        if not (torch.isfinite(moments.xx).all() and torch.isfinite(moments.xd).all()):
            raise StreamlineError(f"The {name} moments are not finite. Check the hidden states for NaN and overflow.")
    if rank is not None and (diagonal or rank < 1):
        raise StreamlineError(
            f"rank={rank} with diagonal={diagonal} is invalid. Expected a rank of 1 or more, or diagonal=True without "
            "a rank. Change one of the two."
        )
    solve_maps = _diagonal_maps if diagonal else partial(ridge_maps, rank=rank)
    is_full = rank is None and not diagonal
    errors = _errors(fit, held_out, ridges) if is_full else [held_out.error(w) for w in solve_maps(fit, ridges)]
    best = min(range(len(errors)), key=errors.__getitem__)
    all_moments = copy.deepcopy(fit)
    all_moments.merge(held_out)
    solution = next(solve_maps(all_moments, [ridges[best]]))
    return ClosedForm(solution, ridges[best], errors[best], held_out.error(torch.zeros_like(fit.xd)))


def _rotated(moments: WindowMoments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the eigenvalues, eigenvectors and mean eigenvalue of Sxx, and Sxδ in the eigenbasis."""
    values, vectors = torch.linalg.eigh(moments.xx)
    values = values.clamp_min(0.0)
    return values, vectors, _positive(values.mean()), vectors.T @ moments.xd


def _errors(fit: WindowMoments, held_out: WindowMoments, ridges: Sequence[float]) -> list[float]:
    """Return the held-out error of the full-rank map of each ridge."""
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
            directions = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:]
            yield full @ directions @ directions.T


def _diagonal_maps(moments: WindowMoments, ridges: Sequence[float]) -> Iterator[Tensor]:
    squares = moments.xx.diagonal()
    mean = _positive(squares.mean())
    for ridge in ridges:
        yield torch.diag(moments.xd.diagonal() / (squares + ridge * mean))


def _positive(mean: Tensor) -> Tensor:
    """Return the mean eigenvalue; raise if it is zero."""
    if mean == 0:
        raise StreamlineError("Every state before the window is zero, so no map can be fitted. Check the weights.")
    return mean


class ProjectionMoments(WindowMoments):
    """Moments of the input features f of a last projection and of the module's error e = y − module(x).

    With w = 1/‖y‖² they are Σ w ffᵀ, Σ w feᵀ, Σ w‖e‖² and Σ w‖y − x‖² (the error of plain removal). The change Δ of the
    projection minimizes Σ w‖e − Δᵀf‖² + λ‖Δ‖², so the ridge pulls towards the current weights. `inputs` is the number
    of features, including one for a bias, and 0 without a projection; `outputs` is the width of e.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs)
        self.xd = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._removed = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor, outputs: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Add features of shape (tokens, inputs), and outputs, inputs and targets of shape (tokens, outputs)."""
        x, y = to_float64(inputs), to_float64(targets)
        norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        f, e = to_float64(features) / norm, (y - to_float64(outputs)) / norm
        self.xx, self.xd = self.xx.to(f.device), self.xd.to(f.device)
        self.xx.addmm_(f.T, f)
        self.xd.addmm_(f.T, e)
        self._dd = self._dd.to(f.device) + e.square().sum()
        self._removed = self._removed.to(f.device) + ((y - x) / norm).square().sum()
        self.tokens += len(y)

    def merge(self, other: Self) -> None:
        """Add the sums of other moments."""
        super().merge(other)
        self._removed = self._removed + other._removed.to(self._removed.device)

    @property
    def removed(self) -> float:
        """The sum Σ w‖y − x‖²."""
        return float(self._removed)

    @removed.setter
    def removed(self, value: float) -> None:
        self._removed = torch.tensor(value, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as values that can be stored."""
        return {**super().state_dict(), "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums from `state_dict`."""
        super().load_state_dict(state)
        self.removed = float(state["removed"])

    @property
    def unchanged(self) -> float:
        """Mean relative squared error of the replacement with its current weights."""
        return self.dd / self.tokens

    @property
    def removal(self) -> float:
        """Mean relative squared error of plain removal."""
        return self.removed / self.tokens


def solve_projection(fit: ProjectionMoments, held_out: ProjectionMoments) -> ClosedForm:
    """Solve for the change Δ of a last projection, with the ridge chosen on held-out moments.

    Smaller ridges are tried while the error on all moments is above that of plain removal.
    """
    solution = solve_least_squares(fit, held_out)
    all_moments = merged_moments(fit, held_out)
    smaller = [ridge for ridge in sorted(RIDGES, reverse=True) if ridge < solution.ridge]
    while smaller and all_moments.error(solution.map) > all_moments.removal:
        solution = solve_least_squares(fit, held_out, [smaller.pop(0)])
    return solution


def merged_moments(fit: ProjectionMoments, held_out: ProjectionMoments) -> ProjectionMoments:
    """Return the merged moments of both parts."""
    all_moments = ProjectionMoments(*fit.xd.shape)
    for part in (fit, held_out):
        all_moments.merge(part)
    return all_moments


def add_to_projection(projection: nn.Module, map_: Tensor) -> None:
    """Add Δ of shape (inputs, features) to a Linear or Conv1D; the last row is added to its bias."""
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        rows = weight.shape[0] if isinstance(projection, Conv1D) else weight.shape[1]
        change = map_[:rows] if isinstance(projection, Conv1D) else map_[:rows].T
        weight.copy_(weight.double() + change.to(weight.device))
        if isinstance(bias, Tensor):
            bias.copy_(bias.double() + map_[rows].to(bias.device))


def is_solvable(module: nn.Module) -> bool:
    """Whether a module is a Linear or Conv1D with floating-point weights that are not quantized or wrapped.

    A subclass of Linear must compute what Linear computes.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, (nn.Linear, Conv1D)) or type(weight) is not nn.Parameter:
        return False
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        return False
    return type(module) in (nn.Linear, Conv1D) or (isinstance(module, nn.Linear) and _computes_linear(module))


def _computes_linear(module: nn.Linear) -> bool:
    """Compare the output of a subclass of Linear with that of Linear on a few random inputs."""
    inputs = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    expected = nn.functional.linear(inputs, module.weight, module.bias)
    try:
        with torch.no_grad():
            output = module(inputs)
    except Exception:  # a subclass may take other arguments or shapes
        return False
    if not isinstance(output, Tensor) or output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    magnitude = nn.functional.linear(inputs.abs(), module.weight.abs())
    return bool(((output - expected).abs() <= sum_order_tolerance(expected.dtype) * magnitude).all())
