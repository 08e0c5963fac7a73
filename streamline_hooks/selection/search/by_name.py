"""The searches by name, each asked the same question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from torch import Tensor, nn

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.branches import Branch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria import RUN_FOR_EACH, SHORTLIST, Criterion, score_windows
from streamline_hooks.selection.search.disjoint import disjoint_windows
from streamline_hooks.selection.search.evolution import evolution
from streamline_hooks.selection.search.greedy import greedy
from streamline_hooks.selection.search.one_shot import one_shot
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.selection.search.silenced import silenced_branches
from streamline_hooks.selection.search.windows import best_windows
from streamline_hooks.selection.target import Target
from streamline_hooks.statistics import Profile, measure_branches
from streamline_hooks.task import Task

_TOKENS = 8_192  # that an evolutionary search is judged on
RANKED = 4_096  # that a criterion is measured on that runs the model once for each window


@dataclass(frozen=True)
class SearchProblem:
    """What a search is asked.

    Attributes
    ----------
    candidates : sequence of range
        The windows that reach the target alone, see `windows_for`.
    length : int
        Number of blocks of the stack.
    criterion : Criterion or str
        What speaks for giving a window up.
    keep : frozenset of int
        Blocks that must stay.
    best : int
        How many selections to find, where the search finds several.
    parts : int
        Windows a selection, where the search makes several.
    profile : Profile, optional
        Of the model.
    model : torch.nn.Module, optional
        For what a profile does not tell.
    batches : sequence of mapping or torch.Tensor, optional
        What the model is run on.
    stack : str, optional
        Path of the stack.
    seed : int
        Of random numbers.
    task : Task, optional
        What the model is for, where its class does not say it.
    branches : bool
        Whether attentions and MLPs may go alone, where the search has to do with whole blocks too.
    shortest : int
        Blocks of each window at least, where the search makes several, see `disjoint_windows`.
    """

    candidates: Sequence[range]
    length: int
    criterion: Criterion | str = "cosine"
    keep: frozenset[int] = frozenset()
    best: int = 1
    parts: int = 2
    profile: Profile | None = None
    model: nn.Module | None = None
    batches: Sequence[Batch | Tensor] | None = None
    stack: str | None = None
    seed: int = 0
    task: Task | None = None
    branches: bool = True
    shortest: int = 1

    def __post_init__(self) -> None:
        check_fields(self, length=1, best=1, parts=1, shortest=1)
        if not self.candidates:
            raise StreamlineError(
                "SearchProblem: candidates=[] holds no window. Expected the windows that reach the target. Make them "
                "with windows_for."
            )

    @property
    def count(self) -> int:
        """Blocks that go, for a search that does not take one window.

        Raises
        ------
        StreamlineError
            If the windows that reach the target are not all of one length.
        """
        lengths = sorted({len(window) for window in self.candidates})
        if len(lengths) != 1:
            raise StreamlineError(
                f"The windows that reach the target are {lengths[0]} to {lengths[-1]} blocks long; this search takes "
                "one number of blocks. Give a number or a fraction of the blocks, or search for a window."
            )
        return lengths[0]

    def score(self, windows: Sequence[range]) -> list[float]:
        """Score windows by the criterion; one that runs the model without each of them on the first 4,096 tokens."""
        name = self.criterion if isinstance(self.criterion, str) else self.criterion.name
        return score_windows(
            self.criterion,
            windows,
            profile=self.profile,
            model=self.model,
            batches=self.beginning(RANKED) if name in RUN_FOR_EACH else self.batches,
            stack=self.stack,
            task=self.task,
        )

    def beginning(self, tokens: int) -> list[Batch | Tensor] | None:
        """The first batches that together hold no more tokens, one at least."""
        if self.batches is None:
            return None
        fitting = sum(1 for total in accumulate(map(tokens_of, self.batches)) if total <= tokens)
        return list(islice(self.batches, fitting or 1))

    def running(self) -> tuple[nn.Module, Sequence[Batch | Tensor]]:
        """The model and what it is run on, for a search that needs both."""
        if self.model is None or self.batches is None:
            raise StreamlineError(
                "This search runs the model: a profile is not enough. Give a model and text, or search for a window, "
                "disjoint windows or single blocks (window, disjoint, one-shot)."
            )
        return self.model, self.batches


@checked()
def find_selections(name: str, question: SearchProblem) -> list[Selection]:
    """Run a search.

    Parameters
    ----------
    name : {"window", "disjoint", "one-shot", "mixed", "greedy", "evolution", "attention", "mlp"}
        "mixed" is the best windows, the best single blocks, and the best disjoint windows of 2 to `parts` parts. The
        last two silence as many attentions, or MLPs, as blocks were to go.
    question : SearchProblem

    Returns
    -------
    list of Selection
        The best first.

    Raises
    ------
    StreamlineError
        If there is no such search, or it cannot answer; see each.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.statistics import Profile
    >>> profile = Profile(5)
    >>> profile.update([torch.eye(8)[None, :6] + k // 2 for k in range(5)], torch.ones(1, 6))
    >>> asked = SearchProblem([range(k, k + 2) for k in range(3)], 4, profile=profile)
    >>> find_selections("window", asked)[0].windows, find_selections("disjoint", asked)[0].windows
    ((range(2, 4),), (range(0, 1), range(2, 3)))
    """
    require_search(name, question.criterion)
    return SEARCHES[name](question)


def usual_criterion(search: str) -> str:
    """The criterion of a search where none is asked for."""
    return SHORTLIST if search in ("window", "mixed") else "cosine"


def require_search(name: str, criterion: Criterion | str, target: Target | int | float = 1) -> None:
    """Raise unless a search can go by a criterion, and to a target.

    Parameters
    ----------
    name : str
    criterion : Criterion or str
    target : Target, int or float
        What is asked for, see `windows_for`.

    Raises
    ------
    StreamlineError
        The text says what can be asked for.
    """
    if name not in SEARCHES:
        raise StreamlineError(f"The search {name!r} is unknown. Known: {', '.join(SEARCHES)}.")
    by = criterion if isinstance(criterion, str) else criterion.name
    if name in _OF_BRANCHES and by != "cosine":
        raise StreamlineError(f"The search {name!r} goes by the cosine across each branch, and not by {by}.")
    wanted = Target.of(target)
    if not wanted.counts_blocks and name != "window":
        raise StreamlineError(
            f"The target {wanted} is reached by single windows only; for the search {name!r} give a number or a "
            "fraction of the blocks. Search for a window otherwise, as the preset best does."
        )


def _window(asked: SearchProblem) -> list[Selection]:
    return best_windows(asked.score, asked.candidates)[: asked.best]


def _disjoint(asked: SearchProblem) -> list[Selection]:
    more: dict[str, Any] = {"keep": asked.keep, "best": asked.best, "shortest": asked.shortest}
    return disjoint_windows(asked.score, asked.length, asked.count, asked.parts, **more)


def _one_shot(asked: SearchProblem) -> list[Selection]:
    return one_shot(asked.score, asked.length, asked.count, keep=asked.keep, best=asked.best)


def _mixed(asked: SearchProblem) -> list[Selection]:
    """The best windows, and beside them the first of what takes as many blocks from several places."""
    several = _one_shot(replace(asked, best=1))
    for parts in range(2, max(2, asked.parts) + 1):
        with suppress(StreamlineError):  # so many windows may not fit
            several += _disjoint(replace(asked, best=1, parts=parts))
    found: dict[tuple[range, ...], Selection] = {}
    for selection in [*_window(asked), *several]:
        found.setdefault(selection.windows, selection)
    return list(found.values())


def _greedy(asked: SearchProblem) -> list[Selection]:
    model, batches = asked.running()
    return greedy(model, batches, asked.criterion, asked.count, keep=asked.keep, stack=asked.stack, task=asked.task)


def _evolution(asked: SearchProblem) -> list[Selection]:
    """Started with the best windows and the best single blocks, on a part of the text: ten generations of 16."""
    model, _ = asked.running()
    few = asked.beginning(_TOKENS) or []
    seeds = list(dict.fromkeys([*_window(asked), *_one_shot(asked)]))
    found = evolution(
        model, few, seeds, generations=10, offspring=16, stages=((_TOKENS // 4, 4),), keep=asked.keep,
        branches=asked.branches, seed=asked.seed, stack=asked.stack, task=asked.task,
    )  # fmt: skip
    return found[: asked.best]


def _silenced(branch: Branch) -> Callable[[SearchProblem], list[Selection]]:
    """By what each branch does to the state; the criterion, which scores windows, has no say."""

    def search(asked: SearchProblem) -> list[Selection]:
        model, batches = asked.running()
        scores = measure_branches(model, batches, stack=asked.stack)
        return silenced_branches(scores, branch, asked.count, keep=asked.keep, best=asked.best)

    return search


_OF_BRANCHES = ("attention", "mlp")
SEARCHES: dict[str, Callable[[SearchProblem], list[Selection]]] = {
    "window": _window,
    "disjoint": _disjoint,
    "one-shot": _one_shot,
    "mixed": _mixed,
    "greedy": _greedy,
    "evolution": _evolution,
    "attention": _silenced("attention"),
    "mlp": _silenced("mlp"),
}
