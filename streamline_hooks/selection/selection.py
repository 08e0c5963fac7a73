"""`Selection`: the blocks to remove and branches to zero; `SearchProblem`: the input of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Self

from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, count_tokens, validate_fields
from streamline_hooks.modeling import Branch, StateSource, Task
from streamline_hooks.selection.criteria import CRITERIA, Criterion
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.statistics import Profile

Scorer = Callable[[Sequence[range]], Sequence[float]]
"""Scores all windows in one call, to share passes of the model. A window with score −inf must stay."""


@dataclass(frozen=True)
class Selection:
    """Blocks to remove and branches to zero.

    Attributes
    ----------
    windows : tuple of range
        Windows of consecutive blocks to remove, in order, with at least one block between two windows.
    zeroed : tuple of (int, {"attention", "mlp"})
        Branches of other blocks whose output is set to zero, in order.
    score : float
        Score from the search; higher is better.

    Examples
    --------
    >>> selection = Selection.of_blocks([4, 2, 3, 7], [(0, "mlp")])
    >>> selection.windows, sorted(selection.blocks)
    ((range(2, 5), range(7, 8)), [2, 3, 4, 7])
    >>> str(selection)
    '2-4, 7, mlp of 0'
    """

    windows: tuple[range, ...]
    zeroed: tuple[tuple[int, Branch], ...] = ()
    score: float = 0.0

    def __post_init__(self) -> None:
        validate_fields(self)
        if not self.windows and not self.zeroed:
            raise StreamlineError(
                "Selection: windows and zeroed are both empty. Expected at least one block or branch. Pass for "
                "example windows=(range(3, 5),)."
            )
        if any(not isinstance(w, range) or w.step != 1 or not w or w.start < 0 for w in self.windows):
            raise StreamlineError(
                f"Selection: windows={self.windows}. Expected non-empty ranges of blocks with step 1. Pass for example "
                "windows=(range(3, 5),)."
            )
        if any(before.stop >= after.start for before, after in zip(self.windows, self.windows[1:], strict=False)):
            raise StreamlineError(
                f"Selection: windows={self.windows} are not in order or not separated. Expected ascending windows with "
                "at least one block between two. Use Selection.of_blocks for any set of blocks."
            )
        overlap = sorted(k for k, _ in self.zeroed if k in self.blocks)
        if overlap or list(self.zeroed) != sorted(set(self.zeroed)):
            reason = f"block {overlap[0]} is removed" if overlap else "they are not sorted, or one occurs twice"
            raise StreamlineError(
                f"Selection: the branches {self.zeroed} cannot be zeroed: {reason}. Expected sorted, unique "
                "branches of blocks that stay. Use Selection.of_blocks, which sorts them."
            )

    @classmethod
    def of_blocks(cls, blocks: Iterable[int], zeroed: Iterable[tuple[int, Branch]] = (), score: float = 0.0) -> Self:
        """Return a selection of blocks; consecutive blocks become one window."""
        return cls(consecutive_runs(blocks), tuple(sorted(zeroed)), score)

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks to remove."""
        return frozenset(k for window in self.windows for k in window)

    @property
    def blocks_text(self) -> str:
        """The blocks to remove, as text such as ``"2-4, 7"``."""
        return ", ".join(f"{w.start}-{w.stop - 1}" if len(w) > 1 else str(w.start) for w in self.windows)

    def __str__(self) -> str:
        parts = [self.blocks_text] if self.windows else []
        return ", ".join([*parts, *(f"{branch} of {k}" for k, branch in self.zeroed)])


def consecutive_runs(blocks: Iterable[int]) -> tuple[range, ...]:
    """Group block indices into ranges of consecutive blocks, in ascending order."""
    runs: list[range] = []
    for k in sorted(set(blocks)):
        if runs and runs[-1].stop == k:
            runs[-1] = range(runs[-1].start, k + 1)
        else:
            runs.append(range(k, k + 1))
    return tuple(runs)


def finite_scores(score: Scorer, candidates: Sequence[range]) -> dict[range, float]:
    """Score windows, and return those with a score above −inf."""
    scores = map(float, score(candidates)) if candidates else []
    return {w: value for w, value in zip(candidates, scores, strict=True) if value > -math.inf}


