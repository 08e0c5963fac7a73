"""The searches: one config class per search, and the registry of kinds."""

# ruff: noqa: D102 - SearchConfig documents the methods that a search overrides

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from streamline_hooks.core import Bound, Config, Registry, StreamlineError, register_config
from streamline_hooks.modeling import Branch
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection.criteria import DEFAULT_CRITERION, Criterion, resolve_criterion
from streamline_hooks.selection.search_algorithms import best_branches, disjoint_windows, greedy, one_shot
from streamline_hooks.selection.selection import SearchProblem, Selection, best_windows
from streamline_hooks.selection.target import Target, protected_blocks
from streamline_hooks.statistics import measure_branches

SEARCHES: Registry[type[SearchConfig]] = Registry(
    "search",
    "register_search",
    group="streamline_hooks.searches",
    register=lambda name, config: register_search(config),
)
"""The config classes of all searches, by kind."""


@dataclass(frozen=True)
class SearchConfig(Config):
    """Base class of the searches for blocks to remove.

    To add a search, write a subclass: a frozen dataclass with a class attribute `kind`, fields with defaults as
    options, and a method `find`. Register it with `register_search`.

    Attributes
    ----------
    criterion : str or mapping of str to float, optional
        Name of a registered criterion (see `CRITERIA`), or several names with weights above 0, combined by rank. By
        default ``"cosine_and_magnitude"`` in searches for single windows, else ``"cosine"``.
    protect : tuple of int
        Blocks that must stay. Negative numbers count from the end.
    shortlist : int
        Maximum number of selections, at least 1. Each is repaired and evaluated before one is chosen, because the
        selection that can be repaired best is often not first by the criterion.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import Profile
    >>> profile = Profile(5)
    >>> profile.update([torch.eye(8)[None, :6] + k // 2 for k in range(5)], torch.ones(1, 6))
    >>> candidates = [range(k, k + 2) for k in range(3)]
    >>> for search in (WindowSearch(criterion="cosine"), DisjointSearch(windows=2)):
    ...     search.find(search.problem(candidates, 4, profile=profile))[0].windows
    (range(2, 4),)
    (range(0, 1), range(2, 3))
    """

    family = SEARCHES
    bounds: ClassVar[Mapping[str, Bound]] = {"shortlist": 1}
    default_criterion: ClassVar[str] = "cosine"
    """Criterion used when `criterion` is None."""
    only_criterion: ClassVar[str | None] = None
    """The only criterion that the search supports, or None if it supports all."""
    most_selections: ClassVar[int | None] = None
    """Maximum number of selections that the search can return, or None if only `shortlist` limits it."""
    counts_blocks_only: ClassVar[bool] = True
    """Whether the target must be a number or a fraction of the blocks."""
    zeroes_branches: ClassVar[bool] = False
    """Whether the search zeroes attention or MLP branches instead of removing blocks."""
    runs_model: ClassVar[bool] = False
    """Whether the search runs the model with every criterion."""
    takes_source: ClassVar[bool] = False
    """Whether a search that runs the model also takes a `StateSource`, so that its blocks may be on disk."""
    score_name: ClassVar[str] = "score"
    """Heading of the score column of a table; ``{}`` is replaced by the criterion's name."""

    criterion: str | Mapping[str, float] | None = None
    protect: tuple[int, ...] = ()
    shortlist: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        resolved, name = self.resolved_criterion, type(self).__name__
        if self.only_criterion is not None and resolved.name != self.only_criterion:
            raise StreamlineError(
                f"{name}: criterion={self.criterion!r} is not supported by the search {self.kind!r}. Expected "
                f"{self.only_criterion!r}. Omit criterion, or use another search."
            )
        if self.most_selections is not None and self.shortlist > self.most_selections:
            raise StreamlineError(
                f"{name}: shortlist={self.shortlist} is too large for the search {self.kind!r}. Expected at most "
                f"{self.most_selections}. Omit shortlist."
            )

    @property
    def resolved_criterion(self) -> Criterion:
        """The `Criterion` object for `criterion`."""
        return resolve_criterion(self.criterion, self.default_criterion)

    @property
    def number_of_windows(self) -> int | None:
        """Number of windows in every selection, or None if the search decides."""
        return None

    def with_kind(self, kind: str, options: Mapping[str, Any]) -> SearchConfig:
        """Return a search of the given kind and options that inherits settings of this search.

        A search of the same kind inherits all other fields. A search of another kind inherits `protect` and
        `shortlist` (limited to `most_selections`), and uses its default criterion.

        Examples
        --------
        >>> DisjointSearch(criterion="kl", protect=(0,), windows=3).with_kind("greedy", {})
        GreedySearch(criterion=None, protect=(0,), shortlist=1)
        """
        if kind == self.kind:
            return replace(self, **options)
        search = SEARCHES[kind]()
        kept = {"protect": self.protect, "shortlist": min(self.shortlist, search.most_selections or self.shortlist)}
        return replace(search, **{**kept, **options})

    def max_windows(self, blocks: int) -> int:
        """Return the maximum number of windows in a selection that removes this number of blocks."""
        return blocks if self.number_of_windows is None else max(1, self.number_of_windows)

    def find(self, problem: SearchProblem) -> list[Selection]:
        """Return at most ``problem.best`` selections that reach the target, best first.

        Raises StreamlineError if no selection reaches the target.
        """
        raise NotImplementedError

    def problem(self, candidates: Sequence[range], length: int, **more: Any) -> SearchProblem:
        """Return the `SearchProblem` for `find`, with the settings of this config.

        Parameters
        ----------
        candidates : sequence of range
            The windows that each reach the target (see `target_windows`). Windows with a protected block are dropped.
        length : int
            Number of blocks of the stack.
        **more
            Further fields of `SearchProblem`. ``criterion``, ``protect`` and ``best`` override the config.

        Raises
        ------
        StreamlineError
            If no candidate is left, or a block index is out of range.
        """
        common: dict[str, Any] = {"criterion": self.resolved_criterion, "best": self.shortlist, "protect": self.protect}
        common |= more
        common["protect"] = protected_blocks(common["protect"], length)
        return SearchProblem([w for w in candidates if not common["protect"].intersection(w)], length, **common)

    def slots(self, replacement: ReplacementConfig) -> int:
        """Return the total number of block slots that the replacements of a selection occupy.

        Raises StreamlineError if the replacement occupies slots and the search decides the number of windows.
        """
        if replacement.slots and self.number_of_windows is None:
            slots = f"{replacement.slots} slot{'s' * (replacement.slots > 1)}"
            raise StreamlineError(
                f"The search {self.kind!r} cannot be combined with the replacement {replacement.name!r}: the "
                f"replacement occupies {slots} per window, and the number of windows is unknown before the search. "
                "Use WindowSearch or DisjointSearch, or a replacement without a slot."
            )
        return replacement.slots * (self.number_of_windows or 0)

    def check(
        self, target: Target | int | float, blocks: int | None = None, replacement: ReplacementConfig | None = None
    ) -> None:
        """Raise StreamlineError unless the search supports the target and the replacement.

        `blocks` is the number of blocks to remove, if known. `replacement` is the config of the replacement of each
        window.
        """
        parsed_target, windows = Target.of(target), self.number_of_windows
        if self.counts_blocks_only and not parsed_target.counts_blocks:
            raise StreamlineError(
                f"The search {self.kind!r} does not support the target {parsed_target}. Expected a number or a "
                "fraction of the blocks. Change the target, or search for single windows (WindowSearch; --search "
                "window), as the preset best does."
            )
        if replacement is not None:
            self.slots(replacement)
        least = 1 if replacement is None else replacement.slots + 1
        if blocks is not None and windows and blocks < windows * least:
            each = f" of at least {least} blocks" if least > 1 else ""
            raise StreamlineError(
                f"{blocks} block{'s' * (blocks > 1)} cannot form {windows} windows{each}. Expected at least "
                f"{windows * least} blocks. Remove more (per round, if in rounds), use fewer windows, or search for "
                "single windows (WindowSearch; --search window)."
            )


