"""Read options as they are written behind a colon: ``share=0.5,longest=128``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamline_hooks.errors import StreamlineError


def read_options(text: str, known: Mapping[str, Callable[[str], Any]], what: str, example: str) -> dict[str, Any]:
    """The options behind the colon of a text, where there is one.

    Parameters
    ----------
    text : str
        All of it, such as ``"lora:rank=16,where=after"``.
    known : mapping of str to callable
        What reads each option's value.
    what : str
        What the text stands for, for the error.
    example : str
        One that can be read.

    Raises
    ------
    StreamlineError
        If an option is unknown or its value cannot be read.

    Examples
    --------
    >>> read_options("lora:rank=16", {"rank": int}, "healing", "lora:rank=8")
    {'rank': 16}
    """
    given: dict[str, Any] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = known[name.strip()](value.strip())
        except (KeyError, ValueError):
            raise StreamlineError(
                f"The {what} {text!r} cannot be read at {part!r}. Expected options such as {example!r}; known are "
                f"{', '.join(known)}."
            ) from None
    return given
