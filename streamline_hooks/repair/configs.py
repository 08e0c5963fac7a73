"""The config of each kind of replacement: how it is built, initialised and fitted, and what it costs."""

# ruff: noqa: D102 - what a kind overrides is documented in ReplacementConfig

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.core.config import Bound
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.repair.folded import fit_scale, measure_fold_moments, solve_fold
from streamline_hooks.repair.replacement_config import ReplacementConfig, register_replacement
from streamline_hooks.repair.stand_in import Batches, Repair, StandIn, features_of, fit_possible, inner_width_of
from streamline_hooks.replacements import (
    FeedForwardReplacement,
    LinearReplacement,
    MLPReplacement,
    SwiGLUReplacement,
    inherit,
    inherit_silenced,
    merge,
)
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import WindowMoments


@register_replacement
@dataclass(frozen=True)
class NoneConfig(ReplacementConfig):
    """Put nothing in the place of the window."""

    kind = "none"

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return None


@register_replacement
@dataclass(frozen=True)
class LinearConfig(ReplacementConfig):
    """Replace the window by h + hW, with W solved by least squares.

    Attributes
    ----------
    rank : int, optional
        Rank of W; by default it is full.
    diagonal : bool
        Restrict W to a diagonal matrix: one factor for each feature.
    """

    kind = "linear"
    bounds: ClassVar[Mapping[str, Bound]] = {"rank": 1}
    rank: int | None = None
    diagonal: bool = False

    @property
    def replaces_branches(self) -> bool:
        return self.rank is None and not self.diagonal

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return LinearReplacement(features_of(stack), self.rank, self.diagonal)


@register_replacement
@dataclass(frozen=True)
class MLPConfig(ReplacementConfig):
    """Replace the window by an MLP on the residual stream, as the paper does.

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default see `MLPReplacement`.
    activation : str
        Name of the activation function in Transformers.
    bias : bool
        Whether the layers have biases.
    linear : bool
        Whether a linear map, solved by least squares, stands beside the MLP, whose last layer starts at zero.
    """

    kind = "mlp"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    width: int | None = None
    activation: str = "gelu"
    bias: bool = False
    linear: bool = True

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return MLPReplacement(features_of(stack), self.width, self.activation, self.bias, self.linear)


@register_replacement
@dataclass(frozen=True)
class SwiGLUConfig(ReplacementConfig):
    """Replace the window by a SwiGLU feed-forward on the residual stream.

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default that of the model's own MLPs.
    norm : bool
        Whether an RMS norm precedes it.
    linear : bool
        Whether a linear map, solved by least squares, stands beside it, whose last layer starts at zero.
    """

    kind = "swiglu"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    width: int | None = None
    norm: bool = True
    linear: bool = True

    def make(self, stack: BlockStack, window: range) -> StandIn:
        width = inner_width_of(stack, window.start) if self.width is None else self.width
        return SwiGLUReplacement(features_of(stack), width, self.norm, self.linear)


@register_replacement
@dataclass(frozen=True)
class BlockConfig(ReplacementConfig):
    """Replace the window by its first blocks, which take a slot each.

    Attributes
    ----------
    count : int
        Number of blocks.
    solve : bool
        Whether the last projection is solved by least squares. Otherwise the blocks start as copies.
    """

    kind = "block"
    bounds: ClassVar[Mapping[str, Bound]] = {"count": 1}
    count: int = 1
    solve: bool = True

    @property
    def slots(self) -> int:
        return self.count

    @property
    def is_solved(self) -> bool:
        return self.solve

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return inherit(stack, window, self.count)


@register_replacement
@dataclass(frozen=True)
class SilencedConfig(ReplacementConfig):
    """Replace the window by its first block with a zero attention output projection: a plain checkpoint."""

    kind = "silenced"

    @property
    def slots(self) -> int:
        return 1

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return inherit(stack, window)

    def prepare(self, stack: BlockStack, window: range, probe: Batch | Tensor | None) -> StandIn:
        return inherit_silenced(stack, window, probe)


@register_replacement
@dataclass(frozen=True)
class MergedConfig(ReplacementConfig):
    """Replace the window by one block that is merged from all of it.

    Attributes
    ----------
    weight : float
        Weight of the sum of the differences between the later blocks and the first; 1 by default.
    solve : bool
        Whether the last projection is solved by least squares.
    """

    kind = "merged"
    weight: float = 1.0
    solve: bool = False

    @property
    def slots(self) -> int:
        return 1

    @property
    def is_solved(self) -> bool:
        return self.solve

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return merge(stack, window, self.weight)


def fit_folded(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Fit maps for windows, halving the list around windows that cannot be folded."""

    def fitted(part: Sequence[range]) -> list[Repair | UnsupportedSurgery]:
        sums = [
            measure_fold_moments(stack.model, batches, part, stack=stack.path, probe=probe, what=name + what)
            for batches, name in ((fit, "fit"), (held_out, "hold out"))
        ]
        return [_folded(window, *pair) for window, pair in zip(part, zip(*sums, strict=True), strict=True)]

    return fit_possible(windows, fitted)


def _folded(window: range, fit: WindowMoments, held_out: WindowMoments) -> Repair | UnsupportedSurgery:
    if not fit.xx.any():
        return UnsupportedSurgery(
            "Nothing can be folded into the block before this window: its MLP adds nothing. Choose another window or "
            "kind.",
            "fold",
        )
    one = solve_fold(window, fit, held_out)
    return Repair(window, one, one.removal_error, one.held_out_error, one.ridge)


def fit_scaled(
    stack: BlockStack,
    windows: Sequence[range],
    fit: Batches,
    held_out: Batches,
    probe: Batch | Tensor | None,
    what: str,
) -> list[Repair | UnsupportedSurgery]:
    """Measure the factor of each window in one pass over all sequences."""
    found = [fit_scale(stack.model, window, [*fit, *held_out], stack=stack.path) for window in windows]
    return [Repair(one.window, one, one.removal_error, one.scaled_error, None) for one in found]


@register_replacement
@dataclass(frozen=True)
class FoldedConfig(ReplacementConfig):
    """Fold a linear map into the MLP output projection of the block before the window: no new parameters."""

    kind = "folded"
    fit = staticmethod(fit_folded)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return None


@register_replacement
@dataclass(frozen=True)
class ScaleConfig(ReplacementConfig):
    """Fold one factor for the hidden state into the weights (Prune&Comp, arXiv 2507.18212): no new parameters."""

    kind = "scale"
    fit = staticmethod(fit_scaled)

    def make(self, stack: BlockStack, window: range) -> StandIn:
        return None


@register_replacement
@dataclass(frozen=True)
class FeedForwardConfig(ReplacementConfig):
    """Replace the window by a randomly initialised feed-forward without residual path, which must be trained.

    Attributes
    ----------
    width : int, optional
        Number of hidden units; by default see `FeedForwardReplacement`.
    """

    kind = "feed_forward"
    bounds: ClassVar[Mapping[str, Bound]] = {"width": 1}
    width: int | None = None

    @property
    def is_solved(self) -> bool:
        return False

    def make(self, stack: BlockStack, window: range) -> StandIn:
        spread = getattr(stack.config, "initializer_range", None)
        return FeedForwardReplacement(features_of(stack), self.width, 0.02 if spread is None else spread)
