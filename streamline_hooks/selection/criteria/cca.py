"""How nearly linear a window is, by canonical correlation analysis. A higher score goes sooner.

Erdogan, Tonin and Cevher (Neural Block Linearization, arXiv 2505.21077) bound the error of the best linear map from x
to y, relative to the variance of y, by (d − r) + Σ (1 − ρᵢ²) over the r canonical correlations ρᵢ of x and y. Here x
and y are the states before and after a window, the residual connection included.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import progress, recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder

_TOKENS_AT_ONCE = 4096

Place = Hashable


class StateCovariances:
    """Means of the states at some boundaries, and centred second moments of each and of some pairs.

    Each part is centred on its own mean and merged by the update of Chan, Golub and LeVeque (1979), so that large means
    (massive activations) cost no digits. Sums are float64, on the device of the states where it has float64.
    """

    def __init__(self, pairs: Iterable[tuple[Place, Place]]) -> None:
        given = list(dict.fromkeys(pairs))
        self.places = list(dict.fromkeys(place for pair in given for place in pair))
        self.pairs = list(dict.fromkeys([*((place, place) for place in self.places), *given]))
        self.tokens = 0
        self._means: dict[Place, Tensor] = {}
        self._scatters: dict[tuple[Place, Place], Tensor] = {}

    def update(self, states: Mapping[Any, Tensor], mask: Tensor) -> None:
        """Add one batch of states of shape (batch, tokens, features), with a mask of shape (batch, tokens)."""
        chosen = [states[place][mask.to(states[place].device).bool()] for place in self.places]
        for parts in zip(*(state.split(_TOKENS_AT_ONCE) for state in chosen), strict=True):
            if len(parts[0]):
                self._add({place: widen(part) for place, part in zip(self.places, parts, strict=True)})

    def covariance(self, x: Place, y: Place) -> Tensor:
        """Return the mean of (x − x̄)(y − ȳ)ᵀ, of shape (features, features), float64."""
        if not self.tokens:
            raise StreamlineError("No token has been counted yet; update with a batch that has real tokens.")
        return self._scatters[x, y] / self.tokens

    def _add(self, states: Mapping[Place, Tensor]) -> None:
        means = {place: state.mean(dim=0) for place, state in states.items()}
        centred = {place: state - means[place] for place, state in states.items()}
        scatters = {(x, y): centred[x].T @ centred[y] for x, y in self.pairs}
        self._merge(len(next(iter(states.values()))), means, scatters)

    def _merge(
        self, tokens: int, means: Mapping[Place, Tensor], scatters: Mapping[tuple[Place, Place], Tensor]
    ) -> None:
        if not self.tokens:
            self.tokens, self._means, self._scatters = tokens, dict(means), dict(scatters)
            return
        total = self.tokens + tokens
        moved = {place: means[place].to(mean.device) - mean for place, mean in self._means.items()}
        for (x, y), scatter in self._scatters.items():
            between = torch.outer(moved[x], moved[y].to(moved[x].device)) * (self.tokens * tokens / total)
            self._scatters[x, y] = scatter + scatters[x, y].to(scatter.device) + between.to(scatter.device)
        for place, mean in self._means.items():
            self._means[place] = mean + moved[place] * (tokens / total)
        self.tokens = total


def canonical_correlations(xx: Tensor, xy: Tensor, yy: Tensor) -> tuple[Tensor, int]:
    """Return the canonical correlations of x and y, in falling order, and the rank of Cyy.

    They are the singular values of Cxx^(−1/2) Cxy Cyy^(−1/2), all float64. Directions in which a state does not vary
    are left out.
    """
    x, y = _whitening(xx), _whitening(yy)
    return torch.linalg.svdvals(x.T @ xy @ y).clamp(max=1.0), y.shape[1]


def _whitening(covariance: Tensor) -> Tensor:
    """W of shape (features, rank) with Wᵀ C W the identity."""
    # Scaled to unit variances first, which changes no canonical correlation: massive activations leave a few features
    # with a variance that would push all others below the rounding of the largest eigenvalue.
    deviations = covariance.diagonal().sqrt()
    scale = torch.where(deviations > 0, 1.0 / deviations, 0.0)
    values, vectors = torch.linalg.eigh(covariance * scale[:, None] * scale)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.amax().clamp_min(1e-300)
    return scale[:, None] * vectors[:, kept] / values[kept].sqrt()


@dataclass(frozen=True)
class CanonicalBound:
    """The bound of one window, and what it was read off.

    Attributes
    ----------
    covariances : StateCovariances
    before, after : place
        Of the states x and y in the covariances.
    """

    covariances: StateCovariances
    before: Place
    after: Place

    @cached_property
    def value(self) -> float:
        """Bound of the relative error of the best linear map of the centred states: (d − r) + Σ (1 − ρᵢ²).

        With d the rank of y's covariance, from 0 (y is a linear function of x) to d.
        """
        correlations, rank = canonical_correlations(*self._matrices())
        return max(0.0, rank - float(correlations.square().sum()))

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the covariances of x, of x with y, and of y."""
        x, y = self.before, self.after
        xx, xy, yy = (self.covariances.covariance(*pair) for pair in ((x, x), (x, y), (y, y)))
        if self.covariances.tokens <= 2 * len(xx):
            raise StreamlineError(
                f"{self.covariances.tokens} tokens were counted for states of {len(xx)} features. Of fewer than twice "
                f"as many tokens as features ({2 * len(xx) + 1}) some are perfectly correlated by chance alone; give "
                "more text, ten times as many tokens at least."
            )
        return xx, xy, yy


def cca_bounds(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[CanonicalBound]:
    """Bound how far each window is from a linear map.

    One pass sums the covariances of all windows, and ends after the last block that any of them needs. Memory is d²
    float64 numbers a window, and as many for each entrance and each exit.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        Of more than twice as many tokens as a state has features; ten times at least is better.
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    list of CanonicalBound
        One a window.

    Raises
    ------
    StreamlineError
        If a state is not finite; on `CanonicalBound.value`, if there are too few tokens.
    """
    needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
    record = HiddenStateRecorder(model, needed, stop=True, stack=stack)
    covariances = StateCovariances((("enters", w.start), ("leaves", w.stop - 1)) for w in windows)
    what = f"covariances: {len(windows)} windows, {needed[-1] + 1} of {len(record.stack)} blocks"
    with recorded(model, batches, record, what) as passed:
        for _, mask, _ in passed:
            visits = {"enters": record.inputs, "leaves": record.outputs}
            states = {
                (side, k): by_token(kept[k][0], record.stack[k])
                for side, kept in visits.items()
                for k in needed
                if (side, k) in covariances.places
            }
            covariances.update(states, mask)
    return [CanonicalBound(covariances, ("enters", w.start), ("leaves", w.stop - 1)) for w in windows]


def cca_bound(
    model: nn.Module, batches: Sequence[Batch | Tensor], windows: Sequence[range], *, stack: str | None = None
) -> list[float]:
    """Minus the bound of `cca_bounds`, of each window."""
    with progress(len(windows), "canonical correlations", "windows") as bar:
        scores = []
        for bound in cca_bounds(model, batches, windows, stack=stack):
            scores.append(-bound.value)
            bar.update()
    return scores
