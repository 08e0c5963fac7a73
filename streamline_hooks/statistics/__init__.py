"""What is summed while a pass runs. The sums know nothing of models; `measure` runs the passes."""

from streamline_hooks.statistics.bootstrap import poisson_weights
from streamline_hooks.statistics.branches import BranchScores, measure_branches
from streamline_hooks.statistics.identity import check_profile
from streamline_hooks.statistics.measure import measure_moments, profile
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.profile import Profile, Statistic

__all__ = [
    "BranchScores",
    "Profile",
    "Statistic",
    "WindowMoments",
    "check_profile",
    "measure_branches",
    "measure_moments",
    "poisson_weights",
    "profile",
]
