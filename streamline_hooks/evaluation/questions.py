"""Questions with several answers to choose from, read from files, data sets or rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.asked import Asked, Layout
from streamline_hooks.evaluation.question_layouts import find_layout, layout_named
from streamline_hooks.evaluation.rows import read_rows

_BETWEEN_EXAMPLES = "\n\n"


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


def read_questions(
    source: str | Path,
    layout: str | None = None,
    *,
    prompt: str | None = None,
    examples: str | Path | Iterable[Mapping[str, Any]] | None = None,
    shots: int = 0,
) -> list[Question]:
    r"""Read questions from a file or a data set.

    Parameters
    ----------
    source : str or Path
        A JSONL file, plain, ``.gz`` or many in a ``.zip``; or a data set, see `read_rows`.
    layout, prompt, examples, shots
        See `questions_from`.

    Returns
    -------
    list of Question

    Raises
    ------
    StreamlineError
        If the source cannot be read, or holds no question, or a line is none; the text names the line.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> row = {"question": "What melts ice?", "choices": {"text": ["heat", "cold"], "label": ["A", "B"]}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "arc.jsonl")
    ...     _ = path.write_text(json.dumps({**row, "answerKey": "A"}))
    ...     read_questions(path)[0].contexts[0]
    'Question: What melts ice?\nAnswer:'
    """
    rows = read_rows(source)
    if not rows:
        raise StreamlineError(f"{source} holds no question; expected at least one row, see `questions_from`.")
    return questions_from(rows, layout, prompt=prompt, examples=examples, shots=shots)


def questions_from(
    rows: Iterable[Mapping[str, Any]],
    layout: str | None = None,
    *,
    prompt: str | None = None,
    examples: str | Path | Iterable[Mapping[str, Any]] | None = None,
    shots: int = 0,
) -> list[Question]:
    r"""Make questions of rows, such as those of one split of a data set.

    Parameters
    ----------
    rows : iterable of mapping
        In one of the layouts of `streamline_hooks.evaluation.question_layouts`, which has a table of their keys. Of
        minimal pairs the better sentence stands first in every second one, counted in this order: with the better one
        always first, a model to which both are equal would be right each time. Draw a subset before, not after.
    layout : str, optional
        By default each row's keys tell; a row that fits several layouts is refused.
    prompt : str, optional
        What a query stands in, at ``{}``, such as ``"Question: {}\nAnswer:"``; by default what is usual for the layout.
    examples : str, Path or iterable of mapping, optional
        Other rows, with their answers, to put before each question; a source as for `read_questions`, or rows. Where a
        layout has a subject (MMLU), those of the question's own.
    shots : int
        How many examples, the first ones.

    Returns
    -------
    list of Question
        ``where`` is the file and line that a row was read from, else its number, from 0.

    Raises
    ------
    StreamlineError
        If a row is no question of the layout or its answer is hidden, if there are too few examples, or if a question
        is one of its own examples.

    Examples
    --------
    >>> row = {"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use a hose", "label": 0}
    >>> questions_from([row])
    [Question(contexts=('Question: Dry a cup\nAnswer:', 'Question: Dry a cup\nAnswer:'),
     continuations=('Use a towel', 'Use a hose'), gold=0, where='row 0')]
    """
    shown, pairs, found = _Shown(examples, shots, layout, prompt), count(), []
    for kind, asked, where in _asked(rows, layout, "row"):
        before = shown.before(kind, asked, where)
        if kind.alternate and next(pairs) % 2:
            asked = asked.reversed()
        contexts = tuple(before + _in_prompt(query, kind, prompt) for query in asked.queries)
        found.append(Question(contexts, asked.choices, asked.gold, where))
    return found


def joined(context: str, continuation: str) -> str:
    r"""A context and what follows it, with a space between them unless one of the two brings white space.

    Examples
    --------
    >>> joined("The cup", "was full."), joined("Sum:\n", "4")
    ('The cup was full.', 'Sum:\n4')
    """
    space = " " if context and not context[-1].isspace() and not continuation[0].isspace() else ""
    return context + space + continuation


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of knowing nothing.

    Where every question offers the same choices, such as yes and no, that of the commonest right answer, which a model
    can hit by saying one word; otherwise that of drawing one of the choices.

    Parameters
    ----------
    questions : sequence of Question

    Returns
    -------
    float

    Raises
    ------
    StreamlineError
        If there is no question.

    Examples
    --------
    >>> chance([Question(("Is it?",) * 2, ("no", "yes"), gold) for gold in (0, 1, 1, 1)])
    0.75
    >>> chance(
    ...     [Question(("A cat",) * 4, ("sat", "ran", "fell", "hid"), 2), Question(("A dog",) * 2, ("bit", "ate"), 0)]
    ... )
    0.375
    """
    if not questions:
        raise StreamlineError("There is no question, and so no chance to answer one; give one at least.")
    first = questions[0].continuations
    if len(set(first)) > 1 and all(question.continuations == first for question in questions):
        gold = [question.gold for question in questions]
        return max(map(gold.count, gold)) / len(gold)
    return sum(1 / len(question.contexts) for question in questions) / len(questions)