_Search = TypeVar("_Search", bound=type[SearchConfig])


def register_search(config: _Search) -> _Search:
    """Register a search, so that `compress`, config files and the command line accept its kind.

    Parameters
    ----------
    config : type
        A frozen dataclass that derives from `SearchConfig`.

    Returns
    -------
    type
        The argument, so that the function can be used as a decorator.

    Raises
    ------
    StreamlineError
        If the class is not a frozen dataclass that derives from `SearchConfig`, a field has no default, or the kind is
        invalid or belongs to another class.

    Examples
    --------
    >>> @register_search
    ... @dataclass(frozen=True)
    ... class FirstSearch(SearchConfig):
    ...     kind = "doctest-first"
    ...     number_of_windows = 1
    ...
    ...     def find(self, problem):
    ...         return [Selection((window,)) for window in problem.candidates[: problem.best]]
    >>> search = SearchConfig.from_dict({"kind": "doctest-first", "protect": [0]})
    >>> search.find(search.problem([range(0, 2), range(1, 3)], 4))[0].windows
    (range(1, 3),)
    """
    return register_config(SearchConfig, config)  # type: ignore[no-any-return]


@register_search
@dataclass(frozen=True)
class WindowSearch(SearchConfig):
    """Find the best single windows of consecutive blocks, as LLM-Streamline does (arXiv 2403.19135).

    The default criterion combines cosine and relative magnitude (see `DEFAULT_CRITERION`).

    Parameters
    ----------
    criterion, protect, shortlist
        See `SearchConfig`.

    Examples
    --------
    >>> WindowSearch(protect=(0, -1)).resolved_criterion.name
    'cosine_and_magnitude'
    """

    kind = "window"
    score_name: ClassVar[str] = "{}"
    default_criterion = DEFAULT_CRITERION
    counts_blocks_only = False
    number_of_windows = 1

    def find(self, problem: SearchProblem) -> list[Selection]:
        return best_windows(problem.score, problem.candidates)[: problem.best]