def best_windows(score: Scorer, candidates: Sequence[range]) -> list[Selection]:
    """Return a selection per window with a score above −inf, best first; ties go to the earlier window."""
    scored = [Selection((window,), score=value) for window, value in finite_scores(score, candidates).items()]
    if not scored:
        raise StreamlineError(
            f"None of the {len(candidates)} candidate windows can be selected. Expected at least one window without a "
            "protected block and with a score above −inf. Protect fewer blocks, or remove less."
        )
    return sorted(scored, key=lambda s: (-s.score, s.windows[0].start, s.windows[0].stop))


RANKING_TOKENS = 4_096  # maximum for a criterion that runs the model once for each window


@dataclass(frozen=True)
class SearchProblem:
    """Input of a search: candidate windows, a criterion, and the data to score with; see `SearchConfig.problem`.

    Attributes
    ----------
    candidates : sequence of range
        The windows that each reach the target (see `target_windows`).
    length : int
        Number of blocks of the stack.
    criterion : Criterion
        The criterion to score with.
    protect : frozenset of int
        Blocks that must stay, as non-negative indices.
    best : int
        Maximum number of selections to return.
    profile : Profile, optional
        For criteria that need a profile.
    model : torch.nn.Module or StateSource, optional
        For criteria and searches that run the model; a source for searches with `takes_source`.
    batches : sequence of mapping or torch.Tensor, optional
        For criteria and searches that run the model.
    stack : str, optional
        Path of the stack (see `find_stack`).
    task : Task, optional
        The model's task, for criteria that compare outputs.
    shortest : int
        Minimum length of a window in a selection of several: larger than the slots of the replacement.
    """

    candidates: Sequence[range]
    length: int
    criterion: Criterion = CRITERIA["cosine"]
    protect: frozenset[int] = frozenset()
    best: int = 1
    profile: Profile | None = None
    model: nn.Module | StateSource | None = None
    batches: Sequence[Batch | Tensor] | None = None
    stack: str | None = None
    task: Task | None = None
    shortest: int = 1

    def __post_init__(self) -> None:
        validate_fields(self, length=1, best=1, shortest=1)
        if not self.candidates:
            raise StreamlineError(
                "SearchProblem: candidates=[] is empty. Expected the windows that reach the target. Compute them with "
                "target_windows, or protect fewer blocks."
            )

    @property
    def count(self) -> int:
        """Number of blocks to remove. Raises StreamlineError if the candidates differ in length."""
        lengths = sorted({len(window) for window in self.candidates})
        if len(lengths) != 1:
            raise StreamlineError(
                f"The windows that reach the target have {lengths[0]} to {lengths[-1]} blocks. Expected windows of one "
                "length in this search. Use a number or a fraction of the blocks as target, or use WindowSearch."
            )
        return lengths[0]

    def score(self, windows: Sequence[range]) -> list[float]:
        """Score windows; a criterion that runs the model once per window uses only the first 4,096 tokens."""
        return score_windows(
            self.criterion,
            windows,
            profile=self.profile,
            model=self.model.model if isinstance(self.model, StateSource) else self.model,
            batches=self.first_batches(RANKING_TOKENS) if self.criterion.runs_per_window else self.batches,
            stack=self.stack,
            task=self.task,
        )

    def first_batches(self, tokens: int) -> list[Batch | Tensor] | None:
        """Return the first batches, with at most `tokens` tokens in total but at least one batch."""
        if self.batches is None:
            return None
        fitting = sum(total <= tokens for total in accumulate(map(count_tokens, self.batches)))
        return list(islice(self.batches, fitting or 1))

    def model_and_batches(self) -> tuple[nn.Module | StateSource, Sequence[Batch | Tensor]]:
        """Return the model and the batches; raise StreamlineError if either is missing."""
        if self.model is None or self.batches is None:
            raise StreamlineError(
                "This search runs the model: a profile is not enough. Expected a model and batches. Pass model=... and "
                "batches=..., or use the search window, disjoint or one-shot."
            )
        return self.model, self.batches
