"""`Target`: how much to remove, and the windows that reach it by blocks, parameters or measured latency."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import nn

from streamline_hooks.arguments import block_numbers
from streamline_hooks.core.config import Config
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation.speed import Phase, SpeedReport, Spread, measure_speed, room_for_prompt
from streamline_hooks.repair import place
from streamline_hooks.repair.folded import Folded, Scaled
from streamline_hooks.repair.stand_in import StandIn
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.hazards import find_hazards
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced

StandInFor = StandIn | Callable[[range], StandIn]
"""The replacement of every window, or a function that makes one for a window."""

Timer = Callable[..., SpeedReport]
_PROMPT, _NEW = 512, 16


@dataclass(frozen=True)
class Target(Config):
    """How much to remove. Exactly one field is set.

    Attributes
    ----------
    blocks : int, optional
        Number of blocks, at least 1.
    fraction : float, optional
        Fraction of the blocks, rounded half up.
    parameters : float, optional
        Fraction of the model's parameters to remove.
    latency : float, optional
        Time to the first token of a prompt, as a fraction of the original's, measured on this machine.
    decode_latency : float, optional
        Time for each further token, as a fraction of the original's, measured on this machine.

    Raises
    ------
    StreamlineError
        If not exactly one field is set, a number of blocks is below 1, or a fraction is not between 0 and 1. Whether
        the model has as many blocks is checked by `blocks_to_remove`.

    Examples
    --------
    >>> Target(blocks=8), Target.of(0.25)
    (Target(blocks=8), Target(fraction=0.25))
    """

    blocks: int | None = None
    fraction: float | None = None
    parameters: float | None = None
    latency: float | None = None
    decode_latency: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self._given) != 1:
            listed = ", ".join(f"{name}={value!r}" for name, value in self._given.items()) or "nothing"
            raise StreamlineError(
                f"A target was given {listed}. Expected exactly one of {', '.join(f.name for f in fields(self))}. Set "
                "one, as in Target(fraction=0.25)."
            )
        if self.unit == "blocks" and self.amount < 1:
            raise StreamlineError(f"blocks={self.amount} removes nothing. Expected 1 or more. Give a whole number.")
        if self.unit != "blocks" and not 0 < self.amount < 1:
            raise StreamlineError(
                f"{self.unit}={self.amount} is out of range. Expected a fraction above 0 and below 1. Give 0.25 for a "
                "quarter."
            )

    @property
    def _given(self) -> dict[str, int | float]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def unit(self) -> str:
        """The name of the field that is set."""
        return next(iter(self._given))

    @property
    def amount(self) -> int | float:
        """The value of the field that is set."""
        return next(iter(self._given.values()))

    @property
    def counts_blocks(self) -> bool:
        """Whether this is a number or a fraction of the blocks."""
        return self.unit in ("blocks", "fraction")

    def to_dict(self) -> dict[str, Any]:
        """Return the field that is set."""
        return self._given

    def __str__(self) -> str:
        """Return the short form of the command line."""
        return str(self.amount) if self.counts_blocks else f"{self.unit.replace('_', '-')}:{self.amount}"

    def __repr__(self) -> str:
        return f"Target({self.unit}={self.amount!r})"

    @classmethod
    def of(cls, remove: Target | int | float) -> Target:
        """Return the target that a plain number stands for: 8 for blocks=8, 0.25 for fraction=0.25.

        Raises
        ------
        StreamlineError
            If the number is neither a number of blocks nor a fraction of them.
        """
        if isinstance(remove, Target):
            return remove
        if isinstance(remove, float) and 0 < remove < 1:
            return cls(fraction=remove)
        number = not isinstance(remove, bool) and isinstance(remove, (int, float, Integral)) and math.isfinite(remove)
        if not number or remove != int(remove) or remove < 1 or (isinstance(remove, float) and remove == 1):
            raise StreamlineError(
                f"remove={remove!r} removes no blocks. Expected a number of blocks (1 or more), a fraction of them "
                "(above 0, below 1), or a Target. Give for example remove=8, remove=0.25 or "
                "remove=Target(parameters=0.25)."
            )
        return cls(blocks=int(remove))


def windows_for(
    model: nn.Module,
    target: Target | int | float,
    *,
    stack: str | None = None,
    protected: frozenset[int] = frozenset(),
    stand_in: StandInFor = None,
    slots: int = 0,
    timer: Timer | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[range]:
    """Return the windows that each alone reach a target.

    For blocks and latency, all windows have one length. For parameters it is the shortest window from each start, since
    blocks may differ in size; parameters that other parts of the model share do not count.

    Parameters
    ----------
    model : torch.nn.Module
    target : Target, int or float
        A plain number means a number or a fraction of the blocks.
    stack : str, optional
        Path of the stack, see `find_stack`.
    protected : frozenset of int
        Blocks that must stay, see `protected_blocks`.
    stand_in : StandIn or callable, optional
        The replacement of each window, or a function that makes it for a window (also on the meta device). Its
        parameters are subtracted from those saved, and it is timed with the rest.
    slots : int
        Number of slots that it takes: that many more blocks are removed for a number of blocks.
    timer : callable, optional
        Times models as `measure_speed` does; by default that, with prompts of 512 tokens, or as many as the model has
        positions for.
    say : callable
        Receives a line for each measurement of latency.

    Returns
    -------
    list of range
        In the order of their starts.

    Raises
    ------
    StreamlineError
        If the target cannot be reached.
    UnsupportedSurgery
        If the target is a latency and the blocks cannot be removed.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> windows_for(tiny_model("llama"), 7, protected=frozenset({0}))
    [range(1, 8)]
    >>> len(windows_for(tiny_model("llama"), Target(parameters=0.25)))
    6
    """
    wanted = Target.of(target)
    found = find_stack(model, stack)
    if len(found) < 2:
        raise StreamlineError(f"{found.path} has one block, and at least one must stay; nothing can be removed.")
    if slots > len(found) - 2:
        raise StreamlineError(
            f"{slots} blocks that stand in the place of others leave nothing to remove of {len(found)}; take fewer."
        )
    if wanted.counts_blocks:
        return windows(len(found), blocks_to_remove(wanted, len(found), slots), protected)
    if wanted.unit == "parameters":
        return _by_parameters(found, wanted, protected, stand_in, slots)
    phase: Phase = "prefill" if wanted.unit == "latency" else "decode"
    free = {size: _free(len(found), size, protected) for size in range(1 + slots, len(found))}
    candidates = {size: chosen for size, chosen in free.items() if chosen}
    if not candidates:
        windows(len(found), 1 + slots, protected)  # raises: every block is protected
    timer = timer or partial(measure_speed, tokens=room_for_prompt(model, _NEW, _PROMPT))
    return free[_fewest_blocks(found, wanted.amount, phase, candidates, stand_in, timer, say)]


def blocks_to_remove(target: Target | int | float, length: int, slots: int = 0) -> int:
    """Return the number of blocks that a target removes.

    Parameters
    ----------
    target : Target, int or float
        A number of blocks, or a fraction of the blocks below 1; a fraction is rounded half up.
    length : int
        The number of blocks of the stack.
    slots : int
        The slots that the replacement takes: that many more blocks must go for the stack to shrink by the target.

    Returns
    -------
    int
        The length of the window to remove.

    Raises
    ------
    StreamlineError
        If that is nothing, or everything.

    Examples
    --------
    >>> blocks_to_remove(0.25, 30), blocks_to_remove(8, 30, slots=1)
    (8, 9)
    """
    target = Target.of(target)
    wanted = target.blocks if target.fraction is None else math.floor(target.fraction * length + 0.5)
    if not wanted:
        raise StreamlineError(
            f"{target!r} removes 0 of {length} blocks. Expected a fraction of at least {0.5 / length:.3g}, or a number "
            "of blocks. Give remove=1 to remove one block."
        )
    count = wanted + slots
    if count >= length:
        raise StreamlineError(
            f"{target!r} removes {count} of {length} blocks. At least one block must stay. Remove less."
        )
    return count


def protected_blocks(keep: Iterable[int], length: int) -> frozenset[int]:
    """Return the blocks that must stay, counted from the start.

    Parameters
    ----------
    keep : iterable of int
        Block numbers, negative ones counted from the end.
    length : int

    Raises
    ------
    StreamlineError
        If a number is out of range.
    """
    return frozenset(block_numbers(keep, length, "keep"))


def windows(length: int, size: int, protected: frozenset[int] = frozenset()) -> list[range]:
    """Return every run of `size` consecutive blocks without a protected one.

    Raises
    ------
    StreamlineError
        If there is none.

    Examples
    --------
    >>> windows(4, 2, frozenset({0}))
    [range(1, 3), range(2, 4)]
    """
    free = _free(length, size, protected)
    if not free:
        listed = ", ".join(map(str, sorted(protected))) or "none"
        raise StreamlineError(
            f"No run of {size} consecutive blocks among {length} is free of the protected ones ({listed}). Remove "
            "less, or protect fewer."
        )
    return free


def _by_parameters(
    stack: BlockStack, target: Target, protected: frozenset[int], stand_in: StandInFor, slots: int
) -> list[range]:
    """Return from each start the shortest window that saves the wanted fraction of the parameters."""
    length, goes_with = len(stack), _parameters_by_window(stack)
    windows(length, 1 + slots, protected)  # raises if every block is protected
    total = sum(p.numel() for p in stack.model.parameters())
    wanted = target.amount * total * (1 - 1e-12)  # 0.1 of 30 is 3
    reaching, best = [], (-math.inf, range(0))

    def net(window: range) -> int:
        return goes_with(window) - _parameters_of(stand_in, window)

    for start in range(length):
        window = range(start, start)
        while window.stop < length and window.stop not in protected and len(window) < length - 1:
            window = range(start, window.stop + 1)
            if len(window) > slots and goes_with(window) >= wanted and net(window) >= wanted:
                reaching.append(window)
                break
        else:
            if len(window) > slots:
                best = max(best, (net(window), window), key=lambda pair: pair[0])
    if not reaching:
        saved, window = best
        raise StreamlineError(
            f"The target {target} cannot be reached: giving up blocks {window.start} to {window.stop - 1} saves "
            f"{int(saved):,} of the model's {total:,} parameters ({saved / total:.1%}), the most of the longest runs "
            "of unprotected blocks. What is not in the blocks (embeddings, head) stays, and what stands in their place "
            "comes in. Remove less, or protect fewer."
        )
    return reaching


def _free(length: int, size: int, protected: frozenset[int]) -> list[range]:
    every = (range(start, start + size) for start in range(length - size + 1))
    return [window for window in every if not protected & set(window)]


def _parameters_by_window(stack: BlockStack) -> Callable[[range], int]:
    """Return a function that counts the parameters that are removed with a window.

    Block k has position 2k + 1. Modules spliced before it have position 2k, which goes only with the blocks on both
    sides; those spliced after the last block go with it. A parameter is removed if all positions that hold it are.
    """
    blocks = {id(block) for block in stack.blocks}
    held: dict[int, tuple[nn.Parameter, set[int]]] = {}
    for k, block in enumerate(stack.blocks):
        before = [p for module in spliced(block, BEFORE) for p in module.parameters()]
        after = [p for module in spliced(block, AFTER) for p in module.parameters()]
        apart = {id(p) for p in (*before, *after)}
        own = [p for p in block.parameters() if id(p) not in apart]
        for position, parameters in ((2 * k, before), (2 * k + 1, own), (2 * k + 2, after)):
            for p in parameters:
                held.setdefault(id(p), (p, set()))[1].add(position)
    for p in _outside(stack.model, blocks):
        held.pop(id(p), None)
    sizes: Counter[tuple[int, int]] = Counter()
    for p, places in held.values():
        sizes[min(places), max(places)] += p.numel()

    def count(window: range) -> int:
        first, last = 2 * window.start + 1, 2 * window.stop - (window.stop < len(stack))
        return sum(size for (low, high), size in sizes.items() if first <= low and high <= last)

    return count


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Parameter]:
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None and id(child) not in blocks:
            yield from _outside(child, blocks)


def _parameters_of(stand_in: StandInFor, window: range) -> int:
    """Count the parameters of a window's replacement, made on the meta device; what is folded has none."""
    with torch.device("meta"):
        made = _made_for(stand_in, window)
    return sum(p.numel() for p in made.parameters()) if isinstance(made, nn.Module) else 0