@register_search
@dataclass(frozen=True)
class DisjointSearch(SearchConfig):
    """Find the disjoint windows with the greatest sum of scores.

    The result is exact for the sum, which ignores interactions between windows. `GreedySearch` and `verify_shortlist`
    account for interactions.

    Attributes
    ----------
    windows : int
        Number of windows of a selection, at least 1.

    Examples
    --------
    >>> DisjointSearch(criterion="kl", windows=3).number_of_windows
    3
    """

    kind = "disjoint"
    score_name: ClassVar[str] = "sum of {}"
    bounds: ClassVar[Mapping[str, Bound]] = {"windows": 1}
    windows: int = 2

    @property
    def number_of_windows(self) -> int:
        return self.windows

    def find(self, problem: SearchProblem) -> list[Selection]:
        return _disjoint(problem, self.windows)


@register_search
@dataclass(frozen=True)
class OneShotSearch(SearchConfig):
    """Find the single blocks with the greatest sum of scores, as ShortGPT does (arXiv 2403.03853).

    Parameters
    ----------
    criterion, protect, shortlist
        See `SearchConfig`.

    Examples
    --------
    >>> OneShotSearch(criterion="block_influence").resolved_criterion.paper
    'ShortGPT, arXiv 2403.03853'
    """

    kind = "one-shot"
    score_name: ClassVar[str] = "sum of {}"

    def find(self, problem: SearchProblem) -> list[Selection]:
        return _one_shot(problem)


@register_search
@dataclass(frozen=True)
class MixedSearch(SearchConfig):
    """Find the best single windows, the best single blocks, and the best disjoint windows of each number.

    If more than a third of the blocks are removed, several windows may lose less than a single window. The default
    criterion is that of `WindowSearch`. `shortlist` limits only the number of single windows.

    Attributes
    ----------
    windows : int
        Maximum number of disjoint windows of a selection, at least 2.

    Examples
    --------
    >>> MixedSearch(windows=3, shortlist=4)
    MixedSearch(criterion=None, protect=(), shortlist=4, windows=3)
    """

    kind = "mixed"
    score_name: ClassVar[str] = "sum of {}"
    bounds: ClassVar[Mapping[str, Bound]] = {"windows": 2}
    default_criterion = DEFAULT_CRITERION
    windows: int = 2

    def max_windows(self, blocks: int) -> int:
        return self.windows  # the selection of single blocks may have more

    def find(self, problem: SearchProblem) -> list[Selection]:
        best_only = replace(problem, best=1)
        several = _one_shot(best_only)
        for windows in range(2, self.windows + 1):
            with suppress(StreamlineError):  # this number of windows may not fit
                several += _disjoint(best_only, windows)
        single = best_windows(problem.score, problem.candidates)[: problem.best]
        selections: dict[tuple[range, ...], Selection] = {}
        for selection in [*single, *several]:
            selections.setdefault(selection.windows, selection)
        return list(selections.values())


