"""Score windows by a criterion or a combination of criteria."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from streamline_hooks.core import Batch, StreamlineError, describe_blocks, validate_arguments
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.selection.criteria import Combination, Criterion, resolve_criterion
from streamline_hooks.statistics import Profile, check_profile
from streamline_hooks.statistics import profile as make_profile


@validate_arguments()
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
    """Score windows by a criterion; higher scores are removed first.

    A criterion with ``needs="profile"`` does not run the model if a profile is passed; otherwise the profile is
    measured in one pass.

    Parameters
    ----------
    criterion : Criterion or str
        A criterion, or the name of a registered criterion (see `CRITERIA`).
    windows : sequence of range
        The windows to score.
    profile : Profile, optional
        Profile of the model.
    model : torch.nn.Module, optional
        The model; required without a profile and by criteria that run the model.
    batches : sequence of mapping or torch.Tensor, optional
        Inputs of the model. Pass an empty list for a criterion with data of its own, such as `accuracy_drop`.
    stack : str, optional
        Path of the stack (see `find_stack`).
    task : Task, optional
        The model's task, for criteria that compare outputs (see `Task.of`).
    original : torch.nn.Module, optional
        The model before blocks were removed, for criteria that compare with it.

    Returns
    -------
    list of float
        One score per window.

    Raises
    ------
    StreamlineError
        If the criterion runs the model and only a profile is passed, the profile belongs to another model, a window is
        out of range, or a score is NaN or +inf.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> windows = [range(1, 3), range(2, 4)]
    >>> len(score_windows("cosine", windows, model=tiny_model("llama"), batches=[torch.arange(3, 9)[None]]))
    2
    """
    chosen, windows = resolve_criterion(criterion), list(windows)
    _require_windows(windows, profile, model, stack)
    _require_inputs(chosen, profile, model, batches)
    if profile is not None and model is not None:
        check_profile(profile, model, stack)
    if not windows:
        return []
    inputs = None if batches is None else list(batches)
    reads_profile = any(part.needs == "profile" for part in leaf_criteria(chosen))
    if profile is None and model is not None and inputs is not None and reads_profile:
        profile = make_profile(model, inputs, replicates=0, stack=stack)
    return _scores(chosen, windows, profile, (model, inputs), {"stack": stack, "task": task, "original": original})


def compares_with_the_original(criterion: Criterion) -> bool:
    """Whether the score function of the criterion, or of a part of it, has a parameter ``original``."""
    return any(
        part.needs == "model" and "original" in inspect.signature(part.score).parameters
        for part in leaf_criteria(criterion)
    )


def leaf_criteria(criterion: Criterion) -> Iterator[Criterion]:
    """Yield the leaves of a (nested) combination, or the criterion itself."""
    if isinstance(criterion, Combination):
        for part, _ in criterion.parts:
            yield from leaf_criteria(part)
    else:
        yield criterion


def _require_inputs(criterion: Criterion, profile: Profile | None, model: Any, batches: Any) -> None:
    if model is not None and batches is not None:
        return
    if criterion.needs == "model":
        raise StreamlineError(
            f"The criterion {criterion.name!r} runs the model: a profile is not enough. Expected a model and batches. "
            "Pass model=... and batches=..., or use a criterion that needs only a profile."
        )
    if profile is None:
        raise StreamlineError(
            f"The criterion {criterion.name!r} needs a profile, but profile=None. Expected a profile, or a model and "
            "batches. Pass profile=..., or model=... and batches=..."
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
            f"{wrong[0]} is not a window of this stack. Expected consecutive blocks from 0 to {length - 1}. Pass for "
            "example range(3, 6)."
        )


def _scores(
    criterion: Criterion, windows: list[range], profile: Profile | None, inputs: tuple[Any, Any], more: dict[str, Any]
) -> list[float]:
    """Return the scores, for a combination from its parts; raise if a score is NaN or +inf."""
    if isinstance(criterion, Combination):
        parts = [_scores(part, windows, profile, inputs, more) for part, _ in criterion.parts]
        return _weighted_sums(parts, [weight for _, weight in criterion.parts], criterion.by)
    if criterion.needs == "model":
        taken = inspect.signature(criterion.score).parameters
        options = {name: value for name, value in more.items() if name == "stack" or name in taken}
        values = list(criterion.score(*inputs, windows, **options))
    else:
        values = [criterion.score(profile, window) for window in windows]
    if len(values) != len(windows):
        raise StreamlineError(
            f"The criterion {criterion.name!r} returned {len(values)} scores for {len(windows)} windows. Expected one "
            "score per window, in order. Correct its score function."
        )
    scores = list(map(float, values))
    for window, score in zip(windows, scores, strict=True):
        if math.isnan(score) or score == math.inf:
            raise StreamlineError(
                f"The criterion {criterion.name!r} returned {score} for {describe_blocks(window)}. "
                "Expected a finite number, or −inf for a window that must stay. Correct its score function."
            )
    if max(scores) == -math.inf:
        raise StreamlineError(
            f"The criterion {criterion.name!r} returned −inf for all {len(windows)} windows: none of them can be "
            "removed, usually because the output without them is not finite. Check the weights, remove less, or run "
            "in float32 or bfloat16."
        )
    return scores


def _ranks(scores: Sequence[float]) -> list[float]:
    """Return for each score the fraction of the other scores below it; a tie counts half."""
    order, others = sorted(scores), max(1, len(scores) - 1)
    return [(bisect_left(order, s) + bisect_right(order, s) - 1) / 2 / others for s in scores]


def _weighted_sums(
    parts: Sequence[Sequence[float]], weights: Sequence[float], by: Literal["rank", "weight"]
) -> list[float]:
    """Return the weighted sums of scores or ranks, or −inf where any part is −inf."""
    terms = [_ranks(scores) for scores in parts] if by == "rank" else parts
    sums = [math.fsum(w * t for w, t in zip(weights, by_part, strict=True)) for by_part in zip(*terms, strict=True)]
    excluded = [-math.inf in by_part for by_part in zip(*parts, strict=True)]
    return [-math.inf if is_excluded else total for is_excluded, total in zip(excluded, sums, strict=True)]
