"""Which windows come first by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamline_hooks.selection.criteria import cosine
from streamline_hooks.statistics import StateSimilarity

Criterion = Callable[[StateSimilarity, range], float]


@dataclass(frozen=True)
class ScoredWindow:
    """A window of blocks and its score.

    Attributes
    ----------
    window : range
    score : float
        By the criterion that ranked it; the higher, the sooner it goes.
    """

    window: range
    score: float


def ranked(
    similarity: StateSimilarity, candidates: Sequence[range], criterion: Criterion = cosine
) -> list[ScoredWindow]:
    """Rank windows by a criterion, the best first.

    Parameters
    ----------
    similarity : StateSimilarity
    candidates : sequence of range
    criterion : callable
        Scores a window; higher is better.

    Returns
    -------
    list of ScoredWindow
        Ties go to the earlier window.
    """
    scored = [ScoredWindow(window, criterion(similarity, window)) for window in candidates]
    return sorted(scored, key=lambda s: (-s.score, s.window.start))
