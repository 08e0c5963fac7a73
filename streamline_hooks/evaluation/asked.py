"""How rows of questions of one kind are read: which keys they have, where the answer stands, and the usual prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamline_hooks.errors import StreamlineError

_HIDDEN = ("", -1, "-1", None)


class Unfit(Exception):
    """What a row has that its layout does not take; raised while it is read, and given its place by `Layout.ask`."""


@dataclass(frozen=True)
class Asked:
    """A question before it stands in a prompt.

    Attributes
    ----------
    queries : tuple of str
        One a choice.
    choices : tuple of str
    gold : int
        The right choice.
    subject : str, optional
    """

    queries: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    subject: str | None = None

    def reversed(self) -> Asked:
        """The same with its choices in the other order."""
        return Asked(self.queries[::-1], self.choices[::-1], len(self.choices) - 1 - self.gold, self.subject)


# What a row's queries and choices are, and the number of the right one; None where the answer names none of them.
Read = tuple[Any, Any, int | None]


@dataclass(frozen=True)
class Layout:
    """How rows of one kind are read.

    Attributes
    ----------
    name : str
    keys : tuple of str
        What a row has.
    answers : tuple of str
        It also has one of these, where there are any.
    expected : str
        What an answer is, for errors.
    read : callable
        Of a row and its answer.
    prompt : str
        What a query stands in, at ``{}``.
    header : str
        What stands before the examples, with the subject at ``{}``.
    alternate : bool
        Whether the choices of every second row are to change places.
    """

    name: str
    keys: tuple[str, ...]
    answers: tuple[str, ...]
    expected: str
    read: Callable[[Mapping[str, Any], Any], Read]
    prompt: str = "{}"
    header: str = ""
    alternate: bool = False

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the keys."""
        return row.keys() >= set(self.keys) and (not self.answers or any(key in row for key in self.answers))

    def __str__(self) -> str:
        keys = [f'"{key}"' for key in self.keys] + [" or ".join(f'"{key}"' for key in self.answers)]
        return f"{self.name} {{{', '.join(filter(None, keys))}}}"

    def ask(self, row: Mapping[str, Any], where: str) -> Asked:
        """Read a row.

        Raises
        ------
        StreamlineError
            If a key is missing, the answer is hidden or names no choice, or there are no texts to choose from.
        """
        if not self.fits(row):
            raise StreamlineError(f"{where} holds the keys {', '.join(row) or 'none'}; expected {self}.")
        answers = {key: row[key] for key in self.answers if key in row}
        key, answer = next(iter(answers.items()), ("", 0))
        if any(other != answer for other in answers.values()):
            given = " and ".join(f"{name} {value!r}" for name, value in answers.items())
            raise StreamlineError(f"{where} has {given}, which differ. Remove the wrong one.")
        if answer in _HIDDEN:
            raise StreamlineError(
                f"{where} has no answer ({key} {answer!r}), as in a test split whose answers are not public. Read the "
                "validation split."
            )
        try:
            queries, choices, gold = self.read(row, answer)
            _require_texts(queries, choices)
        except Unfit as error:
            raise StreamlineError(f"{where} {error}; expected {self}.") from None
        if gold is None or not 0 <= gold < len(choices):
            raise StreamlineError(f"{where} has {key} {answer!r} for {len(choices)} choices; expected {self.expected}.")
        subject = row["subject"] if self.header else None
        return Asked(tuple(queries), tuple(choices), gold, subject)


def _require_texts(queries: Any, choices: Any) -> None:
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(t, str) and t.strip() for t in choices):
        raise Unfit("has no list of two texts or more to choose from")
    if not all(isinstance(query, str) for query in queries):
        raise Unfit("has a query that is no text")
