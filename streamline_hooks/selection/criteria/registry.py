"""The criteria by name: those that are here, those that a user adds, and combinations of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NoReturn

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.criteria.baselines import at_random, last_n, last_n_but_final
from streamline_hooks.selection.criteria.cca import cca_bound
from streamline_hooks.selection.criteria.criterion import Combination, Criterion, Needs
from streamline_hooks.selection.criteria.removal import kl_when_removed, perplexity_when_removed
from streamline_hooks.selection.criteria.residual import repaired_residual
from streamline_hooks.selection.criteria.states import (
    block_influence,
    closeness,
    cosine,
    entropy_increase,
    last_closeness,
    relative_magnitude,
)
from streamline_hooks.selection.criteria.taylor import taylor

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("cosine", cosine, "profile", "LLM-Streamline, arXiv 2403.19135"),
        Criterion("angular", closeness, "profile", "Gromov et al., arXiv 2403.17887, over all tokens"),
        Criterion("last_angular", last_closeness, "profile", "Gromov et al., arXiv 2403.17887"),
        Criterion("block_influence", block_influence, "profile", "ShortGPT, arXiv 2403.03853"),
        Criterion("relative_magnitude", relative_magnitude, "profile", "Samragh et al., arXiv 2312.09299"),
        Criterion("entropy", entropy_increase, "profile", "EntroDrop, arXiv 2504.03794"),
        Criterion("last_n", last_n, "profile", "Lu et al., arXiv 2411.15558"),
        Criterion("last_n_but_final", last_n_but_final, "profile", "Gromov et al., arXiv 2403.17887"),
        Criterion("random", at_random, "profile"),
        Criterion("perplexity", perplexity_when_removed, "model", "SLEB, arXiv 2402.09025"),
        Criterion("kl", kl_when_removed, "model"),
        Criterion("repaired_residual", repaired_residual, "model"),
        Criterion("taylor", taylor, "model", "Shortened LLaMA, arXiv 2402.02834"),
        Criterion("cca", cca_bound, "model", "NBL, arXiv 2505.21077"),
    )
}

RUN_FOR_EACH = ("perplexity", "kl")
"""Those that run the model once for each window."""

SHORTLIST = "cosine_and_magnitude"
"""By what a shortlist of single windows is made. Cosine looks at the state's direction alone, relative magnitude at how
far it moves; either misses windows that repair well (for 10 of SmolLM2-135M's 30 blocks cosine puts the one with the
least KL eleventh), and their ranks together do not."""


def criterion_named(name: str) -> Criterion:
    """The criterion of a name.

    Raises
    ------
    StreamlineError
        If there is none; the text lists the known ones.
    """
    if name not in CRITERIA:
        raise StreamlineError(f"The criterion {name!r} is unknown. Known: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


@checked()
def register_criterion(name: str, function: Callable[..., Any], *, needs: Needs, paper: str = "") -> Criterion:
    """Add a criterion of one's own.

    Parameters
    ----------
    name : str
        Not taken yet.
    function : callable
        ``function(profile, window)`` or ``function(model, batches, windows, *, stack=None)``, see `Criterion`.
    needs : {"profile", "model"}
        Which of the two it is.
    paper : str

    Returns
    -------
    Criterion

    Raises
    ------
    StreamlineError
        If the name is taken, or `needs` is neither.

    Examples
    --------
    >>> mine = register_criterion("norm", lambda profile, window: -profile.norms[window.stop], needs="profile")
    >>> criterion_named("norm") is mine
    True
    >>> del CRITERIA["norm"]
    """
    if name in CRITERIA:
        raise StreamlineError(f"There is a criterion {name!r} already; choose another name.")
    if needs not in ("profile", "model"):
        raise StreamlineError(f"needs={needs!r} is unknown; expected 'profile' or 'model'.")
    CRITERIA[name] = Criterion(name, function, needs, paper)
    return CRITERIA[name]


@checked()
def combined(parts: Mapping[str | Criterion, float], by: Literal["rank", "weight"] = "rank") -> Criterion:
    """Several criteria in one.

    Parameters
    ----------
    parts : mapping of str or Criterion to float
        Their weights, above 0.
    by : {"rank", "weight"}
        Add up the ranks among the windows that are scored together, as the share of the others that a window comes
        before, which needs no common unit; or the scores as they are, each in its own unit times its weight. What
        must not go by one of the parts (−inf) must not go by their combination.

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
    if by not in ("rank", "weight"):
        raise StreamlineError(f"by={by!r} is unknown; expected 'rank' or 'weight'.")
    wrong = [weight for weight in parts.values() if not (math.isfinite(weight) and weight > 0)]
    if wrong or not parts:
        what = f"a weight of {wrong[0]}" if wrong else "no criteria"
        raise StreamlineError(f"A combination was given {what}; expected criteria with weights above 0.")
    each = [(criterion_named(c) if isinstance(c, str) else c, float(weight)) for c, weight in parts.items()]
    name = " + ".join(f"{'' if weight == 1.0 else f'{weight:g} '}{part.name}" for part, weight in each) + f" by {by}"
    needs: Needs = "model" if any(part.needs == "model" for part, _ in each) else "profile"
    papers = "; ".join(dict.fromkeys(part.paper for part, _ in each if part.paper))
    return Combination(name, _score_together, needs, papers, tuple(each), by)


def _score_together(*given: Any, **named: Any) -> NoReturn:
    """The parts' ranks or scores, summed over all windows that are scored together; never of one alone."""
    raise StreamlineError("A combination is scored with score_windows, which scores all windows together.")


CRITERIA[SHORTLIST] = replace(combined({"cosine": 1.0, "relative_magnitude": 1.0}), name=SHORTLIST)
