"""What speaks for giving up a window, read off the statistics of one pass. Higher scores go first."""

from __future__ import annotations

from streamline_hooks.statistics import StateSimilarity


def cosine(similarity: StateSimilarity, window: range) -> float:
    """Mean cosine of the states before and after a window (LLM-Streamline, arXiv 2403.19135, eq. 4)."""
    return float(similarity.cosine[window.start, window.stop])


def closeness(similarity: StateSimilarity, window: range) -> float:
    """One minus the mean angular distance across a window (Gromov et al., arXiv 2403.17887, eq. 8)."""
    return 1.0 - float(similarity.angular[window.start, window.stop])
