"""Find the windows that reach a target, and compare the predicted with the measured value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from streamline_hooks.core import StreamlineError, describe_blocks, model_size
from streamline_hooks.modeling import BlockStack, find_stack
from streamline_hooks.repair import replacement_size
from streamline_hooks.selection.target import Target, blocks_to_remove, unprotected_windows, windows_of_size
from streamline_hooks.selection.target_timing import (
    ReplacementFor,
    Timer,
    fewest_blocks,
    replacement_of,
    seconds_per_token,
    time_ratio,
)
from streamline_hooks.surgery import AFTER, BEFORE, LayerSurgeon, find_per_layer_weights, matched_dtype, spliced

TARGET_TOLERANCE = 0.05
"""Relative error of a prediction above which `compress` warns."""


@dataclass(frozen=True)
class TargetOutcome:
    """Predicted and measured value of a target.

    The unit is bytes for ``memory_bytes``, seconds for ``seconds_per_token``, the fraction of the original's time for
    ``latency`` and ``decode_latency``, and the removed fraction for ``parameters``.

    Attributes
    ----------
    target : Target
        The target of the compression.
    original : float
        Value of the original model.
    predicted : float
        Value of the compressed model, predicted before the compression.
    measured : float
        Value of the compressed model, measured after the compression.

    Examples
    --------
    >>> print(TargetOutcome(Target(memory_bytes=90e6), original=120e6, predicted=88e6, measured=88.4e6))
    memory:90MB: 88.000 MB predicted, 88.400 MB measured (+0.5%), 120.000 MB of the original
    """

    target: Target
    original: float
    predicted: float
    measured: float

    @property
    def relative_error(self) -> float:
        """Ratio of the measured to the predicted value, minus one."""
        return self.measured / self.predicted - 1 if self.predicted else math.inf

    @property
    def is_reached(self) -> bool:
        """Whether the measured value reaches the target."""
        if self.target.unit == "parameters":
            return self.measured >= self.target.amount * (1 - 1e-9)
        return self.measured <= self.target.amount

    @property
    def warning(self) -> str:
        """Warning text if `relative_error` exceeds `TARGET_TOLERANCE`, else an empty string."""
        if abs(self.relative_error) <= TARGET_TOLERANCE:
            return ""
        advice = " The machine may have been busy: time the model again with measure_speed." * self.target.is_timed
        return f"The prediction for the target is off by more than {TARGET_TOLERANCE:.0%}, {self}.{advice}"

    def to_dict(self) -> dict[str, Any]:
        """Return the target, the values and the relative error as JSON values."""
        values = {name: getattr(self, name) for name in ("original", "predicted", "measured", "relative_error")}
        return {"target": self.target.to_dict(), **values, "reached": self.is_reached}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TargetOutcome:
        """Create an outcome from the values that `to_dict` returned.

        Examples
        --------
        >>> outcome = TargetOutcome(Target(latency=0.8), original=1.0, predicted=0.78, measured=0.79)
        >>> TargetOutcome.from_dict(outcome.to_dict()) == outcome
        True
        """
        return cls(Target(**values["target"]), *(values[name] for name in ("original", "predicted", "measured")))

    def formatted(self) -> dict[str, str]:
        """Return the values with units, and the relative error, keyed by table heading.

        Examples
        --------
        >>> TargetOutcome(Target(latency=0.8), original=1.0, predicted=0.78, measured=0.79).formatted()["measured"]
        '0.790 of the time'
        """
        form = _FORMS[self.target.unit]
        values = {name: form(getattr(self, name)) for name in ("original", "predicted", "measured")}
        return {**values, "relative error": f"{self.relative_error:+.1%}"}

    def __str__(self) -> str:
        values = self.formatted()
        return (
            f"{self.target}: {values['predicted']} predicted, {values['measured']} measured "
            f"({values['relative error']}), {values['original']} of the original"
        )


_FORMS: dict[str, Callable[[float], str]] = {
    "parameters": lambda value: f"{value:.1%} fewer",
    "memory_bytes": lambda value: f"{value / 1e6:.3f} MB",
    "latency": lambda value: f"{value:.3f} of the time",
    "decode_latency": lambda value: f"{value:.3f} of the time",
    "seconds_per_token": lambda value: f"{1e3 * value:,.2f} ms",
}


@dataclass(frozen=True)
class TargetWindows:
    """Windows that each reach a target; returned by `target_windows`.

    Attributes
    ----------
    target : Target
        The target.
    windows : tuple of range
        The windows, ordered by start.
    predicted : mapping of range to float
        The predicted value without each window, in the unit of `TargetOutcome`. Empty for a number or a fraction of the
        blocks.
    original : float
        The value of the unchanged model; 0.0 for a number or a fraction of the blocks.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> target_windows(tiny_model("llama", blocks=4), 2).windows
    (range(0, 2), range(1, 3), range(2, 4))
    """

    target: Target
    windows: tuple[range, ...]
    predicted: Mapping[range, float] = field(default_factory=dict)
    original: float = 0.0

    def time_ratio(
        self, stack: BlockStack, change: Callable[[LayerSurgeon], Any], timer: Timer | None = None
    ) -> float | None:
        """Return the ratio of the times of the changed and the unchanged model, or None for other targets.

        Parameters
        ----------
        stack : BlockStack
            The block stack of the unchanged model.
        change : callable
            Applies the change to a `LayerSurgeon`.
        timer : callable, optional
            Times models as `measure_speed` does.
        """
        if self.target.unit not in ("latency", "decode_latency"):
            return None
        return time_ratio(stack, self.target, change, timer)

    def outcome(
        self,
        removed: Sequence[range],
        model: nn.Module,
        *,
        before: tuple[int, int],
        ratio: float | None = None,
        timer: Timer | None = None,
    ) -> TargetOutcome | None:
        """Measure the compressed model; return None for a number or a fraction of the blocks.

        Parameters
        ----------
        removed : sequence of range
            The removed windows.
        model : torch.nn.Module
            The compressed model.
        before : (int, int)
            Result of `model_size` before the compression: parameters and bytes.
        ratio : float, optional
            Result of `time_ratio`; required for ``latency`` and ``decode_latency``.
        timer : callable, optional
            Times models as `measure_speed` does.

        Raises
        ------
        StreamlineError
            If `ratio` is required and missing.
        """
        if len(removed) != 1 or removed[0] not in self.predicted:
            return None
        if self.target.unit == "parameters":
            measured = (before[0] - model_size(model)[0]) / before[0]
        elif self.target.unit == "memory_bytes":
            measured = float(model_size(model)[1])
        elif self.target.unit == "seconds_per_token":
            measured = seconds_per_token(model, timer)
        elif ratio is not None:
            measured = ratio
        else:
            raise StreamlineError(
                f"The target {self.target} is a fraction of the original's time, but ratio=None. Expected the ratio of "
                "both times. Measure it with time_ratio before the change, and pass ratio=..."
            )
        return TargetOutcome(self.target, self.original, self.predicted[removed[0]], measured)


def target_windows(
    model: nn.Module,
    target: Target | int | float,
    *,
    stack: str | None = None,
    protected: frozenset[int] = frozenset(),
    replacement_module: ReplacementFor = None,
    slots: int = 0,
    timer: Timer | None = None,
) -> TargetWindows:
    """Find the windows that each reach a target, and predict the value without each window.

    For blocks and times, all windows have the same length: the smallest that reaches the target. For parameters and
    bytes, the result has the shortest window from each start, because blocks may differ in size. Parameters that are
    shared with other parts of the model do not count as removed.

    Parameters
    ----------
    model : torch.nn.Module
        The unchanged model.
    target : Target, int or float
        The target; a plain number is a number or a fraction of the blocks.
    stack : str, optional
        Path of the stack (see `find_stack`).
    protected : frozenset of int
        Blocks that must stay (see `protected_blocks`).
    replacement_module : WindowReplacement or callable, optional
        The replacement of each window, or a function that builds the replacement of a window, also on the meta device.
        Sizes and times include the replacement.
    slots : int
        Number of block slots that the replacement occupies. For a number of blocks, as many additional blocks are
        removed.
    timer : callable, optional
        Times models as `measure_speed` does. By default `measure_speed` with prompts of 512 tokens or the model's
        maximum.

    Returns
    -------
    TargetWindows

    Raises
    ------
    StreamlineError
        If the target cannot be reached (the message contains the value that can be reached), or the unchanged model
        already meets it.
    UnsupportedSurgery
        If the target is a time and no window of a length can be removed.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> total = model_size(model)[1]
    >>> result = target_windows(model, Target(memory_bytes=0.5 * total))
    >>> result.windows[0], result.predicted[result.windows[0]] <= 0.5 * total
    (range(0, 5), True)
    """
    parsed_target = Target.of(target)
    block_stack = find_stack(model, stack)
    if len(block_stack) < 2:
        raise StreamlineError(
            f"The stack {block_stack.path} has one block, so no block can be removed. Expected two blocks or more. "
            "Choose another stack (stack=...)."
        )
    if slots > len(block_stack) - 2:
        raise StreamlineError(
            f"slots={slots}: a replacement with {slots} blocks leaves no block to remove in a stack of "
            f"{len(block_stack)}. Expected at most {len(block_stack) - 2} slots. Use a smaller replacement."
        )
    if parsed_target.counts_blocks:
        size = blocks_to_remove(parsed_target, len(block_stack), slots)
        return TargetWindows(parsed_target, tuple(windows_of_size(len(block_stack), size, protected)))
    if not parsed_target.is_timed:
        return _by_size(block_stack, parsed_target, protected, replacement_module, slots)
    free = {size: unprotected_windows(len(block_stack), size, protected) for size in range(1 + slots, len(block_stack))}
    candidates = {size: chosen for size, chosen in free.items() if chosen}
    if not candidates:
        windows_of_size(len(block_stack), 1 + slots, protected)  # raises: every block is protected
    count, value, original = fewest_blocks(block_stack, parsed_target, candidates, replacement_module, timer)
    return TargetWindows(parsed_target, tuple(free[count]), dict.fromkeys(free[count], value), original)


def _by_size(
    stack: BlockStack, target: Target, protected: frozenset[int], replacement_module: ReplacementFor, slots: int
) -> TargetWindows:
    """Find, for each start, the shortest window whose removal makes the model small enough."""
    length, in_bytes = len(stack), target.unit == "memory_bytes"
    windows_of_size(length, 1 + slots, protected)  # raises if every block is protected
    total = model_size(stack.model)[in_bytes]
    if in_bytes and total <= target.amount:
        raise StreamlineError(
            f"The target {target} is already met: the weights have {total:,} bytes with all {length} blocks. Expected "
            f"fewer bytes. Pass for example Target(memory_bytes={int(0.75 * total)})."
        )
    # The tolerance makes 0.1 of 30 equal to 3 in floating point.
    required = total - target.amount if in_bytes else target.amount * total * (1 - 1e-12)
    removed_with, reaching = _removed_by_window(stack, in_bytes), dict[range, float]()
    best: tuple[float, range] = (-math.inf, range(0))
    for start in range(length):
        window = range(start, start)
        while window.stop < length and window.stop not in protected and len(window) < length - 1:
            window = range(start, window.stop + 1)
            # A replacement only adds parameters: compute it only if the window without it is large enough.
            if len(window) > slots and removed_with(window, 0) >= required:
                saved = _saved(stack, window, replacement_module, removed_with, in_bytes)
                if saved >= required:
                    reaching[window] = float(total - saved) if in_bytes else saved / total
                    break
        else:
            if len(window) > slots:
                saved = _saved(stack, window, replacement_module, removed_with, in_bytes)
                best = max(best, (saved, window), key=lambda pair: pair[0])
    if not reaching:
        most, window = int(best[0]), best[1]
        unit = "bytes of weights" if in_bytes else "parameters"
        left = f", and leaves {total - most:,} bytes" if in_bytes else ""
        raise StreamlineError(
            f"The target {target} cannot be reached: the best window, {describe_blocks(window)}, "
            f"saves {most:,} of the model's {total:,} {unit} ({most / total:.1%}){left}. Other parts of the model "
            "(embeddings, head) stay, and the replacement is added. Remove less, or protect fewer blocks."
        )
    return TargetWindows(target, tuple(reaching), reaching, float(total) if in_bytes else 0.0)


def _saved(
    stack: BlockStack,
    window: range,
    replacement_module: ReplacementFor,
    removed_with: Callable[[range, int], int],
    in_bytes: bool,
) -> int:
    """Return the net number of parameters or bytes that replacing a window saves."""
    with torch.device("meta"):
        module = replacement_of(replacement_module, window)
    slots = replacement_size(stack, module).slots
    saved = removed_with(window, slots)
    if not isinstance(module, nn.Module):  # a replacement that is folded into weights has no parameters
        return saved
    if not in_bytes:
        return saved - sum(p.numel() for p in module.parameters())
    # The surgeon casts a spliced module to the dtype of the block that runs it, and a block to that of block 0.
    carrier = 0 if slots else window.stop if window.stop < len(stack) else window.start - 1
    dtype = matched_dtype(module, stack[carrier])
    cast = {id(p) for p in module.parameters() if dtype is not None and p.is_floating_point()}
    width = 0 if dtype is None else dtype.itemsize
    return saved - sum(p.numel() * (width if id(p) in cast else p.element_size()) for p in module.parameters())


def _removed_by_window(stack: BlockStack, in_bytes: bool) -> Callable[[range, int], int]:
    """Return a function that counts the parameters, or their bytes, removed with a window.

    The second argument of that function is the number of slots that the replacement of the window occupies.

    Block k has position 2k + 1. Modules spliced before block k have position 2k, and are removed if the blocks on both
    sides are. Modules spliced after the last block are removed with it. A parameter is removed if all its positions
    are. Weights outside the blocks that have a slice per block (Gemma 3n) lose the slices of the removed blocks.
    """

    def size_of(p: nn.Parameter) -> int:
        return p.numel() * p.element_size() if in_bytes else p.numel()

    blocks = {id(block) for block in stack.blocks}
    positions_by_id: dict[int, tuple[nn.Parameter, set[int]]] = {}
    for k, block in enumerate(stack.blocks):
        before = [p for module in spliced(block, BEFORE) for p in module.parameters()]
        after = [p for module in spliced(block, AFTER) for p in module.parameters()]
        spliced_ids = {id(p) for p in (*before, *after)}
        own = [p for p in block.parameters() if id(p) not in spliced_ids]
        for position, parameters in ((2 * k, before), (2 * k + 1, own), (2 * k + 2, after)):
            for p in parameters:
                positions_by_id.setdefault(id(p), (p, set()))[1].add(position)
    for p in _outside(stack.model, blocks):
        positions_by_id.pop(id(p), None)
    sizes: Counter[tuple[int, int]] = Counter()
    for p, positions in positions_by_id.values():
        sizes[min(positions), max(positions)] += size_of(p)
    sliced = [p for weight in find_per_layer_weights(stack) for p in weight.module.parameters(recurse=False)]
    slices = sum(map(size_of, sliced)) // len(stack)

    def count(window: range, slots: int) -> int:
        first, last = 2 * window.start + 1, 2 * window.stop - (window.stop < len(stack))
        inside = sum(size for (low, high), size in sizes.items() if first <= low and high <= last)
        return inside + slices * (len(window) - slots)

    return count


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Parameter]:
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None and id(child) not in blocks:
            yield from _outside(child, blocks)
