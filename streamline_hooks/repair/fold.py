"""Maps and factors that replace a window and are folded into existing weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.core import Batch, Batches, StreamlineError, UnsupportedSurgery, to_float64
from streamline_hooks.modeling import (
    BlockStack,
    Branch,
    Branches,
    StateSource,
    by_token,
    closing_generator,
    reading_branches,
    require_branches_readable,
)
from streamline_hooks.repair.least_squares import solve_least_squares
from streamline_hooks.statistics import WindowMoments, moments_by_window
from streamline_hooks.surgery import BEFORE, as_state_source, foldable, spliced


@dataclass(frozen=True)
class FoldedMap:
    """A map T that replaces a window: the MLP output m of block ``window.start - 1`` becomes mT.

    Attributes
    ----------
    window : range
    map : torch.Tensor
        T of shape (features, features), float64.
    ridge : float
        The chosen penalty of ‖T − I‖², in units of the mean eigenvalue of Σ w mᵀm.
    held_out_error, removal_error : float
        Mean relative squared error of the state after the window on the held-out sequences, with T and with T = I.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.repair import FoldedConfig, fit_windows
    >>> from streamline_hooks.testing import tiny_model
    >>> model, batches = tiny_model("llama"), [torch.arange(3, 63).view(6, 10)]
    >>> (repair,) = fit_windows(model, [range(2, 5)], FoldedConfig(), batches, batches)
    >>> repair.replacement_module.map.shape
    torch.Size([32, 32])
    """

    window: range
    map: Tensor
    ridge: float
    held_out_error: float
    removal_error: float


def solve_fold(window: range, fit: WindowMoments, held_out: WindowMoments) -> FoldedMap:
    """Solve for the T that minimizes Σ w‖y − a − mT‖² + λ‖T − I‖², with w = 1/‖y‖².

    The output of the block before the window is a + m, where m is the output of its MLP. T can be folded into the
    projection that produces m. λ is chosen on the held-out moments.
    """
    solution = solve_least_squares(fit, held_out)
    identity = torch.eye(len(solution.map), dtype=torch.float64, device=solution.map.device)
    return FoldedMap(window, identity + solution.map, solution.ridge, solution.held_out_error, solution.removal_error)


def measure_fold_moments(
    model: nn.Module | StateSource,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    probe: Batch | Tensor | None = None,
    weighted: bool = True,
    desc: str = "moments",
) -> list[WindowMoments]:
    """Sum the moments for `FoldedMap` of several windows in one pass that ends after the last window.

    For each window the inputs are m, the MLP output of the block before the window, and the targets are y − a, where y
    is the output of the window and a + m the output of the block before it.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    windows : sequence of range
    stack : str, optional
        Path of the block stack, see `find_stack`.
    probe : mapping or torch.Tensor, optional
        A batch without padding. Required only for models that cannot be probed with random tokens.
    weighted : bool
        Whether tokens are weighted by 1/‖y‖².
    desc : str
        Text of the progress bar.

    Returns
    -------
    list of WindowMoments
        One per window.

    Raises
    ------
    UnsupportedSurgery
        If a map cannot be folded into the block before a window.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> (moments,) = measure_fold_moments(tiny_model("llama"), [torch.arange(3, 63).view(6, 10)], [range(2, 5)])
    >>> moments.tokens
    60
    """
    source = as_state_source(model, stack)
    results = branches_before(source.stack, windows, probe)
    for result in results:
        if isinstance(result, UnsupportedSurgery):
            raise result
    branches = {w.start - 1: b for w, b in zip(windows, results, strict=True) if isinstance(b, Branches)}
    moments: dict[int, WindowMoments] = {}
    with fold_moments(source, [(desc, batches)], windows, branches, weighted=weighted) as window_moments:
        for number, (sums,) in window_moments:
            if sums is not None:
                moments[number] = sums
    return [moments[number] for number in sorted(moments)]


def branches_before(
    stack: BlockStack, windows: Sequence[range], probe: Batch | Tensor | None = None
) -> list[Branches | UnsupportedSurgery]:
    """Find the branches of the block before each window, or the error with the reason why it cannot be folded."""
    before = sorted({window.start - 1 for window in windows if window.start})
    foldable_branches = foldable(stack, before, "mlp", probe) if before else {}
    results: list[Branches | UnsupportedSurgery] = []
    for window in windows:
        k = window.start - 1
        branches = foldable_branches.get(k) or UnsupportedSurgery(
            f"Cannot fold a map for blocks 0 to {window.stop - 1}: no block precedes the window. Choose another window "
            "or kind."
        )
        if isinstance(branches, Branches) and spliced(stack[k + 1], BEFORE):
            branches = UnsupportedSurgery(
                f"Cannot fold a map into block {k}: an earlier surgery inserted a module after it, which would run on "
                "the folded output. Choose another window or kind.",
                "fold",
            )
        if isinstance(branches, Branches) and branches.first == "mlp":
            branches = UnsupportedSurgery(
                f"Cannot fold a map into block {k}: its attention follows its MLP and reads the MLP output, so the "
                "block's output is not linear in the map. Choose another window or kind.",
                "fold",
            )
        results.append(branches)
    return results


@closing_generator
def fold_moments(
    source: StateSource,
    parts: Sequence[tuple[str, Batches]],
    windows: Sequence[range],
    branches: Mapping[int, Branches],
    *,
    weighted: bool = True,
) -> Generator[tuple[int, list[WindowMoments | None]], None, None]:
    """Sum the moments of m and y − a, and yield those of each window when they are complete.

    `branches` are those of the blocks before the windows, see `branches_before`. Each part of the data has one result,
    None for a part without batches. If the source runs block by block, the moments of only one window are in memory at
    a time.
    """
    states_by_block: dict[int, tuple[Tensor, Tensor]] = {}
    attention_outputs: dict[int, Tensor] = {}

    def receive(k: int, branch: Branch, entering: Tensor, leaving: Tensor) -> None:
        if not source.in_memory and k not in states_by_block:  # only the block that ran last is summed
            states_by_block.clear()
        if branch == "attention":
            attention_outputs[k] = leaving.clone()
            return
        dtype = torch.promote_types(entering.dtype, torch.float32)  # subtract in float32: exact for 16-bit states
        states_by_block[k] = attention_outputs.pop(k), leaving.to(dtype) - entering.to(dtype)

    def make(number: int, features: int) -> WindowMoments:
        return _FoldMoments(features, weighted, states_by_block, windows[number].start - 1)

    require_branches_readable(source, branches)
    blocks = {k: source.stack[k] for k in branches}
    with_block_before = [range(window.start - 1, window.stop) for window in windows]
    options: dict[str, Any] = {"weighted": weighted, "make": make, "rerun": [1] * len(windows)}
    with (
        reading_branches(blocks, branches, receive),
        moments_by_window(source, parts, with_block_before, **options) as window_moments,
    ):
        yield from window_moments


class _FoldMoments(WindowMoments):
    """Sum the moments of m and y − a from states in a block and after a window."""

    def __init__(self, features: int, weighted: bool, states: Mapping[int, tuple[Tensor, Tensor]], block: int) -> None:
        super().__init__(features, weighted)
        self._states, self._block = states, block

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor, **_: Any) -> None:
        """Add the batch of the last call of the block."""
        a, m = self._states[self._block]
        super().update(m, leaving.to(m.dtype) - a.to(m.dtype), mask, relative_to=leaving)


@dataclass(frozen=True)
class ScaleFactor:
    """A factor α for the state at the removed window, folded into weights.

    The errors are mean relative squared errors of the state after the window on the measured sequences, with α and
    without it. α does not minimize the error, so `scaled_error` may exceed `removal_error`.
    """

    window: range
    factor: float
    scaled_error: float
    removal_error: float


class MagnitudeRatio:
    """Ratio of the magnitudes of the states after and before a window (Prune&Comp, arXiv 2507.18212).

    The ratio of a sequence and feature is Σ|yᵢ|/Σ|xᵢ| over tokens. The factor is the mean over features and sequences.
    """

    def __init__(self, block: nn.Module | None = None) -> None:
        self.sequences, self.tokens, self._ratios = 0, 0, 0.0
        self._xx = self._xy = 0.0  # relative to ‖y‖², summed over tokens
        self._block = block  # determines the layout of the states

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add a batch of states (batch, tokens, features) with its mask of real tokens (batch, tokens)."""
        if self._block is not None:
            entering, leaving = by_token(entering, self._block), by_token(leaving, self._block)
        for x, y, real in zip(entering, leaving, mask.to(entering.device).bool(), strict=True):
            if not real.any():
                continue
            x, y = to_float64(x[real]), to_float64(y[real])
            before, after = x.abs().sum(dim=0), y.abs().sum(dim=0)
            if not (before > 0).all():
                raise StreamlineError(
                    f"Cannot compute a scale factor: feature {int((before == 0).nonzero()[0])} is zero in every token "
                    "of a sequence that enters the window. Choose another kind."
                )
            self._ratios += float((after / before).mean())
            norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            self._xx += float((x / norm).square().sum())
            self._xy += float((x / norm * (y / norm)).sum())
            self.sequences += 1
            self.tokens += len(x)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as values that can be stored."""
        sums = {"ratios": self._ratios, "xx": self._xx, "xy": self._xy}
        return {"sequences": self.sequences, "tokens": self.tokens, **sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums from `state_dict`."""
        self.sequences, self.tokens = int(state["sequences"]), int(state["tokens"])
        self._ratios, self._xx, self._xy = (float(state[name]) for name in ("ratios", "xx", "xy"))

    @property
    def factor(self) -> float:
        """Return α."""
        if not self.sequences:
            raise StreamlineError(
                "Cannot measure the magnitude: the batches contain no token. Pass at least one batch with real tokens."
            )
        return self._ratios / self.sequences

    def error(self, factor: float) -> float:
        """Return the mean of ‖y − αx‖²/‖y‖² for a factor α; α = 1 is plain removal."""
        return 1 + (factor * factor * self._xx - 2 * factor * self._xy) / self.tokens


def fit_scale(
    model: nn.Module | StateSource,
    windows: Sequence[range],
    batches: Sequence[Batch | Tensor],
    *,
    stack: str | None = None,
    desc: str = "",
) -> list[ScaleFactor]:
    """Measure the scale factor of each window in one pass that ends after the last window."""
    source = as_state_source(model, stack)
    factors: dict[int, ScaleFactor] = {}

    def make(number: int, features: int) -> MagnitudeRatio:
        return MagnitudeRatio(source.stack[windows[number].start])

    with source.window_sums([(f"magnitude{desc}", batches)], windows, make) as results:
        for number, (ratio,) in results:
            ratio = ratio or MagnitudeRatio()  # `factor` raises if there is no token
            factors[number] = ScaleFactor(windows[number], ratio.factor, ratio.error(ratio.factor), ratio.error(1.0))
    return [factors[number] for number in range(len(windows))]
