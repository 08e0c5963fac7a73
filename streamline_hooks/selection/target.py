"""`Target`: the amount to remove; and the windows with a given number of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from streamline_hooks.core import Config, StreamlineError, block_indices


@dataclass(frozen=True)
class Target(Config):
    """Amount to remove. Exactly one field must be set.

    Attributes
    ----------
    blocks : int, optional
        Number of blocks to remove, at least 1.
    fraction : float, optional
        Fraction of the blocks to remove, rounded half up.
    parameters : float, optional
        Fraction of the model's parameters to remove.
    memory_bytes : int, optional
        Maximum bytes of the remaining weights, including the replacement. A shared weight counts once; buffers do not
        count, as in `CompressionResult.size_in_bytes`.
    latency : float, optional
        Maximum time to the first token, as a fraction of the original's time, measured on this machine.
    decode_latency : float, optional
        Maximum time per further token, as a fraction of the original's time, measured on this machine.
    seconds_per_token : float, optional
        Maximum seconds per generated token after the prompt, at batch size 1, measured on this machine.

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
    memory_bytes: int | float | None = None
    seconds_per_token: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self._fields_set) != 1:
            listed = ", ".join(f"{name}={value!r}" for name, value in self._fields_set.items()) or "no field"
            raise StreamlineError(
                f"Target received {listed}. Expected exactly one of {', '.join(f.name for f in fields(self))}. Set "
                "one, as in Target(fraction=0.25)."
            )
        if self.unit == "blocks" and self.amount < 1:
            raise StreamlineError(f"blocks={self.amount} is out of range. Expected 1 or more. Pass a whole number.")
        if self.unit == "memory_bytes":
            if self.amount < 1:
                raise StreamlineError(
                    f"memory_bytes={self.amount} is out of range. Expected 1 or more. Pass a number of bytes, such as "
                    "90e6."
                )
            object.__setattr__(self, "memory_bytes", int(self.amount))
        elif self.unit == "seconds_per_token":
            if not self.amount > 0:
                raise StreamlineError(
                    f"seconds_per_token={self.amount} is out of range. Expected a number above 0. Pass seconds, such "
                    "as 0.02."
                )
        elif self.unit != "blocks" and not 0 < self.amount < 1:
            raise StreamlineError(
                f"{self.unit}={self.amount} is out of range. Expected a fraction above 0 and below 1. Pass 0.25 for a "
                "quarter."
            )

    @property
    def _fields_set(self) -> dict[str, int | float]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def unit(self) -> str:
        """The name of the field that is set."""
        return next(iter(self._fields_set))

    @property
    def amount(self) -> int | float:
        """The value of the field that is set."""
        return next(iter(self._fields_set.values()))

    @property
    def counts_blocks(self) -> bool:
        """Whether the target is a number or a fraction of the blocks."""
        return self.unit in ("blocks", "fraction")

    @property
    def is_timed(self) -> bool:
        """Whether the target is a time, which is measured on this machine."""
        return self.unit in ("latency", "decode_latency", "seconds_per_token")

    def to_dict(self) -> dict[str, Any]:
        """Return the field that is set, with its value."""
        return self._fields_set

    def __str__(self) -> str:
        """Return the short form used on the command line."""
        if self.unit == "memory_bytes":
            return f"memory:{self.amount // 10**6}MB" if self.amount % 10**6 == 0 else f"memory:{self.amount}B"
        return str(self.amount) if self.counts_blocks else f"{self.unit.replace('_', '-')}:{self.amount}"

    def __repr__(self) -> str:
        return f"Target({self.unit}={self.amount!r})"

    @classmethod
    def of(cls, remove: Target | int | float) -> Target:
        """Convert a number to a target: 8 to ``Target(blocks=8)``, 0.25 to ``Target(fraction=0.25)``."""
        if isinstance(remove, Target):
            return remove
        if isinstance(remove, float) and 0 < remove < 1:
            return cls(fraction=remove)
        number = not isinstance(remove, bool) and isinstance(remove, (int, float, Integral)) and math.isfinite(remove)
        if not number or remove != int(remove) or remove < 1 or (isinstance(remove, float) and remove == 1):
            raise StreamlineError(
                f"remove={remove!r} is not a valid amount. Expected a number of blocks (1 or more), a fraction of the "
                "blocks (above 0, below 1), or a Target. Pass for example remove=8, remove=0.25 or "
                "remove=Target(parameters=0.25)."
            )
        return cls(blocks=int(remove))


def blocks_to_remove(target: Target | int | float, length: int, slots: int = 0) -> int:
    """Return the number of blocks that a target removes.

    Parameters
    ----------
    target : Target, int or float
        A number or a fraction of the blocks.
    length : int
        Number of blocks of the stack.
    slots : int
        Number of block slots that the replacement occupies. As many additional blocks are removed.

    Returns
    -------
    int

    Raises
    ------
    StreamlineError
        If no block or every block would be removed.

    Examples
    --------
    >>> blocks_to_remove(0.25, 30), blocks_to_remove(8, 30, slots=1)
    (8, 9)
    """
    target = Target.of(target)
    requested = target.blocks if target.fraction is None else math.floor(target.fraction * length + 0.5)
    if not requested:
        raise StreamlineError(
            f"{target!r} removes 0 of {length} blocks. Expected a fraction of at least {0.5 / length:.3g}, or a number "
            "of blocks. Pass remove=1 to remove one block."
        )
    count = requested + slots
    if count >= length:
        raise StreamlineError(
            f"{target!r} removes {count} of {length} blocks. At least one block must stay. Remove less."
        )
    return count


def protected_blocks(protect: Iterable[int], length: int) -> frozenset[int]:
    """Convert block indices, which may be negative, to a set of non-negative indices.

    Raises StreamlineError if an index is out of range.
    """
    return frozenset(block_indices(protect, length, "protect"))


def windows_of_size(length: int, size: int, protected: frozenset[int] = frozenset()) -> list[range]:
    """Return all windows of `size` consecutive blocks that contain no protected block.

    Parameters
    ----------
    length : int
        Number of blocks of the stack.
    size : int
        Number of blocks of a window.
    protected : frozenset of int
        Blocks that must stay, as non-negative indices.

    Returns
    -------
    list of range

    Raises
    ------
    StreamlineError
        If there is no such window.

    Examples
    --------
    >>> windows_of_size(4, 2, frozenset({0}))
    [range(1, 3), range(2, 4)]
    """
    free = unprotected_windows(length, size, protected)
    if not free:
        listed = ", ".join(map(str, sorted(protected))) or "none"
        raise StreamlineError(
            f"No window of {size} consecutive blocks out of {length} is without a protected block ({listed}). Remove "
            "less, or protect fewer blocks."
        )
    return free


def unprotected_windows(length: int, size: int, protected: frozenset[int]) -> list[range]:
    """Return all windows of `size` consecutive blocks without a protected block; the list may be empty."""
    every = (range(start, start + size) for start in range(length - size + 1))
    return [window for window in every if not protected & set(window)]