def _made_for(stand_in: StandInFor, window: range) -> StandIn:
    """Return the replacement of a window."""
    if stand_in is None or isinstance(stand_in, (nn.Module, Folded, Scaled)):
        return stand_in
    return stand_in(window)


def _fewest_blocks(
    stack: BlockStack,
    wanted: float,
    phase: Phase,
    candidates: Mapping[int, list[range]],
    stand_in: StandInFor,
    timer: Timer,
    say: Callable[[str], None],
) -> int:
    """Return the least number of blocks without which the model was measured to take `wanted` of its time.

    `candidates` are the windows of each length, without a gap. A number that misses the target and one that reaches it
    are brought together, guided by a line through the measurements. No number is measured twice, so that noise cannot
    make the search go back and forth.
    """
    length, longest = len(stack), max(candidates)
    missing, misses = min(candidates) - 1, 1.0  # replacing as many blocks by as many saves nothing
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
    """Return where a line through the measurements reaches the target, between the two numbers."""
    if math.isnan(reaches):  # nothing has reached it: from the whole model on
        slope = (1 - misses) / missing if missing else 0.0
    else:
        slope = (misses - reaches) / (reaching - missing)
    step = math.ceil((misses - wanted) / slope - 1e-9) if slope > 0 else (reaching - missing) // 2
    return max(missing + 1, min(missing + step, reaching - 1))


def _ratio(stack: BlockStack, candidates: list[range], stand_in: StandInFor, phase: Phase, timer: Timer) -> Spread:
    """Time the model without the candidate of the fewest parameters, so that the others save as much or more.

    Among equals it is the one nearest to the middle.
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
    made = _made_for(stand_in, chosen)
    made = copy.deepcopy(made) if made is stand_in else made  # the surgeon moves it to the blocks' device

    @contextmanager
    def without() -> Iterator[nn.Module]:
        with LayerSurgeon(stack.model, stack.path, probe=False) as surgeon:
            place(surgeon, chosen, made)
            yield stack.model

    more: dict[str, Any] = {"new_tokens": 0} if phase == "prefill" else {}
    name = f"without {len(chosen)} blocks"
    return timer({"original": stack.model, name: without}, **more).ratio(name, phase)
