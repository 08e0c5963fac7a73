"""Criteria computed from a `Profile`, baselines that ignore the text, and the registry of criteria."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from streamline_hooks.core import Registry, StreamlineError, source_of, validate_arguments, validate_fields
from streamline_hooks.selection.model_criteria import kl_when_removed, perplexity_when_removed, repaired_residual
from streamline_hooks.selection.taylor import taylor
from streamline_hooks.statistics import Profile


def cosine(profile: Profile, window: range) -> float:
    """Return the mean cosine of the states before and after the window (LLM-Streamline, arXiv 2403.19135, eq. 4)."""
    return profile.value("cosine", window)


def angular_similarity(profile: Profile, window: range) -> float:
    """Return one minus the mean angular distance across the window, over all tokens.

    See Gromov et al. (arXiv 2403.17887, eq. 8).
    """
    return 1.0 - profile.value("angular", window)


def last_angular_similarity(profile: Profile, window: range) -> float:
    """Return one minus the mean angular distance across the window, over the last real token of each row.

    See Gromov et al. (arXiv 2403.17887, eq. 8).
    """
    return 1.0 - profile.value("last_angular", window)


def block_influence(profile: Profile, window: range) -> float:
    """Return minus the summed influence of the window's blocks (ShortGPT, arXiv 2403.03853).

    The influence of a block is one minus the mean cosine of the states before and after it. Unlike `cosine`, the sum
    also counts changes that a later block of the window reverses.
    """
    return -sum(1.0 - profile.value("cosine", range(k, k + 1)) for k in window)


def relative_magnitude(profile: Profile, window: range) -> float:
    """Return minus the sum over the window's blocks of ‖output − input‖/‖input‖.

    It is a baseline of ShortGPT (arXiv 2403.03853). Samragh et al. (arXiv 2312.09299) divide by the output norm.
    """
    return -profile.value("relative_magnitude", window)


def last_n(profile: Profile, window: range) -> float:
    """Return the end of the window, so that the last n blocks, with the final block, are removed first.

    Lu et al. (Reassessing Layer Pruning in LLMs, arXiv 2411.15558) find this reverse order hard to beat after
    finetuning.
    """
    return float(window.stop)


def last_n_but_final(profile: Profile, window: range) -> float:
    """Return the end of the window, or 0 if it contains the final block.

    The last n blocks before the final block are removed first (Gromov et al., arXiv 2403.17887, section 4.4).
    """
    return float(window.stop % profile.length)


def random_score(profile: Profile, window: range, seed: int = 0) -> float:
    """Return a number in [0, 1) that depends only on the window and the seed.

    To use another seed: ``register_criterion(Criterion("random-1", partial(random_score, seed=1), "profile"))``.
    """
    digest = hashlib.blake2b(f"{seed} {window.start} {window.stop}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


Needs = Literal["profile", "model"]


@dataclass(frozen=True)
class Criterion:
    """Score windows of blocks; windows with higher scores are removed first.

    Attributes
    ----------
    name : str
        The name under which `register_criterion` registers the criterion.
    score : callable
        With ``needs="profile"``, ``score(profile, window)`` returns the score of one window. With ``needs="model"``,
        ``score(model, batches, windows, *, stack=None)`` returns the scores of all windows. It may also accept
        ``task``, and ``original``: the model before blocks were removed, or None. A window with score −inf is never
        removed; NaN and +inf are errors.
    needs : {"profile", "model"}
        The input of `score`.
    paper : str
        Publication of the criterion.
    made_of : callable, optional
        Returns a digest of the data stored in the criterion, for caches.
    runs_per_window : bool
        Whether the criterion runs the model once for each window. Searches then use the first 4,096 tokens only.

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
        validate_fields(self)
        if not self.name:
            raise StreamlineError("Criterion: name='' is empty. Expected text. Give a name.")


@dataclass(frozen=True)
class Combination(Criterion):
    """Weighted combination of criteria; see `combine_criteria`.

    Attributes
    ----------
    parts : tuple of (Criterion, float)
        The criteria and their weights.
    by : {"rank", "weight"}
        Whether ranks or scores are added.
    """

    parts: tuple[tuple[Criterion, float], ...] = ()
    by: Literal["rank", "weight"] = "rank"


def _definition(criterion: Criterion) -> Any:
    """Return the source of the score function, or the parts of a combination."""
    if isinstance(criterion, Combination):
        return criterion.parts, criterion.by
    return source_of(criterion.score)


@validate_arguments()
def register_criterion(criterion: Criterion) -> Criterion:
    """Register a criterion, so that searches, config files and the command line accept its name.

    Parameters
    ----------
    criterion : Criterion

    Returns
    -------
    Criterion
        The argument.

    Raises
    ------
    StreamlineError
        If the name is invalid or belongs to another criterion.

    Examples
    --------
    >>> mine = register_criterion(Criterion("norm", lambda profile, window: -profile.norms[window.stop], "profile"))
    >>> CRITERIA["norm"] is mine
    True
    >>> del CRITERIA["norm"]
    """
    return CRITERIA.add(criterion.name, criterion)


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    "register_criterion",
    _definition,
    group="streamline_hooks.criteria",
    register=lambda name, criterion: register_criterion(criterion),
)
"""The registered criteria, by name."""

