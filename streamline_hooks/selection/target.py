"""What a target comes to: how many blocks, or which windows, may be given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from streamline_hooks.arguments import block_numbers
from streamline_hooks.core.config import Config
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.speed import Phase, measure_speed, room_for_prompt
from streamline_hooks.selection.latency import Timer, fewest_blocks
from streamline_hooks.selection.parameters import StandInFor, parameters_by_window, parameters_of
from streamline_hooks.stack import BlockStack, find_stack

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
    """The windows that may be given up, each of which alone reaches the target.

    Of blocks and of latency, all windows are of one length. Of parameters, it is the shortest from each start, since
    blocks differ in size (a dense one beside mixtures of experts); what other parts of the model share stays, and
    does not count.

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
        What will stand in a window's place, or a function that makes it for a window. Its parameters are taken off
        those that are saved (the function is called on the meta device for that), and it is timed with the rest. A
        number of blocks does not depend on it.
    slots : int
        Slots that it takes. Of a number of blocks so many more must go; whatever the target, more than these.
    timer : callable, optional
        Times models as `measure_speed` does, of which ``functools.partial`` makes one for other prompts. By default
        that, with prompts of 512 tokens, or as many as the model has positions for.
    say : callable
        Receives a line about each measurement of a latency.

    Returns
    -------
    list of range
        In the order of their starts.

    Raises
    ------
    StreamlineError
        If the target cannot be reached; the text says what can.
    UnsupportedSurgery
        If a latency is asked for and the blocks cannot be taken out.

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
    timer = timer or partial(measure_speed, tokens=_prompt(model))
    return free[fewest_blocks(found, wanted.amount, phase, candidates, stand_in, timer, say)]


def _prompt(model: Any) -> int:
    """Tokens of a prompt to time: 512, or what the model's positions leave beside the new ones."""
    return room_for_prompt(model, _NEW, _PROMPT)


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
    """The blocks that must stay, counted from the start.

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
    """Every run of `size` consecutive blocks that holds no protected one.

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
    """From each start the shortest window whose parameters, less the stand-in's, are the wanted fraction or more."""
    length, goes_with = len(stack), parameters_by_window(stack)
    windows(length, 1 + slots, protected)  # raises if every block is protected
    total = sum(p.numel() for p in stack.model.parameters())
    wanted = target.amount * total * (1 - 1e-12)  # 0.1 of 30 is 3
    reaching, best = [], (-math.inf, range(0))

    def net(window: range) -> int:
        return goes_with(window) - parameters_of(stand_in, window)

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
