"""Search for the blocks to remove, by any criterion."""

from streamline_hooks.repair import Repair
from streamline_hooks.selection.search.disjoint import disjoint_windows, one_shot, silenced_branches
from streamline_hooks.selection.search.greedy import greedy
from streamline_hooks.selection.search.selected import Scorer, Selection, best_windows
from streamline_hooks.selection.search.verified import VerifiedSelection, verified

__all__ = [
    "Repair",
    "Scorer",
    "Selection",
    "VerifiedSelection",
    "best_windows",
    "disjoint_windows",
    "greedy",
    "one_shot",
    "silenced_branches",
    "verified",
]