for _criterion in (
    Criterion("cosine", cosine, "profile", "LLM-Streamline, arXiv 2403.19135"),
    Criterion("angular", angular_similarity, "profile", "Gromov et al., arXiv 2403.17887, over all tokens"),
    Criterion("last_angular", last_angular_similarity, "profile", "Gromov et al., arXiv 2403.17887"),
    Criterion("block_influence", block_influence, "profile", "ShortGPT, arXiv 2403.03853"),
    Criterion("relative_magnitude", relative_magnitude, "profile", "Samragh et al., arXiv 2312.09299"),
    Criterion("last_n", last_n, "profile", "Lu et al., arXiv 2411.15558"),
    Criterion("last_n_but_final", last_n_but_final, "profile", "Gromov et al., arXiv 2403.17887"),
    Criterion("random", random_score, "profile"),
    Criterion("perplexity", perplexity_when_removed, "model", "SLEB, arXiv 2402.09025", runs_per_window=True),
    Criterion("kl", kl_when_removed, "model", runs_per_window=True),
    Criterion("repaired_residual", repaired_residual, "model"),
    Criterion("taylor", taylor, "model", "Shortened LLaMA, arXiv 2402.02834"),
):
    CRITERIA.add(_criterion.name, _criterion)

DEFAULT_CRITERION = "cosine_and_magnitude"
"""The default criterion for single windows. Cosine measures the change of direction of the state, relative magnitude
the size of the change. Either alone misses windows that can be repaired well: with 10 of the 30 blocks of SmolLM2-135M
removed, cosine ranks the window with the lowest KL eleventh."""


def resolve_criterion(value: str | Mapping[str, float] | Criterion | None, default: str = "cosine") -> Criterion:
    """Return the criterion for a name, for a mapping of names to weights (combined by rank), or for `default`.

    Raises StreamlineError if a name is unknown or a weight is not above 0.

    Examples
    --------
    >>> resolve_criterion({"cosine": 1.0, "relative_magnitude": 0.5}).name
    'cosine + 0.5 relative_magnitude by rank'
    """
    if isinstance(value, Criterion):
        return value
    if isinstance(value, Mapping):
        return combine_criteria({part: weight for part, weight in value.items()})
    return CRITERIA[default if value is None else value]


@validate_arguments()
def combine_criteria(parts: Mapping[str | Criterion, float], by: Literal["rank", "weight"] = "rank") -> Criterion:
    """Combine several criteria into one.

    A window with score −inf under any part has score −inf.

    Parameters
    ----------
    parts : mapping of str or Criterion to float
        The criteria, or names of registered criteria, and their weights (above 0).
    by : {"rank", "weight"}
        With "rank", add the ranks, from 0 to 1, among the windows that are scored together; the parts may then have
        different units. With "weight", add the scores.

    Returns
    -------
    Criterion

    Raises
    ------
    StreamlineError
        If `parts` is empty, a name is unknown, or a weight is not above 0.

    Examples
    --------
    >>> combine_criteria({"cosine": 1.0, "relative_magnitude": 0.5}).name
    'cosine + 0.5 relative_magnitude by rank'
    """
    wrong = [weight for weight in parts.values() if not (math.isfinite(weight) and weight > 0)]
    if wrong or not parts:
        received = f"a weight of {wrong[0]}" if wrong else "no criteria"
        raise StreamlineError(
            f"combine_criteria received {received}. Expected at least one criterion, with weights above 0. Change "
            "parts."
        )
    each = [(resolve_criterion(part), float(weight)) for part, weight in parts.items()]
    name = " + ".join(f"{'' if weight == 1.0 else f'{weight:g} '}{part.name}" for part, weight in each) + f" by {by}"
    needs: Needs = "model" if any(part.needs == "model" for part, _ in each) else "profile"
    papers = "; ".join(dict.fromkeys(part.paper for part, _ in each if part.paper))
    per_window = any(part.runs_per_window for part, _ in each)
    return Combination(name, _refuse_single_scores, needs, papers, tuple(each), by, runs_per_window=per_window)


def _refuse_single_scores(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise, because ranks exist only among windows that are scored together."""
    raise StreamlineError(
        "The score function of a combination cannot be called. Expected score_windows, which scores all windows "
        "together. Call score_windows(combination, windows, ...)."
    )


CRITERIA.add(
    DEFAULT_CRITERION, replace(combine_criteria({"cosine": 1.0, "relative_magnitude": 1.0}), name=DEFAULT_CRITERION)
)
