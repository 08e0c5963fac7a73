"""Tell texts that say again what earlier ones said, in time that grows with the text alone."""

from __future__ import annotations

from collections.abc import Sequence


class NearCopies:
    """Remembers the runs of tokens of the texts that are kept.

    A text is a near-copy if more than half of its runs of six tokens were in texts that were kept before: one with a
    word changed here and there, or one put together from others. Two texts about one thing share far fewer.

    Examples
    --------
    >>> copies = NearCopies()
    >>> copies.keep(range(100))
    True
    >>> copies.keep([*range(40), 7, *range(41, 100)])
    False
    >>> copies.keep([*range(20), *range(200, 280)])
    True
    """

    RUN = 6
    MOST = 0.5

    def __init__(self) -> None:
        self._known: set[int] = set()

    def keep(self, tokens: Sequence[int]) -> bool:
        """Remember a text, unless it is a near-copy; and say which."""
        starts = range(max(1, len(tokens) - self.RUN + 1))
        runs = {hash(tuple(tokens[start : start + self.RUN])) for start in starts}
        if len(runs & self._known) > self.MOST * len(runs):
            return False
        self._known |= runs
        return True
