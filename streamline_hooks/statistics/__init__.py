"""Sum statistics of hidden states in one pass over the data, mergeable over batches and shards.

`profile` compares the states at all boundaries, so every window of every length can be ranked. `measure_moments` sums
the second moments that the closed-form repair of a window needs.
"""

from streamline_hooks.statistics.bootstrap import poisson_weights, sequence_contents
from streamline_hooks.statistics.branches import BranchScores, measure_branches
from streamline_hooks.statistics.measure import (
    check_profile,
    measure_moments,
    model_identity,
    moments_by_window,
    profile,
)
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.norms import HISTOGRAM_BINS, median_of_histogram, norm_histogram
from streamline_hooks.statistics.profile import MASSIVE_NORM_RATIO, Profile, Statistic

__all__ = [
    "HISTOGRAM_BINS",
    "MASSIVE_NORM_RATIO",
    "BranchScores",
    "Profile",
    "Statistic",
    "WindowMoments",
    "check_profile",
    "measure_branches",
    "measure_moments",
    "median_of_histogram",
    "model_identity",
    "moments_by_window",
    "norm_histogram",
    "poisson_weights",
    "profile",
    "sequence_contents",
]
