"""Score windows by a criterion or a combination."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria.registry import Combination, Criterion, criterion_of
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import Profile, check_profile
from streamline_hooks.statistics import profile as make_profile
from streamline_hooks.task import Task


@checked()
def score_windows(
    criterion: Criterion | str,
    windows: Sequence[range],
    *,
    profile: Profile | None = None,
    model: nn.Module | None = None,
    batches: Sequence[Batch | Tensor] | None = None,
    stack: str | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> list[float]:
    """Score windows by a criterion.

    Criteria of a profile run nothing if one is given; otherwise it is measured in one pass.

    Parameters
    ----------
    criterion : Criterion or str
        A criterion, or the name of a registered one, see `CRITERIA`.
    windows : sequence of range
    profile : Profile, optional
        Of this model.
    model : torch.nn.Module, optional
    batches : sequence of mapping or torch.Tensor, optional
        Inputs of the model. A criterion that has its own text takes an empty list.
    stack : str, optional
        Path of the stack, see `find_stack`.
    task : Task, optional
        For criteria that compare outputs, see `Task.of`.
    original : torch.nn.Module, optional
        The model before blocks were removed, if any were, for criteria that compare with it.

    Returns
    -------
    list of float
        One for each window; higher scores go first.

    Raises
    ------
    StreamlineError
        If the criterion runs the model and there is only a profile, the profile is of another model, a window is out
        of range, or a score is not a number.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> windows = [range(1, 3), range(2, 4)]
    >>> len(score_windows("cosine", windows, model=tiny_model("llama"), batches=[torch.arange(3, 9)[None]]))
    2
    """
    chosen, windows = criterion_of(criterion), list(windows)
    _require_windows(windows, profile, model, stack)
    _require_inputs(chosen, profile, model, batches)
    if profile is not None and model is not None:
        check_profile(profile, model, stack)
    if not windows:
        return []
    given = None if batches is None else list(batches)
    if profile is None and model is not None and given is not None and _reads_profile(chosen):
        profile = make_profile(model, given, replicates=0, stack=stack)
    return _scores(chosen, windows, profile, (model, given), {"stack": stack, "task": task, "original": original})


def compares_with_the_original(criterion: Criterion) -> bool:
    """Whether a criterion, or a part of it, takes the model as it was before blocks were removed."""
    if isinstance(criterion, Combination):
        return any(compares_with_the_original(part) for part, _ in criterion.parts)
    return criterion.needs == "model" and "original" in inspect.signature(criterion.score).parameters


def _reads_profile(criterion: Criterion) -> bool:
    if isinstance(criterion, Combination):
        return any(_reads_profile(part) for part, _ in criterion.parts)
    return criterion.needs == "profile"


def _require_inputs(criterion: Criterion, profile: Profile | None, model: Any, batches: Any) -> None:
    if model is not None and batches is not None:
        return
    if criterion.needs == "model":
        raise StreamlineError(
            f"The criterion {criterion.name!r} runs the model: a profile is not enough. Give the model and batches, or "
            "choose a criterion that is read off a profile."
        )
    if profile is None:
        raise StreamlineError(
            f"The criterion {criterion.name!r} is read off a profile; give one, or a model and batches to make one."
        )


def _require_windows(windows: list[range], profile: Profile | None, model: nn.Module | None, stack: str | None) -> None:
    if model is not None:
        length = len(find_stack(model, stack))
    elif profile is not None:
        length = profile.length
    else:
        return
    wrong = [w for w in windows if w.step != 1 or not 0 <= w.start < w.stop <= length]
    if wrong:
        raise StreamlineError(
            f"{wrong[0]} is no window of this stack. Expected a run of consecutive blocks out of 0 to {length - 1}. "
            "Give for example range(3, 6)."
        )


def _scores(
    criterion: Criterion, windows: list[range], profile: Profile | None, inputs: tuple[Any, Any], more: dict[str, Any]
) -> list[float]:
    """Return the scores, of a combination by its parts, and refuse those that are no numbers."""
    if isinstance(criterion, Combination):
        parts = [_scores(part, windows, profile, inputs, more) for part, _ in criterion.parts]
        return _combine(parts, [weight for _, weight in criterion.parts], criterion.by)
    if criterion.needs == "model":
        taken = inspect.signature(criterion.score).parameters
        options = {name: value for name, value in more.items() if name == "stack" or name in taken}
        values = list(criterion.score(*inputs, windows, **options))
    else:
        values = [criterion.score(profile, window) for window in windows]
    if len(values) != len(windows):
        raise StreamlineError(
            f"The criterion {criterion.name!r} gave {len(values)} scores for {len(windows)} windows; expected one "
            "each, in their order."
        )
    scores = [float(value) for value in values]
    for window, score in zip(windows, scores, strict=True):
        if math.isnan(score) or score == math.inf:
            raise StreamlineError(
                f"The criterion {criterion.name!r} gave {score} for the window of blocks {window.start} to "
                f"{window.stop - 1}; expected a number, or −inf for a window that must stay."
            )
    if max(scores) == -math.inf:
        raise StreamlineError(
            f"The criterion {criterion.name!r} finds none of the {len(windows)} windows that can be removed: without "
            "any of them the model's output is not finite. Look at its weights, remove less, or run in a wider "
            "precision (float32 or bfloat16)."
        )
    return scores


def _ranks(scores: Sequence[float]) -> list[float]:
    """Return the share of the other windows that each comes before; a tie counts half."""
    order, others = sorted(scores), max(1, len(scores) - 1)
    return [(bisect_left(order, s) + bisect_right(order, s) - 1) / 2 / others for s in scores]


def _combine(parts: Sequence[Sequence[float]], weights: Sequence[float], by: Literal["rank", "weight"]) -> list[float]:
    """Return the weighted sums; −inf where any part says that a window must stay."""
    added = [_ranks(scores) for scores in parts] if by == "rank" else parts
    sums = [math.fsum(w * s for w, s in zip(weights, each, strict=True)) for each in zip(*added, strict=True)]
    refused = [-math.inf in each for each in zip(*parts, strict=True)]
    return [-math.inf if no else total for no, total in zip(refused, sums, strict=True)]
