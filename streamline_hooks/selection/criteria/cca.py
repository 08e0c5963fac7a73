"""How nearly linear a window is, by canonical correlation analysis. A higher score goes sooner.

Erdogan, Tonin and Cevher (Neural Block Linearization, arXiv 2505.21077) bound the error of the best linear map from x
to y, relative to the variance of y, by (d − r) + Σ (1 − ρᵢ²) over the r canonical correlations ρᵢ of x and y. They
replace the attention whose bound is least; here x and y are the states before and after any window, or before and
after the attention of a block, the residual connection included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch, prepare
from streamline_hooks.branch_states import reading_branches
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import token_mask
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import inference, progress, recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.statistics.covariances import Place, StateCovariances, canonical_correlations
from streamline_hooks.surgery.silence import branches_of
from streamline_hooks.watched_mask import WatchedMask


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
        correlations, rank = canonical_correlations(*self._matrices(change=False))
        return max(0.0, rank - float(correlations.square().sum()))

    def rank(self, share: float = 0.95) -> int:
        """A rank for the map W of a repair x ↦ x + Wᵀx.

        The change y − x is what such a map has to make. Of its canonical correlations with x, a map of rank k can use
        k; this is the fewest whose squares hold a share of the sum of all squares.

        Parameters
        ----------
        share : float
            Above 0, and 1 at the most.

        Returns
        -------
        int
            0 where nothing changes, or the change has nothing to do with x.
        """
        if not 0.0 < share <= 1.0:
            raise StreamlineError(f"share={share} is no share; expected one above 0, and 1 at the most.")
        correlations, _ = canonical_correlations(*self._matrices(change=True))
        reached = correlations.square().cumsum(dim=0)
        if not len(reached) or float(reached[-1]) == 0.0:
            return 0
        return int((reached < share * reached[-1] * (1.0 - 1e-12)).sum()) + 1

    def _matrices(self, change: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances of x, of x with y, and of y; or the last two of the change y − x."""
        x, y = self.before, self.after
        xx, xy, yy = (self.covariances.covariance(*pair) for pair in ((x, x), (x, y), (y, y)))
        if self.covariances.tokens <= 2 * len(xx):
            raise StreamlineError(
                f"{self.covariances.tokens} tokens were counted for states of {len(xx)} features. Of fewer than twice "
                f"as many tokens as features ({2 * len(xx) + 1}) some are perfectly correlated by chance alone; give "
                "more text, ten times as many tokens at least."
            )
        return (xx, xy - xx, yy - xy - xy.T + xx) if change else (xx, xy, yy)


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


def branch_cca_bounds(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    branch: Branch = "attention",
    blocks: Iterable[int] | None = None,
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
) -> dict[int, CanonicalBound]:
    """Bound how far the attention alone of each block is from a linear map, as the paper does; or its MLP alone.

    Of an attention that has another branch before it in its block, x is the state behind that one.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    branch : {"attention", "mlp"}
    blocks : iterable of int, optional
        By default all whose two branches can be read.
    stack : str, optional
        Path of the stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        What to find the branches on in a model that cannot be probed otherwise, without padding.

    Returns
    -------
    dict of int to CanonicalBound

    Raises
    ------
    UnsupportedSurgery
        If the branches of a block that was asked for, or of them all, cannot be read.
    StreamlineError
        If a state is not finite.
    """
    stacked = HiddenStateRecorder(model, blocks, stack=stack)  # which also says what is wrong with `blocks`
    found = branches_of(stacked.stack, stacked.blocks, probe)
    readable = {k: b for k, b in found.items() if not isinstance(b, UnsupportedSurgery) and b.taps}
    if not readable or (blocks is not None and len(readable) < len(found)):
        k, reason = next((k, b) for k, b in found.items() if k not in readable)
        why = str(reason) if isinstance(reason, UnsupportedSurgery) else "No submodule is given the state between them."
        raise UnsupportedSurgery(f"The branches of block {k} cannot be measured. {why}", "branches")
    covariances = {k: StateCovariances([("before", "after")]) for k in readable}

    def receive(k: int, read: Branch, before: Tensor, after: Tensor) -> None:
        if read == branch:
            real = token_mask(before, watched.mask)
            if not (torch.isfinite(before[real]).all() and torch.isfinite(after[real]).all()):
                raise StreamlineError(
                    f"A state around the {branch} branch of block {k} holds NaN or infinite values. Look at the "
                    "weights of the blocks up to there, or run in a wider precision."
                )
            covariances[k].update({"before": before, "after": after}, real)

    record = HiddenStateRecorder(model, [max(readable)], inputs=False, stop=True, stack=stack)
    watched = WatchedMask(record.stack)
    what = f"covariances of the {branch} of {len(readable)} of {len(record.stack)} blocks"
    measured = {k: record.stack[k] for k in readable}
    with (
        inference(model),
        record,
        watched,
        reading_branches(measured, readable, receive),
        progress(len(batches), what, "batches") as bar,
    ):
        for batch in batches:
            record.clear()
            record(**prepare(model, batch))
            bar.update()
    return {k: CanonicalBound(sums, "before", "after") for k, sums in covariances.items()}
