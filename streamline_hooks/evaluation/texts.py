"""Lists of texts, as they are given to be predicted or written on."""

from __future__ import annotations

from collections.abc import Sequence

from streamline_hooks.errors import StreamlineError


def require_texts(texts: Sequence[str], what: str = "document") -> None:
    """Raise where there is one text, whose letters would be taken for several, or something else than texts.

    Parameters
    ----------
    texts : sequence of str
    what : str
        What one is called.

    Raises
    ------
    StreamlineError
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        kinds = sorted({type(text).__name__ for text in texts}) if not isinstance(texts, str) else ["one str"]
        raise StreamlineError(f"The {what}s are {', '.join(kinds)}; expected a list of str, one a {what}.")
