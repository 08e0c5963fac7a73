"""A profile for a terminal, a line a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from streamline_hooks.core.tables import table
from streamline_hooks.statistics.window_matrices import Statistic, window_matrices

if TYPE_CHECKING:
    from streamline_hooks.statistics.profile import Profile


def profile_table(profile: Profile) -> str:
    """Each block's statistics, as a window of its own, and the norms of the states that leave it."""
    what = f"{profile.about.get('model', 'a model')}, {profile.about.get('stack', 'its stack')}"
    count = f"{profile.tokens:,} tokens of {profile.sequences:,} sequences"
    heading = f"{what}: {profile.places - 1} of {profile.length} blocks, {count}"
    if not profile.tokens:
        return heading
    matrices = [window_matrices(profile.sums, name)[0].diagonal(1) for name in get_args(Statistic)]
    statistics = torch.stack([*matrices, profile.median_norms[1:], profile.largest_norms[1:]], dim=1).tolist()
    rows = []
    for k, (cosine, angular, last, magnitude, entropy, median, largest) in enumerate(statistics):
        numbers = [f"{value:.4f}" for value in (cosine, angular, last, magnitude)]
        born = "massive activations are born" if k in profile.massive_births else ""
        rows.append([k, *numbers, f"{entropy:+.4f}", f"{median:.4g}", f"{largest:.4g}", born])
    columns = ["block", "cosine", "angular", "last token", "magnitude", "entropy", "median norm", "greatest", ""]
    return f"{heading}\n{table(rows, columns)}"
