"""Criteria of a `Profile`, and baselines that look at no text. Windows with higher scores are removed first."""

from __future__ import annotations

import hashlib

from streamline_hooks.statistics import Profile


def cosine(profile: Profile, window: range) -> float:
    """Mean cosine of the states before and after a window (LLM-Streamline, arXiv 2403.19135, eq. 4)."""
    return profile.value("cosine", window)


def closeness(profile: Profile, window: range) -> float:
    """One minus the mean angular distance across a window, over all tokens (Gromov et al., arXiv 2403.17887, eq. 8)."""
    return 1.0 - profile.value("angular", window)


def last_closeness(profile: Profile, window: range) -> float:
    """One minus the mean angular distance across a window of each sequence's last real token.

    This is what Gromov et al. (arXiv 2403.17887, eq. 8) measure.
    """
    return 1.0 - profile.value("last_angular", window)


def block_influence(profile: Profile, window: range) -> float:
    """Minus the sum of the blocks' influences, each one minus the mean cosine across it alone (ShortGPT, 2403.03853).

    Unlike `cosine`, it counts blocks that turn the state back.
    """
    return -sum(1.0 - profile.value("cosine", range(k, k + 1)) for k in window)


def relative_magnitude(profile: Profile, window: range) -> float:
    """Minus the blocks' relative magnitudes ‖leaving − entering‖/‖entering‖, summed over the window.

    ShortGPT (arXiv 2403.03853) compares with it; Samragh et al. (arXiv 2312.09299) divide by the leaving state.
    """
    return -profile.value("relative_magnitude", window)


def entropy_increase(profile: Profile, window: range) -> float:
    """Minus the increase of the states' entropy from the window's entrance to its exit (EntroDrop, arXiv 2504.03794).

    Entropy falls in a model's first blocks, so they are removed first unless they are protected (``keep``).
    """
    return -profile.value("entropy", window)


def last_n(profile: Profile, window: range) -> float:
    """The window's end: the last n blocks go first, the final block included.

    Lu et al. (Reassessing Layer Pruning in LLMs, arXiv 2411.15558) find this reverse order hard to beat after
    finetuning.
    """
    return float(window.stop)


def last_n_but_final(profile: Profile, window: range) -> float:
    """The window's end, with the final block kept (Gromov et al., arXiv 2403.17887, section 4.4).

    Windows with the final block score 0 and come last.
    """
    return float(window.stop % profile.length)


def at_random(profile: Profile, window: range, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the window and the seed only.

    For another seed, ``register_criterion(Criterion("random-1", partial(at_random, seed=1), "profile"))``.
    """
    digest = hashlib.blake2b(f"{seed} {window.start} {window.stop}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53
