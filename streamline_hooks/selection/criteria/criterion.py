"""What a criterion is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Needs = Literal["profile", "model"]


@dataclass(frozen=True)
class Criterion:
    """What speaks for giving up a window.

    Attributes
    ----------
    name : str
    score : callable
        Of a criterion that needs a profile alone, ``score(profile, window)`` gives a window's score; of one that runs
        the model, ``score(model, batches, windows, *, stack=None)`` gives those of all windows; if it takes ``task``
        too, it is told what the model is for, and if it takes ``original``, what the model was before it lost blocks,
        or None where it has lost none. The higher, the sooner a window goes; −inf is last, and NaN is an error.
    needs : {"profile", "model"}
    paper : str
        Where it comes from.
    made_of : callable, optional
        Returns a digest of what it was made of, where there may be another of its name (`accuracy_drop`).
    """

    name: str
    score: Callable[..., Any]
    needs: Needs
    paper: str = ""
    made_of: Callable[[], str] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Combination(Criterion):
    """Several criteria in one; made by `combined`.

    Attributes
    ----------
    parts : tuple of (Criterion, float)
        With their weights.
    by : {"rank", "weight"}
    """

    parts: tuple[tuple[Criterion, float], ...] = ()
    by: Literal["rank", "weight"] = "rank"
