"""Search for the blocks to remove, and rank windows for a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, table, validate_arguments
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.repair import NoneConfig, ReplacementConfig
from streamline_hooks.selection.criteria import Criterion
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.search_config import SearchConfig, WindowSearch
from streamline_hooks.selection.selection import SearchProblem, Selection
from streamline_hooks.selection.target import Target, blocks_to_remove, protected_blocks, windows_of_size
from streamline_hooks.selection.target_windows import target_windows
from streamline_hooks.statistics import Profile

# Criteria that are an offset plus or minus a statistic with a bootstrap interval.
_INTERVALS = {"cosine": (0.0, 1.0), "angular": (1.0, -1.0), "last_angular": (1.0, -1.0)}


@dataclass(frozen=True)
class Ranking:
    """Ranked windows or selections, best first; returned by `rank_windows`.

    Attributes
    ----------
    profile : Profile
        Source of the cosines, angular distances and intervals.
    criterion : str
        Name of the criterion.
    scores : str
        Heading of the score column, such as ``cosine`` or ``sum of cosine``.
    rows : list of dict
        One row per window or selection. ``first_in_resamples`` of the first row is the fraction of bootstrap resamples
        of the sequences in which its window also ranks first.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import profile
    >>> from streamline_hooks.testing import tiny_model
    >>> ranking = rank_windows(profile(tiny_model("llama", blocks=4), [torch.arange(3, 23).view(2, 10)]))
    >>> ranking.rows[0]["length"], ranking.report()["blocks"]
    (1, 4)
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
            lines += ["", f"The first window ranks first in {share:.0%} of the resamples of the sequences."]
        return "\n".join(lines)


def rank_windows(
    profile: Profile,
    search: SearchConfig | None = None,
    target: Target | None = None,
    *,
    model: nn.Module | None = None,
    batches: Sequence[Any] | None = None,
    task: Task | None = None,
    replacement: ReplacementConfig | None = None,
    is_allowed: Callable[[Sequence[range]], bool] | None = None,
) -> Ranking:
    """Rank the windows of every length, or the selections that a search returns for a target.

    Parameters
    ----------
    profile : Profile
        Profile of the model.
    search : SearchConfig, optional
        The search; by default `WindowSearch`. Its ``shortlist`` is the number of rows: in total with a target, per
        length without.
    target : Target, optional
        How much to remove. By default windows of every length are ranked, which requires `WindowSearch` with a
        criterion that needs only the profile.
    model : torch.nn.Module, optional
        Required by targets that do not count blocks, and by criteria and searches that run the model.
    batches : sequence of mapping, optional
        Inputs for criteria and searches that run the model.
    task : Task, optional
        The model's task, for criteria that compare outputs. By default derived from the model's class.
    replacement : ReplacementConfig, optional
        The replacement of the removed blocks, for targets. A replacement that occupies a block slot makes windows one
        block longer. By default the blocks are only removed.
    is_allowed : callable, optional
        Whether the windows of a selection may be removed together, for targets. By default all may.

    Returns
    -------
    Ranking

    Raises
    ------
    StreamlineError
        If the target or the search requires a model and none is passed, or the search requires a target.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import profile
    >>> from streamline_hooks.testing import tiny_model
    >>> measured = profile(tiny_model("llama", blocks=4), [torch.arange(3, 23).view(2, 10)])
    >>> [row["length"] for row in rank_windows(measured, WindowSearch(shortlist=1)).rows]
    [1, 2, 3]
    """
    search = search or WindowSearch()
    criterion = search.resolved_criterion
    protected = protected_blocks(search.protect, profile.length)
    if target is None:
        require_target_free(search)
        has_last = (
            profile.num_boundaries - 1 < profile.length
        )  # the profile ends before the last blocks, which must stay
        sizes = range(1, profile.num_boundaries - 1 + has_last)
        rows = [row for size in sizes for row in _best_of(profile, criterion, size, protected, search)]
        return Ranking(profile, criterion.name, criterion.name, rows)
    problem, selections = _search(
        profile, target, search, replacement or NoneConfig(), model, batches, task, is_allowed
    )
    rows = [_row_of(profile, selection, criterion.name) for selection in selections]
    if search.kind == "window" and criterion.needs == "profile" and profile.resampled:
        rows[0]["first_in_resamples"] = _share_of_first(profile, criterion, problem.candidates)
    return Ranking(profile, criterion.name, search.score_name.format(criterion.name), rows)


@validate_arguments()
def search(
    profile: Profile,
    remove: Target | int | float = 0.25,
    config: SearchConfig | None = None,
    *,
    replacement: ReplacementConfig | None = None,
    model: nn.Module | None = None,
    batches: Sequence[Batch | Tensor] | None = None,
    task: Task | None = None,
) -> list[Selection]:
    """Search for blocks to remove, and return a shortlist of selections, best first by the criterion.

    Pass the shortlist to `verify_shortlist`, which repairs the selections and compares them with the original: a
    criterion alone often prefers a window that is hard to repair. To fit single windows, pass ``selection.windows`` to
    `fit_windows`.

    Parameters
    ----------
    profile : Profile
        Profile of the model.
    remove : Target, int or float
        How much to remove: a number of blocks, a fraction of the blocks, or a `Target`.
    config : SearchConfig, optional
        The search; by default `WindowSearch`, a single window of consecutive blocks (LLM-Streamline, arXiv 2403.19135).
    replacement : ReplacementConfig, optional
        The replacement of the removed blocks. A replacement that occupies a block slot makes windows one block longer.
    model : torch.nn.Module, optional
        The profiled model. Required by targets that do not count blocks, and by criteria and searches that run the
        model.
    batches : sequence of Tensor or mapping, optional
        Inputs for criteria and searches that run the model.
    task : Task, optional
        The model's task, for criteria that compare outputs. By default derived from the model's class.

    Returns
    -------
    list of Selection
        At most ``config.shortlist`` selections.

    Raises
    ------
    StreamlineError
        If the target or the criterion requires a model and none is passed, or no selection reaches the target.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import profile, search
    >>> from streamline_hooks.testing import tiny_model
    >>> measured = profile(tiny_model("llama"), [torch.arange(3, 43).view(2, 20)])
    >>> [len(selection.windows[0]) for selection in search(measured, remove=2)][:3]
    [2, 2, 2]
    """
    replacement = replacement or NoneConfig()
    return _search(profile, Target.of(remove), config or WindowSearch(), replacement, model, batches, task)[1]


