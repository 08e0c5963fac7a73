"""Criteria as objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from streamline_hooks.arguments import check_fields
from streamline_hooks.errors import StreamlineError

Needs = Literal["profile", "model"]


@dataclass(frozen=True)
class Criterion:
    """Score windows: those with higher scores are removed first. `register_criterion` makes one known by its name.

    Attributes
    ----------
    name : str
    score : callable
        If `needs` is ``"profile"``, ``score(profile, window)`` returns the score of one window. If it is ``"model"``,
        ``score(model, batches, windows, *, stack=None)`` returns those of all windows; a function that takes ``task``
        also gets the model's task, and one that takes ``original`` the model before blocks were removed, or None if
        none were. A window with −inf is never removed; NaN and +inf are errors.
    needs : {"profile", "model"}
    paper : str
        Where it was published.
    made_of : callable, optional
        Returns a digest of the data that the criterion holds, to tell it from others of its name (`accuracy_drop`).
    runs_per_window : bool
        Whether it runs the model once for each window. Searches then measure it on 4,096 tokens. By default False.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> Criterion("norm", lambda profile, window: -profile.norms[window.stop], "profile").needs
    'profile'
    """

    name: str
    score: Callable[..., Any]
    needs: Needs
    paper: str = ""
    made_of: Callable[[], str] | None = field(default=None, kw_only=True)
    runs_per_window: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name:
            raise StreamlineError("Criterion: name='' is empty. Expected text. Give a name.")


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
