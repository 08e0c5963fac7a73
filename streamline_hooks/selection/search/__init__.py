"""How the blocks to give up are searched for, by any criterion."""

from streamline_hooks.repair import Repair
from streamline_hooks.selection.search.disjoint import disjoint_windows
from streamline_hooks.selection.search.greedy import greedy
from streamline_hooks.selection.search.one_shot import one_shot
from streamline_hooks.selection.search.selected import Scorer, Selection
from streamline_hooks.selection.search.silenced import silenced_branches
from streamline_hooks.selection.search.verified import VerifiedSelection, verified
from streamline_hooks.selection.search.windows import best_windows

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
