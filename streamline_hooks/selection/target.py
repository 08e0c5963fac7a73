"""What a target comes to: how many blocks, or which windows, may be given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

from torch import nn

from streamline_hooks.arguments import check_fields, checked, whole_numbers
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.speed import Phase, measure_speed, room_for_prompt
from streamline_hooks.selection.latency import Timer, fewest_blocks
from streamline_hooks.selection.parameters import StandInFor, parameters_by_window, parameters_of
from streamline_hooks.stack import BlockStack, find_stack

_PROMPT, _NEW = 512, 16
Kind = Literal["blocks", "parameters", "latency", "decode-latency"]
_EXPECTED = (
    "a number of blocks (8), a fraction of them (0.25 or 25%), parameters:0.25 to remove that fraction of the model's "
    "parameters, or latency:0.8 or decode-latency:0.8 for at most that fraction of its time to the first, or to each "
    "further, token"
)


@dataclass(frozen=True)
class Target:
    """How much is to be given up.

    Attributes
    ----------
    amount : int or float
        Of blocks: a number, or a fraction below 1. Of parameters: the fraction that goes. Of latency: the fraction of
        the original's time that is left.
    of : {"blocks", "parameters", "latency", "decode-latency"}
        Latency is the time to the first token of a prompt, decode-latency that of each further one, both measured on
        this machine.

    Raises
    ------
    StreamlineError
        If the amount of anything but blocks is not between 0 and 1. A number of blocks is held against the model's
        by `blocks_to_remove`.

    Examples
    --------
    >>> Target.parse("8"), str(Target.parse("latency:80%"))
    (Target(amount=8, of='blocks'), 'latency:0.8')
    """

    amount: int | float
    of: Kind = "blocks"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.of not in get_args(Kind):
            raise StreamlineError(f"A target of {self.of!r} is unknown; expected one of {', '.join(get_args(Kind))}.")
        if self.of != "blocks" and (isinstance(self.amount, bool) or not 0 < self.amount < 1):
            raise StreamlineError(f"The target {self} is out of range: expected a fraction above 0 and below 1.")

    def __str__(self) -> str:
        return str(self.amount) if self.of == "blocks" else f"{self.of}:{self.amount}"

    @classmethod
    @checked()
    def parse(cls, text: str) -> Target:
        """Read a target as it is written on a command line.

        Parameters
        ----------
        text : str
            ``8``, ``0.25``, ``25%``, ``parameters:0.25``, ``latency:0.8`` or ``decode-latency:0.8``.

        Raises
        ------
        StreamlineError
            If it is none of these; the text says what is.
        """
        before, colon, after = text.strip().rpartition(":")
        kind, number = (before.strip() if colon else "blocks"), after.strip()
        try:
            if kind not in get_args(Kind):
                raise ValueError
            amount: int | float
            if number.endswith("%"):
                amount = float(number[:-1]) / 100
            else:
                amount = int(number) if number.lstrip("+-").isdigit() else float(number)
        except ValueError:
            raise StreamlineError(f"The target {text!r} is not understood; expected {_EXPECTED}.") from None
        return cls(amount, cast(Kind, kind))


def windows_for(
    model: nn.Module,
    target: Target | int | float | str,
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
    target : Target, int, float or str
        A number or a fraction means blocks; a string is read by `Target.parse`.
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
    >>> len(windows_for(tiny_model("llama"), "parameters:0.25"))
    6
    """
    wanted = Target.parse(target) if isinstance(target, str) else target
    wanted = wanted if isinstance(wanted, Target) else Target(wanted)
    found = find_stack(model, stack)
    if len(found) < 2:
        raise StreamlineError(f"{found.path} has one block, and at least one must stay; nothing can be removed.")
    if slots > len(found) - 2:
        raise StreamlineError(
            f"{slots} blocks that stand in the place of others leave nothing to remove of {len(found)}; take fewer."
        )
    if wanted.of == "blocks":
        return windows(len(found), blocks_to_remove(wanted.amount, len(found), slots), protected)
    if wanted.of == "parameters":
        return _by_parameters(found, wanted, protected, stand_in, slots)
    phase: Phase = "prefill" if wanted.of == "latency" else "decode"
    free = {size: _free(len(found), size, protected) for size in range(1 + slots, len(found))}
    candidates = {size: chosen for size, chosen in free.items() if chosen}
    if not candidates:
        windows(len(found), 1 + slots, protected)  # raises: every block is protected
    timer = timer or partial(measure_speed, tokens=_prompt(model))
    return free[fewest_blocks(found, wanted.amount, phase, candidates, stand_in, timer, say)]


def _prompt(model: Any) -> int:
    """Tokens of a prompt to time: 512, or what the model's positions leave beside the new ones."""
    return room_for_prompt(model, _NEW, _PROMPT)


def blocks_to_remove(target: int | float, length: int, slots: int = 0) -> int:
    """The number of blocks that a target comes to.

    Parameters
    ----------
    target : int or float
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
    fraction = isinstance(target, float) and 0 < target < 1
    wanted = math.floor(target * length + 0.5) if fraction else target
    if fraction and not wanted:
        raise StreamlineError(
            f"remove={target!r} comes to 0 of {length} blocks. Expected a fraction of at least {0.5 / length:.3g}, or "
            "a number of blocks. Give remove=1 to remove one block."
        )
    everything_or_one = isinstance(target, float) and target == 1.0
    if (
        isinstance(wanted, bool)
        or everything_or_one
        or not math.isfinite(wanted)
        or wanted != int(wanted)
        or wanted < 1
    ):
        raise StreamlineError(
            f"remove={target!r} is nothing that can be removed; give a number of blocks (1 to {length - 1}) or a "
            "fraction of them (above 0, below 1)."
        )
    count = int(wanted) + slots
    if count >= length:
        raise StreamlineError(
            f"remove={target!r} comes to {count} of {length} blocks; at least one block must stay. Remove less."
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
    chosen = whole_numbers(keep, "keep")
    for k in chosen:
        if not -length <= k < length:
            raise StreamlineError(f"keep={k} is out of range: the stack has {length} blocks, 0 to {length - 1}.")
    return frozenset(k % length for k in chosen)


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
