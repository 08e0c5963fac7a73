"""The problem that a search solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from torch import Tensor, nn

from streamline_hooks.arguments import check_fields
from streamline_hooks.batch import Batch, tokens_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria import CRITERIA, Criterion, score_windows
from streamline_hooks.statistics import Profile
from streamline_hooks.task import Task

RANKED = 4_096  # tokens for a criterion that runs the model once for each window


@dataclass(frozen=True)
class SearchProblem:
    """The windows to choose from, the criterion, and what it is measured on. `SearchConfig.problem` makes one.

    Attributes
    ----------
    candidates : sequence of range
        The windows that each alone reach the target, see `windows_for`.
    length : int
        Number of blocks of the stack.
    criterion : Criterion
        Scores windows; higher scores go first.
    keep : frozenset of int
        Blocks that must stay, counted from the start.
    best : int
        Largest number of selections to return.
    profile : Profile, optional
        Profile of the model, for criteria of a profile.
    model : torch.nn.Module, optional
        For criteria and searches that run the model.
    batches : sequence of mapping or torch.Tensor, optional
        Inputs of the model.
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        By default the task of the model's class.
    shortest : int
        Least number of blocks in each of several windows: more than the slots of a replacement.
    """

    candidates: Sequence[range]
    length: int
    criterion: Criterion = CRITERIA["cosine"]
    keep: frozenset[int] = frozenset()
    best: int = 1
    profile: Profile | None = None
    model: nn.Module | None = None
    batches: Sequence[Batch | Tensor] | None = None
    stack: str | None = None
    task: Task | None = None
    shortest: int = 1

    def __post_init__(self) -> None:
        check_fields(self, length=1, best=1, shortest=1)
        if not self.candidates:
            raise StreamlineError(
                "SearchProblem: candidates=[] holds no window. Expected the windows that reach the target. Make them "
                "with windows_for, or protect fewer blocks."
            )

    @property
    def count(self) -> int:
        """Number of blocks to remove, for a search that does not choose one of the candidates.

        Raises
        ------
        StreamlineError
            If the candidates differ in length.
        """
        lengths = sorted({len(window) for window in self.candidates})
        if len(lengths) != 1:
            raise StreamlineError(
                f"The windows that reach the target are {lengths[0]} to {lengths[-1]} blocks long; this search takes "
                "one number of blocks. Give a number or a fraction of the blocks, or search for a window."
            )
        return lengths[0]

    def score(self, windows: Sequence[range]) -> list[float]:
        """Score windows; a criterion that runs the model once for each window gets the first 4,096 tokens."""
        return score_windows(
            self.criterion,
            windows,
            profile=self.profile,
            model=self.model,
            batches=self.beginning(RANKED) if self.criterion.runs_per_window else self.batches,
            stack=self.stack,
            task=self.task,
        )

    def beginning(self, tokens: int) -> list[Batch | Tensor] | None:
        """Return the first batches with at most this number of tokens in total, and at least one batch."""
        if self.batches is None:
            return None
        fitting = sum(1 for total in accumulate(map(tokens_of, self.batches)) if total <= tokens)
        return list(islice(self.batches, fitting or 1))

    def running(self) -> tuple[nn.Module, Sequence[Batch | Tensor]]:
        """Return the model and the batches, for a search that needs both."""
        if self.model is None or self.batches is None:
            raise StreamlineError(
                "This search runs the model: a profile is not enough. Give a model and text, or search for a window, "
                "disjoint windows or single blocks (window, disjoint, one-shot)."
            )
        return self.model, self.batches
