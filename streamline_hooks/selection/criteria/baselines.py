"""Criteria that look at no text, which any other has to beat. A higher score goes sooner."""

from __future__ import annotations

import hashlib

from streamline_hooks.statistics import Profile


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
