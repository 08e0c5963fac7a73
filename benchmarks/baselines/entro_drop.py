"""EntroDrop (arXiv 2504.03794): remove the blocks that increase the entropy of the hidden states least."""

from __future__ import annotations

from streamline_hooks.selection import Criterion, register_criterion
from streamline_hooks.statistics import Profile


def entropy_increase(profile: Profile, window: range) -> float:
    """Return minus the increase of the entropy of the hidden states over the window.

    Entropy decreases in the first blocks of a model, so these are removed first unless they are protected
    (``protect``).
    """
    return -profile.value("entropy", window)


CRITERION = register_criterion(Criterion("entropy", entropy_increase, "profile", "EntroDrop, arXiv 2504.03794"))
