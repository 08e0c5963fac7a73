"""Questions with several answers to choose from, read from a file."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError

_LAYOUTS = '{"query", "choices", "gold"} or {"context_options", "continuation", "gold"}'


@dataclass(frozen=True)
class Question:
    """Texts to choose from.

    Attributes
    ----------
    contexts : tuple of str
        One a choice; the same one each time where the choices are continuations of one query.
    continuations : tuple of str
        One a choice; what is scored, after its context.
    gold : int
        The right choice.
    where : str
        Where it comes from, for errors.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    where: str = "a question"


def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a JSONL file, which may be compressed (``.gz``).

    Parameters
    ----------
    path : str or Path
        One question a line: ``{"query", "choices", "gold"}``, whose choices continue the query, or
        ``{"context_options", "continuation", "gold"}``, whose continuation is scored after each context. ``gold`` is
        the right choice's number, from 0. Other keys are left alone.

    Returns
    -------
    list of Question

    Raises
    ------
    StreamlineError
        If the file cannot be read, or holds no question, or a line is none; the text names the line.
    """
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StreamlineError(
            f"The questions in {path} cannot be read: {error}. Give a JSONL file in UTF-8."
        ) from error
    lines = enumerate(text.split("\n"), start=1)
    questions = [_question(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not questions:
        raise StreamlineError(f"{path} holds no question; expected one of {_LAYOUTS} a line.")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise StreamlineError(f"{where} is not JSON: {error}. Expected {_LAYOUTS}.") from error
    if isinstance(given, dict) and {"query", "choices"} <= given.keys():
        query, choices = given["query"], given["choices"]
        contexts, continuations = [query] * len(choices) if isinstance(choices, list) else choices, choices
    elif isinstance(given, dict) and {"context_options", "continuation"} <= given.keys():
        contexts, continuation = given["context_options"], given["continuation"]
        continuations = [continuation] * len(contexts) if isinstance(contexts, list) else contexts
    else:
        what = f"the keys {', '.join(given) or 'none'}" if isinstance(given, dict) else f"a {type(given).__name__}"
        raise StreamlineError(f"{where} holds {what}; expected {_LAYOUTS}.")
    gold = given.get("gold")
    if not (_texts(contexts) and _texts(continuations)) or len(contexts) < 2 or not all(continuations):
        raise StreamlineError(f"{where} has no list of two texts or more to choose from; expected {_LAYOUTS}.")
    if type(gold) is not int or not 0 <= gold < len(contexts):
        raise StreamlineError(
            f"{where} has gold {gold!r}; expected the number of the right one of {len(contexts)} choices, 0 to "
            f"{len(contexts) - 1}."
        )
    return Question(tuple(contexts), tuple(continuations), gold, where)


def _texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(text, str) for text in given)
