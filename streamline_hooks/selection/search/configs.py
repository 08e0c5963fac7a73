"""The searches: one config class each, and the registry of their kinds."""

# ruff: noqa: D102 - what a search overrides is documented in SearchConfig

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from streamline_hooks.branches import Branch
from streamline_hooks.core.config import Bound, Config, Registry, register_config
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection.criteria import SHORTLIST, Criterion, criterion_of
from streamline_hooks.selection.search.disjoint import disjoint_windows, one_shot, silenced_branches
from streamline_hooks.selection.search.greedy import greedy
from streamline_hooks.selection.search.problem import SearchProblem
from streamline_hooks.selection.search.selected import Selection, best_windows
from streamline_hooks.selection.target import Target, protected_blocks
from streamline_hooks.statistics import measure_branches

SEARCHES: Registry[type[SearchConfig]] = Registry("search", "register_search")
"""The config classes of all searches, by kind."""


@dataclass(frozen=True)
class SearchConfig(Config):
    """Describe how the blocks to remove are found.

    Each search is a subclass: a frozen dataclass with a class attribute `kind`, its options as fields with defaults,
    and a method `find`. `register_search` makes it known by its name.

    Attributes
    ----------
    criterion : str or mapping of str to float, optional
        A registered criterion, see `CRITERIA`, or several with weights above 0 that are combined by rank. By default
        `default_criterion`.
    keep : tuple of int
        Blocks that must stay; negative numbers count from the end. By default any block may be removed.
    shortlist : int
        Largest number of selections, 1 or more; each is repaired and evaluated before one is chosen. By default 8,
        since the selection that repairs best is often not the criterion's first.

    Raises
    ------
    StreamlineError
        If a value is invalid, or a criterion is unknown.

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
    """The criterion where none is given."""
    only_criterion: ClassVar[str | None] = None
    """The only criterion that the search can use. None: any."""
    most_selections: ClassVar[int | None] = None
    """The largest number of selections that the search can find. None: as many as `shortlist` asks for."""
    counts_blocks_only: ClassVar[bool] = True
    """Whether the target must be a number or a fraction of the blocks."""
    silences_branches: ClassVar[bool] = False
    """Whether the search silences attentions or MLPs only, and removes no block."""
    runs_model: ClassVar[bool] = False
    """Whether the search runs the model, whatever the criterion does."""
    score_name: ClassVar[str] = "score"
    """Heading of the scores in a table; ``{}`` stands for the criterion's name."""

    criterion: str | Mapping[str, float] | None = None
    keep: tuple[int, ...] = ()
    shortlist: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        resolved, name = self.resolved_criterion, type(self).__name__
        if self.only_criterion is not None and resolved.name != self.only_criterion:
            raise StreamlineError(
                f"{name}: criterion={self.criterion!r} is not used by the search {self.kind!r}. Expected "
                f"{self.only_criterion!r}. Leave it out, or choose another search."
            )
        if self.most_selections is not None and self.shortlist > self.most_selections:
            raise StreamlineError(
                f"{name}: shortlist={self.shortlist} is more than the search {self.kind!r} finds. Expected "
                f"{self.most_selections}. Leave it out."
            )

    @property
    def resolved_criterion(self) -> Criterion:
        """The criterion, looked up or combined."""
        return criterion_of(self.criterion, self.default_criterion)

    @property
    def number_of_windows(self) -> int | None:
        """Number of windows in every selection. None: the search makes as many as it finds best."""
        return None

    def most_windows(self, blocks: int) -> int:
        """Return the number of windows, at most, in a selection that removes so many blocks, for estimates of cost."""
        return blocks if self.number_of_windows is None else max(1, self.number_of_windows)

    def find(self, problem: SearchProblem) -> list[Selection]:
        """Return selections of blocks that reach the target, the best first.

        Parameters
        ----------
        problem : SearchProblem
            As `problem` makes it.

        Returns
        -------
        list of Selection
            At most ``problem.best``.

        Raises
        ------
        StreamlineError
            If there is no such selection.
        """
        raise NotImplementedError

    def problem(self, candidates: Sequence[range], length: int, **more: Any) -> SearchProblem:
        """Return the problem that this config describes.

        Parameters
        ----------
        candidates : sequence of range
            The windows that each alone reach the target, see `windows_for`; those with a block of `keep` are left out.
        length : int
            Number of blocks of the stack.
        **more
            Further fields of `SearchProblem`. A ``criterion``, ``keep`` or ``best`` replaces that of this config.

        Raises
        ------
        StreamlineError
            If no candidate is left, or a block number is out of range.
        """
        keep = more.pop("keep", None)
        protected = protected_blocks(self.keep if keep is None else keep, length)
        left = [window for window in candidates if not protected.intersection(window)]
        common: dict[str, Any] = {"criterion": self.resolved_criterion, "best": self.shortlist, **more}
        return SearchProblem(left, length, keep=protected, **common)

    def slots(self, replacement: ReplacementConfig) -> int:
        """Return the number of slots that the replacements in a selection take together.

        Raises
        ------
        StreamlineError
            If the replacement takes slots, and the number of windows is not known before the search.
        """
        if replacement.slots and self.number_of_windows is None:
            taken = f"{replacement.slots} slot{'s' * (replacement.slots > 1)}"
            raise StreamlineError(
                f"The search {self.kind!r} makes any number of windows, and the kind {replacement.name!r} takes "
                f"{taken} for each, so that it is not known how many blocks would be left. Search for "
                "a window or for disjoint ones, or take a kind without a slot."
            )
        return replacement.slots * (self.number_of_windows or 0)

    def check(
        self, target: Target | int | float, blocks: int | None = None, replacement: ReplacementConfig | None = None
    ) -> None:
        """Raise unless the search can reach a target.

        Parameters
        ----------
        target : Target, int or float
            See `windows_for`.
        blocks : int, optional
            Number of blocks that are removed of the model, once that is known.
        replacement : ReplacementConfig, optional
            Of each window.

        Raises
        ------
        StreamlineError
            If they do not fit the search.
        """
        wanted, windows = Target.of(target), self.number_of_windows
        if self.counts_blocks_only and not wanted.counts_blocks:
            raise StreamlineError(
                f"The target {wanted} is reached by single windows only; for the search {self.kind!r} give a number or "
                "a fraction of the blocks. Search for a window otherwise, as the preset best does."
            )
        if replacement is not None:
            self.slots(replacement)
        least = 1 if replacement is None else replacement.slots + 1
        if blocks is not None and windows and blocks < windows * least:
            each = f" of {least} each at least" if least > 1 else ""
            raise StreamlineError(
                f"{blocks} block{'s' * (blocks > 1)} cannot be in {windows} windows{each}. Remove more, at a time if "
                "it is in rounds, or ask for fewer windows, or for one (WindowSearch; --search window)."
            )


