"""What a changed model retains of its original over several tasks, and how sure that is."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.drawn_questions import Estimate, accuracies, estimate, share_kept, standard_error


@dataclass(frozen=True)
class TaskAnswers:
    """What two models made of the same questions.

    Attributes
    ----------
    name : str
    original, changed : sequence of bool or float
        For each question, whether it was answered right, or a score from 0 to 1.
    chance : float
        The accuracy of knowing nothing, see `streamline_hooks.evaluation.questions.chance` and
        `streamline_hooks.evaluation.problems.chance_of_guessing`; 0 where nothing can be guessed.
    group : str
        Tasks of different groups, such as classification and generation, are reported apart.
    clusters : sequence of hashable
        For each question, with which it stands or falls: of one passage, or behind the same solved examples. Those of
        one cluster are drawn together, and an interval is wider for it. Empty where each stands alone.
    """

    name: str
    original: Sequence[bool] | Sequence[float]
    changed: Sequence[bool] | Sequence[float]
    chance: float = 0.0
    group: str = "classification"
    clusters: Sequence[Hashable] = ()


@dataclass(frozen=True)
class Retained:
    """What a changed model retains in one group of tasks.

    Attributes
    ----------
    ratio : Estimate
        Its mean accuracy over the tasks divided by the original's.
    above_chance : Estimate or None
        The mean over `tasks` of (accuracy − chance)/(the original's − chance); None where there are none.
    tasks : dict of str to Estimate
        The same for each task on which the original is clearly above chance.
    left_out : dict of str to str
        The other tasks, and why.
    """

    ratio: Estimate
    above_chance: Estimate | None
    tasks: Mapping[str, Estimate]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        count = f"{len(self.tasks)} of {len(self.tasks) + len(self.left_out)} tasks"
        without = "".join(f"; without {name}, {reason}" for name, reason in self.left_out.items())
        above = f"{self.above_chance} above chance" if self.above_chance else "nothing above chance"
        return f"{self.ratio} of the mean accuracy, {above} ({count}{without})"


def retained(
    tasks: Iterable[TaskAnswers],
    *,
    clearly: float = 3.0,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Retained]:
    """What a changed model retains of its original's answers.

    `Retained.ratio` is what LLM-Streamline (arXiv 2403.19135) and most papers on pruning report: the unweighted mean
    accuracy over the tasks, divided by the original's. A model that only guesses retains much by it. So
    `Retained.above_chance` leaves out of each task what guessing gives.

    Each task's questions are drawn again with replacement, the same ones for both models: what both find hard does not
    make their ratio unsure. Chance is not drawn again. The draws of a task depend on its name and the seed alone.

    Parameters
    ----------
    tasks : iterable of TaskAnswers
    clearly : float
        How many standard errors above chance the original must be for a task to count above chance. At 2, one draw in
        44 has the original below chance, and an interval may be wide or open.
    draws : int
    level : float
        How much of the draws an interval holds.
    seed : int
        0 or more.

    Returns
    -------
    dict of str to Retained
        By group, in the order in which they come.

    Raises
    ------
    StreamlineError
        If a task cannot be compared, two have one name, or an original answers nothing right in a whole group.

    Examples
    --------
    >>> original, changed = [True] * 80 + [False] * 20, [True] * 70 + [False] * 30
    >>> found = retained([TaskAnswers("arc", original, changed, chance=0.25)])["classification"]
    >>> round(found.ratio.value, 4), round(found.above_chance.value, 4)  # 0.7/0.8 and 0.45/0.55
    (0.875, 0.8182)
    >>> 0.7 < found.above_chance.low < 0.8182 < found.above_chance.high < 0.95
    True
    """
    check_draws(clearly, draws, level, seed)
    return {name: _of_group(named, clearly, draws, level, seed) for name, named in grouped(tasks).items()}


def check_draws(clearly: float, draws: int, level: float, seed: int) -> None:
    """Refuse settings of which no interval can be made."""
    if clearly < 0 or draws < 100 or not 0 < level < 1 or seed < 0:
        raise StreamlineError(
            f"Got clearly={clearly}, draws={draws}, level={level}, seed={seed}; expected clearly of 0 or more, 100 "
            "draws or more, a level between 0 and 1, and a seed of 0 or more."
        )


def grouped(tasks: Iterable[TaskAnswers]) -> dict[str, dict[str, TaskAnswers]]:
    """By group and name, in the order in which they come; refused where one cannot be compared."""
    groups: dict[str, dict[str, TaskAnswers]] = {}
    for task in tasks:
        _check(task)
        if any(task.name in named for named in groups.values()):
            raise StreamlineError(f"Two tasks are named {task.name!r}; give each its own name.")
        groups.setdefault(task.group, {})[task.name] = task
    if not groups:
        raise StreamlineError("There is no task to compare; give one at least.")
    for group, named in groups.items():
        if not any(answers_of(task)[:, 0].any() for task in named.values()):
            raise StreamlineError(
                f"In the group {group!r} the original answers no question right, of which nothing can be retained."
            )
    return groups


def _of_group(named: Mapping[str, TaskAnswers], clearly: float, draws: int, level: float, seed: int) -> Retained:
    # Sums in one order, always.
    drawn = {
        name: accuracies(name, answers_of(task), draws, seed, task.clusters) for name, task in sorted(named.items())
    }
    before, after = (np.mean([pair[k] for pair in drawn.values()], axis=0) for k in (0, 1))
    left_out = {name: reason for name, task in named.items() if (reason := not_clearly(task, clearly))}
    shares = {
        name: share_kept(first, second, named[name].chance)
        for name, (first, second) in drawn.items()
        if name not in left_out
    }
    above = estimate(np.mean(list(shares.values()), axis=0), level) if shares else None
    in_order = {name: estimate(shares[name], level) for name in named if name in shares}
    return Retained(estimate(share_kept(before, after, 0.0), level), above, in_order, left_out)


def not_clearly(task: TaskAnswers, clearly: float) -> str:
    """Why a task does not count above chance; nothing if it does."""
    right = answers_of(task)[:, 0]
    if len(right) < 2:
        return "which has one question"
    if len(task.clusters) and len(set(task.clusters)) < 2:
        return "whose questions are all of one cluster"
    above, error = right.mean() - task.chance, standard_error(right, task.clusters)
    if above > clearly * error:
        return ""
    return f"where the original's {right.mean():.1%} ± {error:.1%} is not clearly above the chance of {task.chance:.1%}"


def answers_of(task: TaskAnswers) -> np.ndarray:
    """Of each question the original's score and the changed model's."""
    return np.stack([np.asarray(task.original, dtype=float), np.asarray(task.changed, dtype=float)], axis=1)


def _check(task: TaskAnswers) -> None:
    if len(task.original) != len(task.changed) or not len(task.original):
        raise StreamlineError(
            f"The task {task.name!r} has {len(task.original)} answers of the original and {len(task.changed)} of the "
            "changed model; expected one of each for the same questions, and a question at least."
        )
    pairs = answers_of(task)
    if not ((pairs >= 0) & (pairs <= 1)).all():
        raise StreamlineError(f"The answers of the task {task.name!r} are not all between 0 (wrong) and 1 (right).")
    if len(task.clusters) not in (0, len(task.original)):
        raise StreamlineError(
            f"The task {task.name!r} has {len(task.original)} questions and the clusters of {len(task.clusters)}; "
            "expected one for each question, or none."
        )
    if not 0 <= task.chance <= 1:
        raise StreamlineError(f"The task {task.name!r} has the chance {task.chance}; expected 0 to 1.")
