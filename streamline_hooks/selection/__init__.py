"""Choose which blocks to remove: criteria, searches, targets and the verified shortlist."""

from streamline_hooks.selection.accuracy import accuracy_drop
from streamline_hooks.selection.criteria import (
    CRITERIA,
    DEFAULT_CRITERION,
    Combination,
    Criterion,
    angular_similarity,
    block_influence,
    combine_criteria,
    cosine,
    last_n,
    last_n_but_final,
    random_score,
    register_criterion,
    relative_magnitude,
    resolve_criterion,
)
from streamline_hooks.selection.model_criteria import kl_when_removed, perplexity_when_removed, repaired_residual
from streamline_hooks.selection.ranking import Ranking, rank_windows, require_target_free, search
from streamline_hooks.selection.scoring import score_windows
from streamline_hooks.selection.search_config import (
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
from streamline_hooks.selection.selection import RANKING_TOKENS, SearchProblem, Selection, consecutive_runs
from streamline_hooks.selection.shortlist import VerifiedSelection, sort_verified, verify_shortlist
from streamline_hooks.selection.target import Target, blocks_to_remove, protected_blocks, windows_of_size
from streamline_hooks.selection.target_windows import (
    TARGET_TOLERANCE,
    TargetOutcome,
    TargetWindows,
    target_windows,
)
from streamline_hooks.selection.taylor import block_saliency, taylor
from streamline_hooks.selection.trial import Trial, branch_writers, selection_applied, trial_perplexities

__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERION",
    "RANKING_TOKENS",
    "SEARCHES",
    "TARGET_TOLERANCE",
    "AttentionSearch",
    "Combination",
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
    "TargetOutcome",
    "TargetWindows",
    "Trial",
    "VerifiedSelection",
    "WindowSearch",
    "accuracy_drop",
    "angular_similarity",
    "block_influence",
    "block_saliency",
    "blocks_to_remove",
    "branch_writers",
    "combine_criteria",
    "consecutive_runs",
    "cosine",
    "kl_when_removed",
    "last_n",
    "last_n_but_final",
    "perplexity_when_removed",
    "protected_blocks",
    "random_score",
    "rank_windows",
    "register_criterion",
    "register_search",
    "relative_magnitude",
    "repaired_residual",
    "require_target_free",
    "resolve_criterion",
    "score_windows",
    "search",
    "selection_applied",
    "sort_verified",
    "target_windows",
    "taylor",
    "trial_perplexities",
    "verify_shortlist",
    "windows_of_size",
]
