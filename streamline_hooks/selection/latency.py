"""How many blocks must go for a model to take a fraction of its time, measured on this machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation.speed import Phase, SpeedReport, Spread
from streamline_hooks.repair import place
from streamline_hooks.selection.parameters import StandInFor, made_for
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.hazards import find_hazards

Timer = Callable[..., SpeedReport]


def fewest_blocks(
    stack: BlockStack,
    wanted: float,
    phase: Phase,
    candidates: Mapping[int, list[range]],
    stand_in: StandInFor,
    timer: Timer,
    say: Callable[[str], None],
) -> int:
    """The smallest number of blocks without which the model was measured to take the wanted fraction of its time.

    A number that misses and one that reaches are brought together, guided by a line through what was measured; a
    number once measured is not measured again, so that noise cannot send it back and forth.

    Parameters
    ----------
    stack : BlockStack
    wanted : float
        Of the original's time, between 0 and 1.
    phase : {"prefill", "decode"}
        The time to the first token, or to each further one.
    candidates : mapping of int to list of range
        The windows of each length from the shortest on, without a gap.
    stand_in : StandIn or callable, optional
        See `windows_for`.
    timer : callable
        As `measure_speed`.
    say : callable
        Receives a line a measurement.

    Raises
    ------
    StreamlineError
        If the longest windows miss it.
    UnsupportedSurgery
        If no window of a length can go.
    """
    length, longest = len(stack), max(candidates)
    missing, misses = min(candidates) - 1, 1.0  # as many blocks as take their place save nothing
    reaching, reaches = longest + 1, math.nan
    guess = max(missing + 1, min(longest, missing + math.ceil((1 - wanted) * length)))
    while reaching - missing > 1:
        spread = _ratio(stack, candidates[guess], stand_in, phase, timer)
        what = "the first token" if phase == "prefill" else "each further token"
        say(
            f"without {guess} of {length} blocks, {what} takes {spread.median:.3f} of the original's time "
            f"({spread.low:.3f} to {spread.high:.3f})"
        )
        if spread.median <= wanted:
            reaching, reaches = guess, spread.median
        else:
            missing, misses = guess, spread.median
        guess = _next(wanted, missing, misses, reaching, reaches)
    if reaching > longest:
        raise StreamlineError(
            f"{wanted} of the original's time cannot be reached: without {longest} of {length} blocks, the most in a "
            f"row that may go, the model takes {misses:.3f} of it on this machine. What is not in the blocks "
            "(embeddings, head), and what stands in their place, takes the rest. Ask for less, or protect fewer."
        )
    return reaching


def _next(wanted: float, missing: int, misses: float, reaching: int, reaches: float) -> int:
    """Where a line says that the target is reached, between a number that misses and one that reaches."""
    if math.isnan(reaches):  # nothing has reached it: from the whole model on
        slope = (1 - misses) / missing if missing else 0.0
    else:
        slope = (misses - reaches) / (reaching - missing)
    step = math.ceil((misses - wanted) / slope - 1e-9) if slope > 0 else (reaching - missing) // 2
    return max(missing + 1, min(missing + step, reaching - 1))


def _ratio(stack: BlockStack, candidates: list[range], stand_in: StandInFor, phase: Phase, timer: Timer) -> Spread:
    """The time without one of the candidates: of those that can go, the one with the fewest parameters.

    Where blocks differ, the others save as much or more. Among equals it is the one nearest to the middle.
    """
    hazards = {window: find_hazards(stack, window) for window in candidates}
    safe = [window for window, against in hazards.items() if not against]
    if not safe:
        first, against = next(iter(hazards.items()))
        raise UnsupportedSurgery(
            f"The time without {len(first)} blocks cannot be measured: no such window can go. Blocks {first.start} to "
            f"{first.stop - 1}: {'; '.join(map(str, against))}"
        )
    sizes = stack.parameters_per_block
    chosen = min(safe, key=lambda w: (sum(sizes[k] for k in w), abs(w.start + w.stop - len(stack))))
    made = made_for(stand_in, chosen)
    made = copy.deepcopy(made) if made is stand_in else made  # the surgeon moves it to the blocks' device

    @contextmanager
    def without() -> Iterator[nn.Module]:
        with LayerSurgeon(stack.model, stack.path, probe=False) as surgeon:
            place(surgeon, chosen, made)
            yield stack.model

    more: dict[str, Any] = {"new_tokens": 0} if phase == "prefill" else {}
    name = f"without {len(chosen)} blocks"
    return timer({"original": stack.model, name: without}, **more).ratio(name, phase)
