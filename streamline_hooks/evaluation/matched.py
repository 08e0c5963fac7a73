"""How far what a model writes goes along with what its original writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.continuations import common
from streamline_hooks.evaluation.writing import Written


@dataclass(frozen=True)
class Matched:
    """Of several prompts, each written on greedily by both.

    Attributes
    ----------
    lengths : tuple of int
        Tokens before the first that differs.
    same : tuple of bool
        Whether nothing differs, the end included.

    Examples
    --------
    >>> mine = Written("", "", (5, 6, 7), ended=False)
    >>> theirs = Written("", "", (5, 6, 8), ended=False)
    >>> print(Matched.of([mine, mine], [theirs, mine]))
    2.5 tokens until the first that differs, 50% of 2 texts the same
    """

    lengths: tuple[int, ...]
    same: tuple[bool, ...]

    @classmethod
    def of(cls, texts: Sequence[Written], reference: Sequence[Written]) -> Matched:
        """Compare what was written from the same prompts, in the same order.

        Raises
        ------
        StreamlineError
            If the prompts are others, or there are none.
        """
        if not texts or [text.prompt for text in texts] != [text.prompt for text in reference]:
            raise StreamlineError(
                f"{len(texts)} texts and {len(reference)} of the original are not of the same prompts in one order."
            )
        pairs = list(zip(texts, reference, strict=True))
        return cls(
            tuple(common(a.tokens, b.tokens) for a, b in pairs),
            tuple(a.tokens == b.tokens and a.ended == b.ended for a, b in pairs),
        )

    @property
    def length(self) -> float:
        """Mean tokens before the first that differs."""
        return statistics.fmean(self.lengths)

    @property
    def share(self) -> float:
        """Share of the texts that are the same."""
        return statistics.fmean(self.same)

    def __str__(self) -> str:
        count = len(self.same)
        return f"{self.length:.1f} tokens until the first that differs, {self.share:.0%} of {count} texts the same"
