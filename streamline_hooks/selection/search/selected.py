"""`Selection`: the blocks and branches that a search finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from streamline_hooks.arguments import check_fields
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError

Scorer = Callable[[Sequence[range]], Sequence[float]]
"""Scores windows together, to share passes of the model. Higher scores go first; minus infinity must stay."""


@dataclass(frozen=True)
class Selection:
    """Blocks to remove and branches to silence.

    Attributes
    ----------
    windows : tuple of range
        Runs of consecutive blocks to remove, in order, with at least one block between two.
    silenced : tuple of (int, {"attention", "mlp"})
        Branches of other blocks to silence, in order.
    score : float
        Score of the search that found it; higher is better.

    Raises
    ------
    StreamlineError
        If it is empty or contradicts itself.

    Examples
    --------
    >>> selection = Selection.of_blocks([4, 2, 3, 7], [(0, "mlp")])
    >>> selection.windows, sorted(selection.blocks)
    ((range(2, 5), range(7, 8)), [2, 3, 4, 7])
    >>> str(selection)
    '2-4, 7, mlp of 0'
    """

    windows: tuple[range, ...]
    silenced: tuple[tuple[int, Branch], ...] = ()
    score: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.windows and not self.silenced:
            raise StreamlineError("A selection of no block and no branch gives nothing up; name one at least.")
        if any(not isinstance(w, range) or w.step != 1 or not w or w.start < 0 for w in self.windows):
            raise StreamlineError(f"A selection is made of ranges of blocks, such as range(3, 5); got {self.windows}.")
        if any(before.stop >= after.start for before, after in zip(self.windows, self.windows[1:], strict=False)):
            raise StreamlineError(
                f"The windows of a selection come in order, with a block that stays between two; got {self.windows}. "
                "Selection.of_blocks makes windows of any blocks."
            )
        gone = sorted(k for k, _ in self.silenced if k in self.blocks)
        if gone or list(self.silenced) != sorted(set(self.silenced)):
            what = f"block {gone[0]} is gone as a whole" if gone else "they come once each, in order"
            raise StreamlineError(f"The branches {self.silenced} cannot be silenced: {what}.")

    @classmethod
    def of_blocks(cls, blocks: Iterable[int], silenced: Iterable[tuple[int, Branch]] = (), score: float = 0.0) -> Self:
        """Make a selection of single blocks; consecutive ones become one window."""
        return cls(runs(blocks), tuple(sorted(silenced)), score)

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks to remove."""
        return frozenset(k for window in self.windows for k in window)

    @property
    def gone(self) -> str:
        """The blocks to remove, as text."""
        return ", ".join(f"{w.start}-{w.stop - 1}" if len(w) > 1 else str(w.start) for w in self.windows)

    def __str__(self) -> str:
        parts = [self.gone] if self.windows else []
        return ", ".join([*parts, *(f"{branch} of {k}" for k, branch in self.silenced)])


def runs(blocks: Iterable[int]) -> tuple[range, ...]:
    """Return the runs of consecutive blocks, in order."""
    found: list[range] = []
    for k in sorted(set(blocks)):
        if found and found[-1].stop == k:
            found[-1] = range(found[-1].start, k + 1)
        else:
            found.append(range(k, k + 1))
    return tuple(found)


def scores_of(score: Scorer, candidates: Sequence[range]) -> dict[range, float]:
    """Return the scores of windows without those of minus infinity."""
    scores = map(float, score(candidates)) if candidates else []
    return {w: value for w, value in zip(candidates, scores, strict=True) if value > -math.inf}


def best_windows(score: Scorer, candidates: Sequence[range]) -> list[Selection]:
    """Return a selection for each window with a score above minus infinity, the best first, ties to the earlier."""
    scored = [Selection((window,), score=value) for window, value in scores_of(score, candidates).items()]
    if not scored:
        raise StreamlineError(
            f"Of {len(candidates)} windows there is none to choose: give some without a protected block (see "
            "`windows`), of which one at least has a score above minus infinity."
        )
    return sorted(scored, key=lambda s: (-s.score, s.windows[0].start, s.windows[0].stop))
