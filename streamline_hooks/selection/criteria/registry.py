"""`Criterion`, the registry of criteria, and combinations of criteria."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.core.config import Registry, source_of
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria.model_criteria import (
    kl_when_removed,
    perplexity_when_removed,
    repaired_residual,
)
from streamline_hooks.selection.criteria.states import (
    at_random,
    block_influence,
    closeness,
    cosine,
    entropy_increase,
    last_closeness,
    last_n,
    last_n_but_final,
    relative_magnitude,
)
from streamline_hooks.selection.criteria.taylor import taylor

Needs = Literal["profile", "model"]


@dataclass(frozen=True)
class Criterion:
    """Score windows: those with higher scores are removed first. `register_criterion` makes one known by its name.

    Attributes
    ----------
    name : str
    score : callable
        If `needs` is ``"profile"``, ``score(profile, window)`` returns the score of one window. If it is ``"model"``,
        ``score(model, batches, windows, *, stack=None)`` returns those of all windows; it may also take ``task``, and
        ``original``, the model before blocks were removed (None if none were). A window with −inf is never removed;
        NaN and +inf are errors.
    needs : {"profile", "model"}
    paper : str
        Where it was published.
    made_of : callable, optional
        Returns a digest of the data that the criterion holds, as `accuracy_drop` does.
    runs_per_window : bool
        Whether it runs the model once for each window. Searches then measure it on 4,096 tokens. By default False.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> Criterion("norm", lambda profile, window: -profile.norms[window.stop], "profile").needs
    'profile'
    """

    name: str
    score: Callable[..., Any]
    needs: Needs
    paper: str = ""
    made_of: Callable[[], str] | None = field(default=None, kw_only=True)
    runs_per_window: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name:
            raise StreamlineError("Criterion: name='' is empty. Expected text. Give a name.")


@dataclass(frozen=True)
class Combination(Criterion):
    """Several criteria in one; made by `combined`.

    Attributes
    ----------
    parts : tuple of (Criterion, float)
        With their weights.
    by : {"rank", "weight"}
    """

    parts: tuple[tuple[Criterion, float], ...] = ()
    by: Literal["rank", "weight"] = "rank"


def _definition(criterion: Criterion) -> Any:
    """Return where a criterion was defined: its function, or the parts of a combination."""
    if isinstance(criterion, Combination):
        return criterion.parts, criterion.by
    return source_of(criterion.score)


CRITERIA: Registry[Criterion] = Registry("criterion", "register_criterion", _definition)
"""The criteria by name."""

for _criterion in (
    Criterion("cosine", cosine, "profile", "LLM-Streamline, arXiv 2403.19135"),
    Criterion("angular", closeness, "profile", "Gromov et al., arXiv 2403.17887, over all tokens"),
    Criterion("last_angular", last_closeness, "profile", "Gromov et al., arXiv 2403.17887"),
    Criterion("block_influence", block_influence, "profile", "ShortGPT, arXiv 2403.03853"),
    Criterion("relative_magnitude", relative_magnitude, "profile", "Samragh et al., arXiv 2312.09299"),
    Criterion("entropy", entropy_increase, "profile", "EntroDrop, arXiv 2504.03794"),
    Criterion("last_n", last_n, "profile", "Lu et al., arXiv 2411.15558"),
    Criterion("last_n_but_final", last_n_but_final, "profile", "Gromov et al., arXiv 2403.17887"),
    Criterion("random", at_random, "profile"),
    Criterion("perplexity", perplexity_when_removed, "model", "SLEB, arXiv 2402.09025", runs_per_window=True),
    Criterion("kl", kl_when_removed, "model", runs_per_window=True),
    Criterion("repaired_residual", repaired_residual, "model"),
    Criterion("taylor", taylor, "model", "Shortened LLaMA, arXiv 2402.02834"),
):
    CRITERIA.add(_criterion.name, _criterion)

SHORTLIST = "cosine_and_magnitude"
"""The default criterion for single windows. Cosine measures the direction of the state, relative magnitude how far it
moves. Either alone misses windows that repair well: for 10 of SmolLM2-135M's 30 blocks cosine ranks the window with the
least KL eleventh."""


def register_criterion(criterion: Criterion) -> Criterion:
    """Make a criterion known by its name, for searches, `compress`, config files and the command line.

    Parameters
    ----------
    criterion : Criterion

    Returns
    -------
    Criterion
        The same.

    Raises
    ------
    StreamlineError
        If it is no `Criterion`, or its name cannot be used or is another criterion's.

    Examples
    --------
    >>> mine = register_criterion(Criterion("norm", lambda profile, window: -profile.norms[window.stop], "profile"))
    >>> CRITERIA["norm"] is mine
    True
    >>> del CRITERIA["norm"]
    """
    if not isinstance(criterion, Criterion):
        raise StreamlineError(
            f"{criterion!r} is no criterion. Expected a Criterion. Make one, as in Criterion('mine', score, 'profile')."
        )
    return CRITERIA.add(criterion.name, criterion)


def criterion_of(value: str | Mapping[str, float] | Criterion | None, default: str = "cosine") -> Criterion:
    """Return the criterion that a config's value stands for.

    Parameters
    ----------
    value : str, mapping of str to float, Criterion or None
        A registered name, several with weights that are combined by rank, or a criterion, which is returned.
    default : str
        The name that None stands for.

    Raises
    ------
    StreamlineError
        If a name is unknown, with the nearest known one, or a weight is not above 0.

    Examples
    --------
    >>> criterion_of({"cosine": 1.0, "relative_magnitude": 0.5}).name
    'cosine + 0.5 relative_magnitude by rank'
    """
    if isinstance(value, Criterion):
        return value
    if isinstance(value, Mapping):
        return combined({part: weight for part, weight in value.items()})
    return CRITERIA[default if value is None else value]


@checked()
def combined(parts: Mapping[str | Criterion, float], by: Literal["rank", "weight"] = "rank") -> Criterion:
    """Combine several criteria into one.

    Parameters
    ----------
    parts : mapping of str or Criterion to float
        Their weights, above 0.
    by : {"rank", "weight"}
        Add the ranks among the windows that are scored together, from 0 to 1, which needs no common unit; or add the
        scores times their weights. −inf of any part is −inf of the combination.

    Returns
    -------
    Criterion
        It runs the model if any of the parts does.

    Raises
    ------
    StreamlineError
        If there are no parts, or a weight is not above 0.

    Examples
    --------
    >>> combined({"cosine": 1.0, "relative_magnitude": 0.5}).name
    'cosine + 0.5 relative_magnitude by rank'
    """
    wrong = [weight for weight in parts.values() if not (math.isfinite(weight) and weight > 0)]
    if wrong or not parts:
        what = f"a weight of {wrong[0]}" if wrong else "no criteria"
        raise StreamlineError(f"A combination was given {what}; expected criteria with weights above 0.")
    each = [(criterion_of(part), float(weight)) for part, weight in parts.items()]
    name = " + ".join(f"{'' if weight == 1.0 else f'{weight:g} '}{part.name}" for part, weight in each) + f" by {by}"
    needs: Needs = "model" if any(part.needs == "model" for part, _ in each) else "profile"
    papers = "; ".join(dict.fromkeys(part.paper for part, _ in each if part.paper))
    per_window = any(part.runs_per_window for part, _ in each)
    return Combination(name, _score_together, needs, papers, tuple(each), by, runs_per_window=per_window)


def _score_together(*given: Any, **named: Any) -> NoReturn:
    """Raise: ranks exist only among windows that are scored together."""
    raise StreamlineError("A combination is scored with score_windows, which scores all windows together.")


CRITERIA.add(SHORTLIST, replace(combined({"cosine": 1.0, "relative_magnitude": 1.0}), name=SHORTLIST))
