"""A profile for a terminal, a line a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from streamline_hooks.statistics.window_matrices import Statistic, window_matrices

if TYPE_CHECKING:
    from streamline_hooks.statistics.profile import Profile


def table(profile: Profile) -> str:
    """Each block's statistics, as a window of its own, and the norms of the states that leave it."""
    what = f"{profile.about.get('model', 'a model')}, {profile.about.get('stack', 'its stack')}"
    count = f"{profile.tokens:,} tokens of {profile.sequences:,} sequences"
    lines = [f"{what}: {profile.places - 1} of {profile.length} blocks, {count}"]
    if not profile.tokens:
        return lines[0]
    lines.append("block   cosine  angular  last token  magnitude   entropy  median norm     greatest")
    columns = [window_matrices(profile.sums, name)[0].diagonal(1) for name in get_args(Statistic)]
    rows = torch.stack([*columns, profile.median_norms[1:], profile.largest_norms[1:]], dim=1).tolist()
    for k, (cosine, angular, last, magnitude, entropy, median, largest) in enumerate(rows):
        born = "  massive activations are born" if k in profile.massive_births else ""
        lines.append(
            f"{k:>5} {cosine:8.4f} {angular:8.4f} {last:11.4f} {magnitude:10.4f} {entropy:+9.4f} {median:12.4g} "
            f"{largest:12.4g}{born}"
        )
    return "\n".join(lines)