@register_search
@dataclass(frozen=True)
class GreedySearch(SearchConfig):
    """Remove the best block and score the remaining blocks again, as SLEB does (arXiv 2402.09025).

    The search returns one selection, so `shortlist` must be 1.

    Parameters
    ----------
    criterion, protect, shortlist
        See `SearchConfig`.

    Examples
    --------
    >>> GreedySearch(criterion="perplexity", protect=(0,))
    GreedySearch(criterion='perplexity', protect=(0,), shortlist=1)
    """

    kind = "greedy"
    score_name: ClassVar[str] = "sum of {}"
    most_selections = 1
    runs_model = True
    takes_source = True
    shortlist: int = 1

    def find(self, problem: SearchProblem) -> list[Selection]:
        model, batches = problem.model_and_batches()
        return greedy(
            model,
            batches,
            problem.criterion,
            problem.count,
            protect=problem.protect,
            stack=problem.stack,
            task=problem.task,
            profile=problem.profile,
        )


@dataclass(frozen=True)
class _BranchSearch(SearchConfig):
    branch: ClassVar[Branch]
    only_criterion = "cosine"
    zeroes_branches = True
    runs_model = True
    takes_source = True
    number_of_windows = 0

    def find(self, problem: SearchProblem) -> list[Selection]:
        model, batches = problem.model_and_batches()
        counts = {} if problem.profile is None else problem.profile.about
        tokens, skip = counts.get("tokens", "all"), counts.get("skip", 0)
        if (tokens, skip) != ("all", 0):
            raise StreamlineError(
                f"The profile has tokens={tokens!r} and skip={skip}, but the search {self.kind!r} counts all real "
                "tokens. Expected a profile with tokens='all' and skip=0. Profile again, or search for blocks."
            )
        scores = measure_branches(model, batches, stack=problem.stack)
        return best_branches(scores, self.branch, problem.count, protect=problem.protect, best=problem.best)


@register_search
@dataclass(frozen=True)
class AttentionSearch(_BranchSearch):
    """Zero the attention branches that change the state least (He et al., arXiv 2406.15786).

    The search zeroes the outputs of as many branches as the target removes blocks. The criterion is the cosine of the
    states before and after each attention branch.

    Parameters
    ----------
    criterion, protect, shortlist
        See `SearchConfig`. The only criterion is "cosine".

    Examples
    --------
    >>> AttentionSearch(protect=(0,)).zeroes_branches
    True
    """

    kind = "attention"
    branch: ClassVar[Branch] = "attention"


@register_search
@dataclass(frozen=True)
class MLPSearch(_BranchSearch):
    """Zero the MLP branches that change the state least; like `AttentionSearch`.

    Parameters
    ----------
    criterion, protect, shortlist
        See `SearchConfig`. The only criterion is "cosine".

    Examples
    --------
    >>> MLPSearch(protect=(0,)).branch
    'mlp'
    """

    kind = "mlp"
    branch: ClassVar[Branch] = "mlp"


def _disjoint(problem: SearchProblem, windows: int) -> list[Selection]:
    limits: dict[str, Any] = {"protect": problem.protect, "best": problem.best, "shortest": problem.shortest}
    return disjoint_windows(problem.score, problem.length, problem.count, windows, **limits)


def _one_shot(problem: SearchProblem) -> list[Selection]:
    return one_shot(problem.score, problem.length, problem.count, protect=problem.protect, best=problem.best)
