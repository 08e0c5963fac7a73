"""Time a model with blocks removed, and find the smallest number of blocks that reaches a target time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import mean
from typing import Any

from torch import nn

from streamline_hooks.core import StreamlineError, UnsupportedSurgery, describe_blocks, get_logger
from streamline_hooks.evaluation import Phase, Quartiles, SpeedReport, max_prompt_tokens, measure_speed
from streamline_hooks.modeling import BlockStack
from streamline_hooks.repair import FoldedMap, ScaleFactor, WindowReplacement, insert_replacement
from streamline_hooks.selection.target import Target
from streamline_hooks.surgery import LayerSurgeon, find_hazards

logger = get_logger(__name__)

ReplacementFor = WindowReplacement | Callable[[range], WindowReplacement]
"""The replacement of every window, or a function that returns the replacement of a window."""
Timer = Callable[..., SpeedReport]
"""Times models as `measure_speed` does."""
_PROMPT, _NEW = 512, 16
_ROUNDS = 11  # alternating repeats; on a busy machine, medians of fewer repeats differ by more than 5 %


def default_timer(model: nn.Module) -> Timer:
    """Return `measure_speed` with prompts of 512 tokens, or fewer if the model has fewer positions."""
    return partial(measure_speed, tokens=max_prompt_tokens(model, _NEW, _PROMPT), new_tokens=_NEW)


def replacement_of(replacement_module: ReplacementFor, window: range) -> WindowReplacement:
    """Return the replacement of this window."""
    if replacement_module is None or isinstance(replacement_module, (nn.Module, FoldedMap, ScaleFactor)):
        return replacement_module
    return replacement_module(window)


def seconds_per_token(model: nn.Module, timer: Timer | None = None) -> float:
    """Return the median seconds per generated token after the prompt, at batch size 1."""
    report = (timer or default_timer(model))({"model": model}, repeats=_ROUNDS)
    return report.seconds("model", "decode").median


def time_ratio(stack: BlockStack, target: Target, change: Callable[[LayerSurgeon], Any], timer: Timer | None) -> float:
    """Time the model with and without a change, in alternation, and return the ratio."""
    return _ratio(stack, target, "changed", change, timer or default_timer(stack.model), repeats=_ROUNDS).median


def fewest_blocks(
    stack: BlockStack,
    target: Target,
    candidates: Mapping[int, list[range]],
    replacement_module: ReplacementFor,
    timer: Timer | None,
) -> tuple[int, float, float]:
    """Find the smallest number of removed blocks for which the measured time reaches the target.

    The method is a bisection guided by a line through the measurements. Each candidate is timed in alternation with the
    original, so that the load of the machine affects both equally; seconds are the ratio times the seconds of the
    original. The first number that seems to reach the target is often one whose measurement was too low by chance, so
    it is measured again, and the mean of both decides. No number is measured three times, so that noise cannot make the
    search oscillate.

    Parameters
    ----------
    stack : BlockStack
    target : Target
    candidates : mapping of int to list of range
        The windows of each length. The lengths are consecutive.
    replacement_module : WindowReplacement or callable
    timer : callable, optional

    Returns
    -------
    (int, float, float)
        The number of blocks, the mean value with this number removed, and the value of the original.
    """
    timer = timer or default_timer(stack.model)
    length, longest, unit = len(stack), max(candidates), 1.0
    if target.unit == "seconds_per_token":
        unit = seconds_per_token(stack.model, timer)
        logger.info(f"with all {length} blocks, each further token takes {1e3 * unit:.3g} ms")
        if unit <= target.amount:
            raise StreamlineError(
                f"The target {target} is already met: with all {length} blocks a token takes {unit:.4g} seconds on "
                f"this machine. Expected fewer seconds. Pass for example Target(seconds_per_token={0.75 * unit:.3g})."
            )
    target_ratio = target.amount / unit
    missing, misses = min(candidates) - 1, 1.0  # replacing blocks by the same number of blocks saves nothing
    reaching, reaches = longest + 1, math.nan
    guess = max(missing + 1, min(longest, missing + math.ceil((1 - target_ratio) * length)))
    measured: dict[int, list[float]] = {}

    def time_without(count: int) -> float:
        spread = _time_without(stack, target, candidates[count], replacement_module, timer)
        phase = "the first token" if target.unit == "latency" else "each further token"
        again = ", measured again," if count in measured else ","
        logger.info(
            f"without {count} of {length} blocks{again} {phase} takes {spread.median:.3f} of the original's time "
            f"({spread.low:.3f} to {spread.high:.3f})"
        )
        measured.setdefault(count, []).append(spread.median)
        return mean(measured[count])

    while True:
        while reaching - missing > 1:
            if (value := time_without(guess)) <= target_ratio:
                reaching, reaches = guess, value
            else:
                missing, misses = guess, value
            guess = _interpolate(target_ratio, missing, misses, reaching, reaches)
        if reaching > longest:
            break
        if (value := time_without(reaching)) <= target_ratio:
            reaches = value
            break
        missing, misses = reaching, value
        larger = [count for count in measured if count > missing]  # each of them reached the target
        reaching = min(larger, default=longest + 1)
        reaches = mean(measured[reaching]) if larger else math.nan
        guess = _interpolate(target_ratio, missing, misses, reaching, reaches)
    if reaching > longest:
        seconds = target.unit == "seconds_per_token"
        measure = "seconds per token" if seconds else "of the original's time"
        best = f"{misses * unit:.4g} seconds per token" if seconds else f"{misses:.3f} of it"
        raise StreamlineError(
            f"{target.amount} {measure} cannot be reached: without {longest} of {length} blocks, the longest "
            f"removable window, the model takes {best} on this machine. The rest is spent in other parts of the model "
            "(embeddings, head) and in the replacement. Choose a slower target, or protect fewer blocks."
        )
    return reaching, reaches * unit, unit


def _interpolate(target_ratio: float, missing: int, misses: float, reaching: int, reaches: float) -> int:
    """Return the number between `missing` and `reaching` where a line through the measurements meets the target."""
    if math.isnan(reaches):  # no measurement has reached the target: use the line from the whole model
        slope = (1 - misses) / missing if missing else 0.0
    else:
        slope = (misses - reaches) / (reaching - missing)
    step = math.ceil((misses - target_ratio) / slope - 1e-9) if slope > 0 else (reaching - missing) // 2
    return max(missing + 1, min(missing + step, reaching - 1))


def _time_without(
    stack: BlockStack, target: Target, candidates: list[range], replacement_module: ReplacementFor, timer: Timer
) -> Quartiles:
    """Time the model without the candidate with the fewest parameters; ties go to the window nearest the middle."""
    hazards = {window: find_hazards(stack, window) for window in candidates}
    safe = [window for window, reasons in hazards.items() if not reasons]
    if not safe:
        first, reasons = next(iter(hazards.items()))
        raise UnsupportedSurgery(
            f"The time without {len(first)} blocks cannot be measured: no window of this length can be removed. "
            f"{describe_blocks(first).capitalize()}: {'; '.join(map(str, reasons))}"
        )
    sizes = stack.parameters_per_block
    chosen = min(safe, key=lambda w: (sum(sizes[k] for k in w), abs(w.start + w.stop - len(stack))))
    module = replacement_of(replacement_module, chosen)
    module = copy.deepcopy(module) if module is replacement_module else module  # the surgeon moves it between devices
    name = f"without {len(chosen)} blocks"
    return _ratio(
        stack, target, name, lambda surgeon: insert_replacement(surgeon, chosen, module), timer, repeats=_ROUNDS
    )


def _ratio(
    stack: BlockStack, target: Target, name: str, change: Callable[[LayerSurgeon], Any], timer: Timer, **more: Any
) -> Quartiles:
    """Time the model with and without a change, in alternation, and return the quartiles of the ratio."""

    @contextmanager
    def changed() -> Iterator[nn.Module]:
        with LayerSurgeon(stack.model, stack.path, probe=False) as surgeon:
            change(surgeon)
            yield stack.model

    phase: Phase = "prefill" if target.unit == "latency" else "decode"
    models: dict[str, nn.Module | Callable[[], AbstractContextManager[nn.Module]]]
    models = {"original": stack.model, name: changed}
    if phase == "prefill":
        more["new_tokens"] = 0
    return timer(models, **more).ratio(name, phase)
