"""Select the blocks to remove."""

from streamline_hooks.selection.criteria import (
    CRITERIA,
    Criterion,
    combined,
    criterion_of,
    register_criterion,
    score_windows,
)
from streamline_hooks.selection.ranking import Ranking, rank
from streamline_hooks.selection.search.configs import (
    SEARCHES,
    AttentionSearch,
    DisjointSearch,
    GreedySearch,
    MixedSearch,
    MLPSearch,
    OneShotSearch,
    SearchConfig,
    WindowSearch,
    register_search,
)
from streamline_hooks.selection.search.judge import Attempt, perplexity_of_attempts
from streamline_hooks.selection.search.problem import SearchProblem
from streamline_hooks.selection.search.selected import Selection
from streamline_hooks.selection.search.verified import VerifiedSelection, verified
from streamline_hooks.selection.target import Target, blocks_to_remove, protected_blocks, windows, windows_for

__all__ = [
    "CRITERIA",
    "SEARCHES",
    "Attempt",
    "AttentionSearch",
    "Criterion",
    "DisjointSearch",
    "GreedySearch",
    "MLPSearch",
    "MixedSearch",
    "OneShotSearch",
    "Ranking",
    "SearchConfig",
    "SearchProblem",
    "Selection",
    "Target",
    "VerifiedSelection",
    "WindowSearch",
    "blocks_to_remove",
    "combined",
    "criterion_of",
    "perplexity_of_attempts",
    "protected_blocks",
    "rank",
    "register_criterion",
    "register_search",
    "score_windows",
    "verified",
    "windows",
    "windows_for",
]