def _asked(rows: Iterable[Mapping[str, Any]], layout: str | None, what: str) -> Iterable[tuple[Layout, Asked, str]]:
    named = None if layout is None else layout_named(layout)
    for number, row in enumerate(rows):
        where = getattr(row, "where", f"{what} {number}")
        if not isinstance(row, Mapping):
            raise StreamlineError(
                f"{where} is a {type(row).__name__}; expected a mapping of column to value. Of a data set of several "
                "splits, give one."
            )
        kind = named or find_layout(row, where)
        yield kind, kind.ask(row, where), where


def _in_prompt(query: str, kind: Layout, prompt: str | None) -> str:
    if prompt is None:
        prompt = kind.prompt
    elif prompt.count("{}") != 1:
        raise StreamlineError(f"The prompt {prompt!r} must have one place {{}} for the query.")
    elif kind.alternate:
        raise StreamlineError(f"Rows of the layout {kind.name!r} have no query to stand in the prompt {prompt!r}.")
    return prompt.replace("{}", query)


class _Shown:
    """What stands before a question: the layout's header, and examples with their answers."""

    def __init__(
        self,
        examples: str | Path | Iterable[Mapping[str, Any]] | None,
        shots: int,
        layout: str | None,
        prompt: str | None,
    ) -> None:
        if shots < 0 or (examples is None) != (shots == 0):
            given = "no examples" if examples is None else "examples"
            raise StreamlineError(f"There are {given} and shots={shots}; give both examples and how many to show.")
        self.shots = shots
        self.texts: dict[str | None, list[tuple[Asked, str]]] = {}
        rows = read_rows(examples) if isinstance(examples, (str, Path)) else examples or ()
        for kind, asked, _ in _asked(rows, layout, "example"):
            context = _in_prompt(asked.queries[asked.gold], kind, prompt)
            self.texts.setdefault(asked.subject, []).append((asked, joined(context, asked.choices[asked.gold])))

    def before(self, kind: Layout, asked: Asked, where: str) -> str:
        about = asked.subject.replace("_", " ") if asked.subject else ""
        shown = self.texts.get(asked.subject, [])[: self.shots]
        if len(shown) < self.shots:
            of = f" of {about}" if about else ""
            raise StreamlineError(
                f"{where} is to stand after {self.shots} examples{of}, of which there are {len(shown)}. Give more, or "
                "show fewer."
            )
        if any(example == asked for example, _ in shown):
            raise StreamlineError(
                f"{where} is one of its own examples, which give the answer away. Take the examples from another split."
            )
        return kind.header.replace("{}", about) + "".join(text + _BETWEEN_EXAMPLES for _, text in shown)
