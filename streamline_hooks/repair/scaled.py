"""Prune&Comp: a factor for the gap in magnitude that a removed window leaves (Chen et al., arXiv 2507.18212).

Their code (chenxinrui-tsinghua/PruneAndComp, magcomp.py) multiplies the embedding and what every branch before the
cut adds by the factor. Here what every branch behind the cut adds is divided by it, which is the same to a model that
reads its residual stream through norms, and leaves an embedding alone that may be tied to the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder


@dataclass(frozen=True)
class Scaled:
    """A factor that stands in a window's place without a new parameter.

    Attributes
    ----------
    window : range
        The blocks in whose place it stands.
    factor : float
        α, by which the state behind the cut is multiplied.
    scaled_error, removal_error : float
        Mean relative squared error of the state after the window on the sequences that α was measured on, with it and
        without. Nothing minimises the first: it may be the larger one.
    """

    window: range
    factor: float
    scaled_error: float
    removal_error: float


class MagnitudeGap:
    """How much larger the state that leaves a window is than the one that enters it.

    For each sequence and each feature i it is the ratio of Σ|yᵢ| to Σ|xᵢ| over the sequence's tokens; the factor is
    the mean over features and sequences, as in the published code, which measures one sequence at a time.

    Parameters
    ----------
    features : int
        Width of the residual stream.

    Examples
    --------
    >>> import torch
    >>> gap = MagnitudeGap(2)
    >>> gap.update(torch.tensor([[[1.0, 1.0], [3.0, 1.0]]]), torch.tensor([[[2.0, 3.0], [2.0, 3.0]]]), torch.ones(1, 2))
    >>> gap.factor
    2.0
    """

    def __init__(self, features: int) -> None:
        self.features, self.sequences, self.tokens = features, 0, 0
        self._ratios = 0.0
        self._xx = self._xy = 0.0  # relative to ‖y‖², summed over tokens

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add one batch.

        Parameters
        ----------
        entering, leaving : torch.Tensor
            The states before and after the window, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens). A sequence without any is left out.

        Raises
        ------
        StreamlineError
            If a feature is zero in all tokens of a sequence that enter.
        """
        for x, y, real in zip(entering, leaving, mask.to(entering.device).bool(), strict=True):
            if not real.any():
                continue
            x, y = widen(x[real]), widen(y[real])
            before, after = x.abs().sum(dim=0), y.abs().sum(dim=0)
            if not (before > 0).all():
                raise StreamlineError(
                    f"Feature {int((before == 0).nonzero()[0])} is zero in every token of a sequence that enters the "
                    "window, so that nothing can be said of how it grows. Use another kind."
                )
            self._ratios += float((after / before).mean())
            norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            self._xx += float((x / norm).square().sum())
            self._xy += float((x / norm * (y / norm)).sum())
            self.sequences += 1
            self.tokens += len(x)

    @property
    def factor(self) -> float:
        """α."""
        if not self.sequences:
            raise StreamlineError("No token has been counted yet; update with a batch that has real tokens.")
        return self._ratios / self.sequences

    def error(self, factor: float) -> float:
        """Mean of ‖y − αx‖²/‖y‖² for a factor α; 1 is plain removal."""
        return 1 + (factor * factor * self._xx - 2 * factor * self._xy) / self.tokens


def fit_scale(
    model: nn.Module, window: range, batches: Sequence[Batch | Tensor], *, stack: str | None = None
) -> Scaled:
    """Measure the factor for a window.

    Parameters
    ----------
    model : torch.nn.Module
    window : range
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    Scaled
        To be applied by ``surgeon.remove(window)`` and ``surgeon.scale(window.stop, scaled.factor)``.

    Raises
    ------
    StreamlineError
        If a state is not finite, or a feature of the state that enters is always zero.

    Notes
    -----
    One pass over the sequences, that ends after the window.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> scaled = fit_scale(model, range(2, 5), [torch.arange(3, 43).view(4, 10)])
    >>> from streamline_hooks.surgery import LayerSurgeon
    >>> with LayerSurgeon(model) as surgeon:
    ...     surgeon.remove(scaled.window)
    ...     surgeon.scale(scaled.window.stop, scaled.factor)
    ...     len(surgeon.plan.folded)
    3
    """
    record = HiddenStateRecorder(model, sorted({window.start, window.stop - 1}), stop=True, stack=stack)
    first, last = record.stack[window.start], record.stack[window.stop - 1]
    gap: MagnitudeGap | None = None
    cost = f"magnitude: {window.stop} of {len(record.stack)} blocks"
    with recorded(model, batches, record, cost) as passed:
        for _, mask, _ in passed:
            entering = by_token(record.inputs[window.start][0], first)
            gap = gap or MagnitudeGap(entering.shape[-1])
            gap.update(entering, by_token(record.outputs[window.stop - 1][0], last), mask)
    if gap is None:
        raise StreamlineError("There is no batch to measure the magnitude on; give one at least.")
    return Scaled(window, gap.factor, gap.error(gap.factor), gap.error(1.0))
