"""Rank windows for a table, with bootstrap intervals and statistics of the profile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria import Criterion, score_windows
from streamline_hooks.selection.search.configs import SearchConfig, WindowSearch
from streamline_hooks.selection.target import Target, blocks_to_remove, protected_blocks, windows, windows_for
from streamline_hooks.statistics import Profile
from streamline_hooks.task import Task

if TYPE_CHECKING:
    from streamline_hooks.selection.search.selected import Selection

# Criteria that are an offset plus or minus a statistic of the profile, which has a bootstrap interval.
_INTERVALS = {"cosine": (0.0, 1.0), "angular": (1.0, -1.0), "last_angular": (1.0, -1.0)}


@dataclass(frozen=True)
class Ranking:
    """Ranked windows, best first.

    Attributes
    ----------
    profile : Profile
        Source of the cosine, the angular distance and the intervals.
    criterion : str
    scores : str
        Name of the column of scores, such as ``cosine`` or ``sum of cosine``.
    rows : list of dict
        One per window or selection. ``first_in_resamples`` of the first row is the share of bootstrap resamples of the
        sequences in which its window also comes first.
    """

    profile: Profile
    criterion: str
    scores: str
    rows: list[dict[str, Any]]

    def report(self) -> dict[str, Any]:
        """Return the ranking as JSON values."""
        return {
            "stack": self.profile.about.get("stack"),
            "blocks": self.profile.length,
            "criterion": self.criterion,
            "scores": self.scores,
            "tokens": self.profile.tokens,
            "windows": self.rows,
        }

    def table(self) -> str:
        """Return the ranking as a plain-text table."""
        cells = []
        for row in self.rows:
            last = row.get("stop", 0) - 1
            blocks = row.get("blocks") or (f"{row['start']}-{last}" if row["length"] > 1 else str(last))
            length = row.get("length") or sum(stop - start for start, stop in row["windows"]) or "-"
            interval = "{:.4f} to {:.4f}".format(*row["interval"]) if "interval" in row else ""
            statistics = [f"{row[name]:.4f}" if name in row else "" for name in ("cosine", "angular_distance")]
            cells.append([length, blocks, f"{row['score']:.4f}", interval, *statistics])
        names = ["length", "blocks", self.scores, "95 % interval", "cosine", "angular distance"]
        profile = self.profile
        lines = [
            f"{profile.about.get('stack')}: {profile.length} blocks; {profile.tokens:,} tokens of {profile.sequences} "
            "sequences",
            "",
            table(cells, names),
        ]
        if self.rows and "first_in_resamples" in self.rows[0]:
            share = self.rows[0]["first_in_resamples"]
            lines += ["", f"The first window comes first in {share:.0%} of the resamples of the sequences."]
        return "\n".join(lines)


def rank(
    profile: Profile,
    search: SearchConfig | None = None,
    target: Target | None = None,
    *,
    model: nn.Module | None = None,
    batches: Sequence[Any] | None = None,
    task: Task | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Ranking:
    """Rank the windows of every length, or what a search finds for a target.

    Parameters
    ----------
    profile : Profile
    search : SearchConfig, optional
        By default `WindowSearch`, by cosine. ``shortlist`` is the number of rows, of each length without a target;
        ``keep`` the blocks that must stay.
    target : Target, optional
        By default windows of every length are ranked, which needs `WindowSearch` by a criterion of the profile.
    model : torch.nn.Module, optional
        For targets other than a number of blocks, and criteria and searches that run the model.
    batches : sequence of mapping, optional
        Inputs for these criteria and searches.
    task : Task, optional
    say : callable
        Receives a line for each measurement of latency.

    Returns
    -------
    Ranking

    Raises
    ------
    StreamlineError
        If the target needs a model and none is given, or the search needs a target.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import profile
    >>> from streamline_hooks.testing import tiny_model
    >>> measured = profile(tiny_model("llama", blocks=4), [torch.arange(3, 23).view(2, 10)])
    >>> [row["length"] for row in rank(measured, WindowSearch(shortlist=1)).rows]
    [1, 2, 3]
    """
    search = search or WindowSearch()
    criterion = search.resolved_criterion
    protected = protected_blocks(search.keep, profile.length)
    if target is None:
        require_target_free(search)
        rows = [row for size in _lengths(profile) for row in _best_of(profile, criterion, size, protected, search)]
        return Ranking(profile, criterion.name, criterion.name, rows)
    stack = profile.about.get("stack")
    if target.counts_blocks:
        candidates = windows(profile.length, blocks_to_remove(target, profile.length), protected)
    elif model is None:
        raise StreamlineError(f"The target {target} is measured on the model. Give the model, or a number of blocks.")
    else:
        candidates = windows_for(model, target, stack=stack, protected=protected, say=say)
    given: dict[str, Any] = {"profile": profile, "model": model, "batches": batches, "stack": stack}
    problem = search.problem(candidates, profile.length, keep=protected, task=task, **given)
    rows = [_row_of(profile, selection, criterion.name) for selection in search.find(problem)]
    if search.kind == "window" and criterion.needs == "profile" and profile.resampled:
        rows[0]["first_in_resamples"] = _share_of_first(profile, criterion, candidates)
    return Ranking(profile, criterion.name, search.score_name.format(criterion.name), rows)


def require_target_free(search: SearchConfig) -> None:
    """Raise unless a search can rank windows of every length, without a target."""
    criterion = search.resolved_criterion
    if search.kind != "window" or criterion.needs == "model":
        how = f"by {criterion.name}" if search.kind == "window" else f"{search.kind} by {criterion.name}"
        raise StreamlineError(f"Ranking {how} needs a target. Give one (remove=0.25, or add --remove 0.25).")


def _lengths(profile: Profile) -> range:
    has_last = profile.places - 1 < profile.length  # the profile ends before the last blocks, which must stay
    return range(1, profile.places - 1 + has_last)


def _best_of(
    profile: Profile, criterion: Criterion, size: int, protected: frozenset[int], search: SearchConfig
) -> list[dict[str, Any]]:
    """Return the best windows of one length."""
    try:
        free = [window for window in windows(profile.length, size, protected) if window.stop < profile.places]
    except StreamlineError:  # no run of this length is free, though shorter ones are
        return []
    scores = score_windows(criterion, free, profile=profile)
    best = sorted(zip(free, scores, strict=True), key=lambda pair: (-pair[1], pair[0].start))[: search.shortlist]
    return [_row_of_window(profile, window, score, criterion.name) for window, score in best]


def _row_of(profile: Profile, selection: Selection, criterion: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "blocks": str(selection),
        "windows": [[window.start, window.stop] for window in selection.windows],
        "silenced": [list(branch) for branch in selection.silenced],
    }
    if len(selection.windows) == 1 and not selection.silenced:
        return row | _row_of_window(profile, selection.windows[0], selection.score, criterion)
    return row | {"score": selection.score}


def _row_of_window(profile: Profile, window: range, score: float, criterion: str) -> dict[str, Any]:
    row: dict[str, Any] = {"length": len(window), "start": window.start, "stop": window.stop, "score": score}
    if window.stop < profile.places:
        row["cosine"] = profile.value("cosine", window)
        row["angular_distance"] = profile.value("angular", window)
        if criterion in _INTERVALS and profile.resampled:
            (offset, sign), statistic = _INTERVALS[criterion], cast(Any, criterion)
            is_statistic = math.isclose(score, offset + sign * profile.value(statistic, window), rel_tol=1e-9)
            if is_statistic:  # and not a sum over blocks
                row["interval"] = sorted(offset + sign * end for end in profile.interval(statistic, window))
    return row


def _share_of_first(profile: Profile, criterion: Criterion, candidates: Sequence[range]) -> float:
    """Return the share of resamples of the sequences in which the first window comes first."""

    def first(resample: Profile) -> int:
        scores = score_windows(criterion, candidates, profile=resample)
        return max(range(len(scores)), key=lambda k: (scores[k], -k))

    chosen = first(profile)
    firsts = [first(resample) for resample in profile.resamples()]
    return sum(k == chosen for k in firsts) / max(1, len(firsts))
