"""LinearPatch: a scale for each channel of the rotated state (Chen et al., arXiv 2505.24680).

In their code (chenxinrui-tsinghua/LinearPatch, layer_select.py and block_scaling.py) the states before and after the
window are rotated by a Hadamard matrix H, so that massive activations are spread over all channels; the scale of a
rotated channel is the ratio of its mean absolute values after and before, a mean over sequences; and what stands in
the window's place is the one matrix H·diag(scale)·Hᵀ, which is trained no further by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.hadamard import hadamard
from benchmarks.baselines.measured import measured
from streamline_hooks import (
    BlockStack,
    CompressionConfig,
    HiddenStateRecorder,
    LinearReplacement,
    Preset,
    ReplacementConfig,
    UnsupportedSurgery,
    register_replacement,
)
from streamline_hooks.batch import Batch
from streamline_hooks.layouts import by_token
from streamline_hooks.passes import recorded
from streamline_hooks.precision import widen
from streamline_hooks.repair import Batches, Repair, StandIn, features_of


class RotatedScale:
    """The scale of each channel of the rotated state, as a mean over sequences.

    Parameters
    ----------
    rotation : torch.Tensor
        H, orthogonal, of shape (features, features).

    Examples
    --------
    >>> scale = RotatedScale(torch.eye(2, dtype=torch.float64))
    >>> scale.update(
    ...     torch.tensor([[[1.0, 1.0], [3.0, 1.0]]]), torch.tensor([[[2.0, 3.0], [2.0, 3.0]]]), torch.ones(1, 2)
    ... )
    >>> scale.patch.tolist()
    [[1.0, 0.0], [0.0, 3.0]]
    """

    def __init__(self, rotation: Tensor) -> None:
        self.rotation, self.sequences = rotation, 0
        self.ratios = torch.zeros(len(rotation), dtype=torch.float64)

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add the sequences of a batch, of shape (batch, tokens, features), of the tokens that count."""
        for x, y, real in zip(entering, leaving, mask.to(entering.device).bool(), strict=True):
            if real.any():
                rotation = self.rotation.to(x.device)
                before, after = ((widen(state[real]) @ rotation).abs().mean(dim=0) for state in (x, y))
                self.ratios += (after / before).cpu()
                self.sequences += 1

    @property
    def patch(self) -> Tensor:
        """H·diag(scale)·Hᵀ, of shape (features, features), float64."""
        return self.rotation * (self.ratios / self.sequences) @ self.rotation.T


def fit_linear_patch(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Measure the patches of windows, in one pass over all sequences that ends after the last of them."""
    needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
    record = HiddenStateRecorder(stack.model, needed, stop=True, stack=stack.path)
    batches, scales = [*fit, *held_out], dict[range, RotatedScale]()
    without: dict[range, Tensor] = {}
    cost = f"scale{what}: {len(windows)} windows, {needed[-1] + 1} of {len(stack)} blocks"
    with recorded(stack.model, batches, record, cost) as passed:
        for number, (_, mask, _) in enumerate(passed, start=1):
            for window in windows:
                states = record.inputs[window.start][0], record.outputs[window.stop - 1][0]
                x, y = (by_token(state, stack[window.start]) for state in states)
                if window not in scales:
                    scales[window] = RotatedScale(hadamard(x.shape[-1]))
                scales[window].update(x, y, mask)
                if number == len(fit):
                    without[window] = scales[window].patch
    identity = torch.eye(len(next(iter(scales.values())).rotation), dtype=torch.float64)
    made = [(w, LinearReplacement.from_map(scales[w].patch - identity), without[w] - identity) for w in windows]
    return measured(stack, made, held_out, what)


@register_replacement
@dataclass(frozen=True)
class LinearPatchConfig(ReplacementConfig):
    """Fit a linear map as LinearPatch does, see `fit_linear_patch`."""

    kind = "linearpatch"
    fit = staticmethod(fit_linear_patch)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return LinearReplacement(features_of(stack))


PRESET = Preset(
    "linearpatch",
    CompressionConfig(repair=LinearPatchConfig()),
    "LinearPatch, arXiv 2505.24680; chenxinrui-tsinghua/LinearPatch, layer_select.py and block_scaling.py, without "
    "its fine-tuning. For orders with several Hadamard matrices, ours may be a different one.",
)
