"""LinearPatch: one scale per channel of the rotated hidden state (Chen et al., arXiv 2505.24680).

In the published code (chenxinrui-tsinghua/LinearPatch, layer_select.py and block_scaling.py) the states before and
after the window are rotated by a Hadamard matrix H, which spreads massive activations over all channels. The scale of a
rotated channel is the ratio of its mean absolute values after and before the window, averaged over sequences. The
replacement is the matrix H·diag(scale)·Hᵀ, which is not trained by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.hadamard import hadamard
from benchmarks.baselines.measured import measured
from streamline_hooks import CompressionConfig, HiddenStateRecorder, UnsupportedSurgery
from streamline_hooks.core import Batches
from streamline_hooks.modeling import BlockStack, StateSource
from streamline_hooks.pipeline import Preset
from streamline_hooks.repair import Repair, ReplacementConfig, WindowReplacement, hidden_size_of, register_replacement
from streamline_hooks.replacements import LinearReplacement


class RotatedScale:
    """Accumulate the scale of each channel of the rotated state, averaged over sequences.

    Parameters
    ----------
    rotation : torch.Tensor
        The orthogonal matrix H, of shape (features, features).

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
        """Add the unmasked tokens of a batch of states of shape (batch, tokens, features)."""
        for x, y, real in zip(entering, leaving, mask.to(entering.device).bool(), strict=True):
            if real.any():
                before, after = ((s[real].cpu().double() @ self.rotation).abs().mean(dim=0) for s in (x, y))
                self.ratios += after / before
                self.sequences += 1

    @property
    def patch(self) -> Tensor:
        """The matrix H·diag(scale)·Hᵀ, of shape (features, features), float64."""
        return self.rotation * (self.ratios / self.sequences) @ self.rotation.T


def fit_linear_patch(
    source: StateSource,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Mapping[str, Tensor] | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Measure the patches of all windows, in one pass that ends after the last window."""
    stack = source.stack
    needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
    record = HiddenStateRecorder(stack.model, needed, stop=True, stack=stack.path)
    batches, scales = [*fit, *held_out], dict[range, RotatedScale]()
    patches_of_fit_part: dict[range, Tensor] = {}
    cost = f"scale{what}: {len(windows)} windows, {needed[-1] + 1} of {len(stack)} blocks"
    with record.over(batches, cost) as recorded:
        for number, batch in enumerate(recorded, start=1):
            for window in windows:
                x, y = batch.entering(window.start), batch.leaving(window.stop - 1)
                if window not in scales:
                    scales[window] = RotatedScale(hadamard(x.shape[-1]))
                scales[window].update(x, y, batch.real)
                if number == len(fit):
                    patches_of_fit_part[window] = scales[window].patch
    identity = torch.eye(len(next(iter(scales.values())).rotation), dtype=torch.float64)
    replacements = [
        (w, LinearReplacement.from_map(scales[w].patch - identity), patches_of_fit_part[w] - identity) for w in windows
    ]
    return measured(stack, replacements, held_out, what)


@register_replacement
@dataclass(frozen=True)
class LinearPatchConfig(ReplacementConfig):
    """Fit a linear map like LinearPatch; see `fit_linear_patch`."""

    kind = "linearpatch"
    fit = staticmethod(fit_linear_patch)

    def make(self, stack: BlockStack, window: range) -> WindowReplacement:
        return LinearReplacement(hidden_size_of(stack))


PRESET = Preset(
    "linearpatch",
    CompressionConfig(repair=LinearPatchConfig()),
    "LinearPatch, arXiv 2505.24680; chenxinrui-tsinghua/LinearPatch, layer_select.py and block_scaling.py, without "
    "its fine-tuning. If several Hadamard matrices of an order exist, this implementation may use a different one.",
)