def _search(
    profile: Profile,
    target: Target,
    config: SearchConfig,
    replacement: ReplacementConfig,
    model: nn.Module | None,
    batches: Sequence[Batch | Tensor] | None,
    task: Task | None,
    is_allowed: Callable[[Sequence[range]], bool] | None = None,
) -> tuple[SearchProblem, list[Selection]]:
    """Return the search problem and the selections."""
    stack, slots = profile.about.get("stack"), config.slots(replacement)
    protected = protected_blocks(config.protect, profile.length)
    if target.counts_blocks:
        candidates = windows_of_size(profile.length, blocks_to_remove(target, profile.length, slots), protected)
    elif model is None:
        raise StreamlineError(
            f"search: the target {target} requires a model, but model=None. Expected a number or a fraction of the "
            "blocks without a model. Pass model=..., or change the target."
        )
    else:
        make = partial(replacement.make, find_stack(model, stack))
        options: dict[str, Any] = {"protected": protected, "replacement_module": make, "slots": slots}
        candidates = list(target_windows(model, target, stack=stack, **options).windows)
    config.check(target, min(map(len, candidates)), replacement)
    allowed = is_allowed or (lambda windows: True)
    if config.number_of_windows == 1:
        candidates = [window for window in candidates if allowed([window])] or candidates
    criterion = config.resolved_criterion
    if model is None and (config.runs_model or criterion.needs == "model"):
        raise StreamlineError(
            f"search: the search {config.kind!r} with criterion {criterion.name} runs the model, but model=None. "
            "Expected a model and batches. Pass model=... and batches=..., or use a criterion that needs only the "
            "profile, such as cosine."
        )
    problem = config.problem(
        candidates,
        profile.length,
        protect=protected,
        profile=profile,
        model=model,
        batches=batches,
        stack=stack,
        task=task,
        shortest=replacement.slots + 1,
    )
    selections = [selection for selection in config.find(problem) if allowed(selection.windows)]
    if not selections:
        raise StreamlineError(
            f"search: after no removal of {target} something is left to train. Expected a replacement with parameters, "
            "or healing that matches a block. Change the config."
        )
    return problem, selections


def require_target_free(search: SearchConfig) -> None:
    """Raise StreamlineError unless the search can rank windows of every length without a target."""
    criterion = search.resolved_criterion
    if search.kind != "window" or criterion.needs == "model":
        ranking = f"by {criterion.name}" if search.kind == "window" else f"{search.kind} by {criterion.name}"
        raise StreamlineError(
            f"Ranking {ranking} needs a target: only a window search by a criterion of the profile ranks windows of "
            "every length. Expected an amount to remove. Pass remove=0.25, or add --remove 0.25."
        )


def _best_of(
    profile: Profile, criterion: Criterion, size: int, protected: frozenset[int], search: SearchConfig
) -> list[dict[str, Any]]:
    """Return the best windows of one length."""
    try:
        free = [
            window
            for window in windows_of_size(profile.length, size, protected)
            if window.stop < profile.num_boundaries
        ]
    except StreamlineError:  # no run of this length is unprotected, though shorter runs are
        return []
    scores = score_windows(criterion, free, profile=profile)
    best = sorted(zip(free, scores, strict=True), key=lambda pair: (-pair[1], pair[0].start))[: search.shortlist]
    return [_row_of_window(profile, window, score, criterion.name) for window, score in best]


def _row_of(profile: Profile, selection: Selection, criterion: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "blocks": str(selection),
        "windows": [[window.start, window.stop] for window in selection.windows],
        "silenced": [list(branch) for branch in selection.zeroed],
    }
    if len(selection.windows) == 1 and not selection.zeroed:
        return row | _row_of_window(profile, selection.windows[0], selection.score, criterion)
    return row | {"score": selection.score}


def _row_of_window(profile: Profile, window: range, score: float, criterion: str) -> dict[str, Any]:
    row: dict[str, Any] = {"length": len(window), "start": window.start, "stop": window.stop, "score": score}
    if window.stop < profile.num_boundaries:
        row["cosine"] = profile.value("cosine", window)
        row["angular_distance"] = profile.value("angular", window)
        if criterion in _INTERVALS and profile.resampled:
            (offset, sign), statistic = _INTERVALS[criterion], cast(Any, criterion)
            is_statistic = math.isclose(score, offset + sign * profile.value(statistic, window), rel_tol=1e-9)
            if is_statistic:  # False for a sum over blocks
                row["interval"] = sorted(offset + sign * end for end in profile.interval(statistic, window))
    return row


def _share_of_first(profile: Profile, criterion: Criterion, candidates: Sequence[range]) -> float:
    """Return the fraction of resamples in which the first window still ranks first."""

    def first(resample: Profile) -> int:
        scores = score_windows(criterion, candidates, profile=resample)
        return max(range(len(scores)), key=lambda k: (scores[k], -k))

    chosen = first(profile)
    firsts = [first(resample) for resample in profile.resamples()]
    return sum(k == chosen for k in firsts) / max(1, len(firsts))