_Search = TypeVar("_Search", bound=type[SearchConfig])


def register_search(config: _Search) -> _Search:
    """Make a search known by its name, for `compress`, config files and the command line.

    Parameters
    ----------
    config : type
        A frozen dataclass that derives from `SearchConfig`.

    Returns
    -------
    type
        The same class, so that this can be used as a decorator.

    Raises
    ------
    StreamlineError
        If the class is no such dataclass, its fields have no defaults, or its kind is no name or another class's.

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
    >>> search = SearchConfig.from_dict({"kind": "doctest-first", "keep": [0]})
    >>> search.find(search.problem([range(0, 2), range(1, 3)], 4))[0].windows
    (range(1, 3),)
    """
    return register_config(SearchConfig, config)  # type: ignore[no-any-return]


@register_search
@dataclass(frozen=True)
class WindowSearch(SearchConfig):
    """Find the best single windows of consecutive blocks, as LLM-Streamline does (arXiv 2403.19135).

    The default criterion is cosine and relative magnitude together, see `SHORTLIST`. Other fields are those of
    `SearchConfig`.
    """

    kind = "window"
    score_name: ClassVar[str] = "{}"
    default_criterion = SHORTLIST
    counts_blocks_only = False

    @property
    def number_of_windows(self) -> int:
        return 1

    def find(self, problem: SearchProblem) -> list[Selection]:
        return best_windows(problem.score, problem.candidates)[: problem.best]


