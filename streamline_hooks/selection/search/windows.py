"""The best window of consecutive blocks by any score."""

from __future__ import annotations

from collections.abc import Sequence

from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.search.selected import Scorer, Selection, scores_of


def best_windows(score: Scorer, candidates: Sequence[range]) -> list[Selection]:
    """Rank windows of consecutive blocks.

    Parameters
    ----------
    score : callable
        Scores a sequence of windows; the higher, the sooner one goes.
    candidates : sequence of range
        The windows that may go, as `windows` or `windows_for` makes them without the protected blocks.

    Returns
    -------
    list of Selection
        All that have a score above minus infinity, the best first; ties go to the earlier window.

    Raises
    ------
    StreamlineError
        If there is none.

    Examples
    --------
    >>> best_windows(lambda windows: [-abs(w.start - 2) for w in windows], [range(0, 2), range(1, 3), range(3, 5)])[0]
    Selection(windows=(range(1, 3),), silenced=(), score=-1.0)
    """
    scored = [Selection((window,), score=value) for window, value in scores_of(score, candidates).items()]
    if not scored:
        raise StreamlineError(
            f"Of {len(candidates)} windows there is none to choose: give some without a protected block (see "
            "`windows`), of which one at least has a score above minus infinity."
        )
    return sorted(scored, key=lambda s: (-s.score, s.windows[0].start, s.windows[0].stop))
