"""Which blocks to give up."""

from streamline_hooks.selection.criteria import (
    CRITERIA,
    Criterion,
    combined,
    criterion_named,
    register_criterion,
    score_windows,
)
from streamline_hooks.selection.search.by_name import (
    SEARCHES,
    SearchProblem,
    find_selections,
    require_search,
    usual_criterion,
)
from streamline_hooks.selection.search.judge import Attempt
from streamline_hooks.selection.search.perplexities import perplexity_of_attempts
from streamline_hooks.selection.search.selected import ScoredWindow, Selection
from streamline_hooks.selection.search.verified import VerifiedSelection, verified
from streamline_hooks.selection.search.windows import ranked
from streamline_hooks.selection.target import Target, blocks_to_remove, protected_blocks, windows, windows_for

__all__ = [
    "CRITERIA",
    "SEARCHES",
    "Attempt",
    "Criterion",
    "ScoredWindow",
    "SearchProblem",
    "Selection",
    "Target",
    "VerifiedSelection",
    "blocks_to_remove",
    "combined",
    "criterion_named",
    "find_selections",
    "perplexity_of_attempts",
    "protected_blocks",
    "ranked",
    "register_criterion",
    "require_search",
    "score_windows",
    "usual_criterion",
    "verified",
    "windows",
    "windows_for",
]
