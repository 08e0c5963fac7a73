"""Criteria that score windows. Windows with higher scores are removed first."""

from streamline_hooks.selection.criteria.accuracy import accuracy_drop
from streamline_hooks.selection.criteria.model_criteria import (
    kl_when_removed,
    perplexity_when_removed,
    repaired_residual,
)
from streamline_hooks.selection.criteria.registry import (
    CRITERIA,
    SHORTLIST,
    Combination,
    Criterion,
    combined,
    criterion_of,
    register_criterion,
)
from streamline_hooks.selection.criteria.scoring import score_windows
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
from streamline_hooks.selection.criteria.taylor import block_saliency, taylor

__all__ = [
    "CRITERIA",
    "SHORTLIST",
    "Combination",
    "Criterion",
    "accuracy_drop",
    "at_random",
    "block_influence",
    "block_saliency",
    "closeness",
    "combined",
    "cosine",
    "criterion_of",
    "entropy_increase",
    "kl_when_removed",
    "last_closeness",
    "last_n",
    "last_n_but_final",
    "perplexity_when_removed",
    "register_criterion",
    "relative_magnitude",
    "repaired_residual",
    "score_windows",
    "taylor",
]
