"""How nearly linear a window is, by canonical correlation analysis. A higher score goes sooner.

Erdogan, Tonin and Cevher (Neural Block Linearization, arXiv 2505.21077) bound the error of the best linear map from x
to y, relative to the variance of y, by (d − r) + Σ (1 − ρᵢ²) over the r canonical correlations ρᵢ of x and y. Here x
and y are the states before and after a window, the residual connection included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import progress, recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.statistics.covariances import Place, StateCovariances, canonical_correlations


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