@register_search
@dataclass(frozen=True)
class DisjointSearch(SearchConfig):
    """Find the disjoint windows with the greatest sum of scores, exactly.

    The sum ignores how the loss of one window changes with another; `GreedySearch` and `verified` do not.

    Attributes
    ----------
    windows : int
        Number of windows of a selection, 1 or more. The default is 2, the fewest that differ from one window.

    Other fields are those of `SearchConfig`.
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

    Fields are those of `SearchConfig`.
    """

    kind = "one-shot"
    score_name: ClassVar[str] = "sum of {}"

    def find(self, problem: SearchProblem) -> list[Selection]:
        return _one_shot(problem)


@register_search
@dataclass(frozen=True)
class MixedSearch(SearchConfig):
    """Find the best single windows, the best single blocks, and the best disjoint windows of each number.

    With more than a third of the blocks removed, several windows may lose less than one. The default criterion is that
    of `WindowSearch`.

    Attributes
    ----------
    windows : int
        Largest number of disjoint windows of a selection, 2 or more. The default is 2, the fewest that are several.

    Other fields are those of `SearchConfig`; `shortlist` limits the single windows alone.
    """

    kind = "mixed"
    score_name: ClassVar[str] = "sum of {}"
    bounds: ClassVar[Mapping[str, Bound]] = {"windows": 2}
    default_criterion = SHORTLIST
    windows: int = 2

    def most_windows(self, blocks: int) -> int:
        return self.windows  # all but the one selection of single blocks

    def find(self, problem: SearchProblem) -> list[Selection]:
        one = replace(problem, best=1)
        several = _one_shot(one)
        for windows in range(2, self.windows + 1):
            with suppress(StreamlineError):  # so many windows may not fit
                several += _disjoint(one, windows)
        single = best_windows(problem.score, problem.candidates)[: problem.best]
        found: dict[tuple[range, ...], Selection] = {}
        for selection in [*single, *several]:
            found.setdefault(selection.windows, selection)
        return list(found.values())


@register_search
@dataclass(frozen=True)
class GreedySearch(SearchConfig):
    """Remove the best block, measure again without it, and so on, as SLEB does (arXiv 2402.09025).

    Fields are those of `SearchConfig`; there is one selection, so `shortlist` is 1.
    """

    kind = "greedy"
    score_name: ClassVar[str] = "sum of {}"
    most_selections = 1
    runs_model = True
    shortlist: int = 1

    def find(self, problem: SearchProblem) -> list[Selection]:
        model, batches = problem.running()
        return greedy(
            model, batches, problem.criterion, problem.count, keep=problem.keep, stack=problem.stack, task=problem.task
        )


@dataclass(frozen=True)
class _BranchSearch(SearchConfig):
    branch: ClassVar[Branch]
    only_criterion = "cosine"
    silences_branches = True
    runs_model = True

    @property
    def number_of_windows(self) -> int:
        return 0

    def find(self, problem: SearchProblem) -> list[Selection]:
        model, batches = problem.running()
        scores = measure_branches(model, batches, stack=problem.stack)
        return silenced_branches(scores, self.branch, problem.count, keep=problem.keep, best=problem.best)


@register_search
@dataclass(frozen=True)
class AttentionSearch(_BranchSearch):
    """Silence the attentions that change the state least (He et al., arXiv 2406.15786), as many as blocks to remove.

    Fields are those of `SearchConfig`; the criterion is the cosine across each attention.
    """

    kind = "attention"
    branch: ClassVar[Branch] = "attention"


@register_search
@dataclass(frozen=True)
class MLPSearch(_BranchSearch):
    """Silence the MLPs that change the state least, as many as blocks to remove.

    Fields are those of `SearchConfig`; the criterion is the cosine across each MLP.
    """

    kind = "mlp"
    branch: ClassVar[Branch] = "mlp"


def _disjoint(problem: SearchProblem, windows: int) -> list[Selection]:
    return disjoint_windows(
        problem.score,
        problem.length,
        problem.count,
        windows,
        keep=problem.keep,
        best=problem.best,
        shortest=problem.shortest,
    )


def _one_shot(problem: SearchProblem) -> list[Selection]:
    return one_shot(problem.score, problem.length, problem.count, keep=problem.keep, best=problem.best)
