"""Criteria that are read off a `Profile`: what each window does to the states. A higher score goes sooner."""

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

    Blocks that turn the state and turn it back count here and not in `cosine`.
    """
    return -sum(1.0 - profile.value("cosine", range(k, k + 1)) for k in window)


def relative_magnitude(profile: Profile, window: range) -> float:
    """Minus the blocks' relative magnitudes ‖leaving − entering‖/‖entering‖, summed over the window.

    ShortGPT (arXiv 2403.03853) compares the measure of Samragh et al. (arXiv 2312.09299), which divides by the state
    that leaves. It is summed and not taken across the window: a block's share is then its own, as for the block
    influence, and with changes that are small against the state the sum bounds what they make together.
    """
    return -profile.value("relative_magnitude", window)


def entropy_increase(profile: Profile, window: range) -> float:
    """Minus the increase of the states' entropy from the window's entrance to its exit (EntroDrop, arXiv 2504.03794).

    The increases of the blocks of a window add up to that of the window. In a model's first blocks entropy falls, as
    the paper shows; those have a negative increase, and so go soonest. Protect them (``keep``).
    """
    return -profile.value("entropy", window)


def last_n(profile: Profile, window: range) -> float:
    """The window's end: of n blocks, the last n of the stack go first, the very last one included.

    Lu et al. (Reassessing Layer Pruning in LLMs, arXiv 2411.15558) find this reverse order hard to beat after
    finetuning.
    """
    return float(window.stop)


def last_n_but_final(profile: Profile, window: range) -> float:
    """The window's end, with the final block kept: of n blocks, those from L − 1 − n to L − 2 go first.

    The simple strategy of Gromov et al. (arXiv 2403.17887, section 4.4). Windows with the final block in them score 0
    and come after all others.
    """
    return float(window.stop % profile.length)


def at_random(profile: Profile, window: range, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the window and the seed alone.

    For another seed, ``register_criterion(Criterion("random-1", partial(at_random, seed=1), "profile"))``.
    """
    digest = hashlib.blake2b(f"{seed} {window.start} {window.stop}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53
