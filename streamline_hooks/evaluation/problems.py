"""Problems with one right answer, which a model has to write: exact match, and pass@k of several tries."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.rows import read_rows
from streamline_hooks.evaluation.writing import Written, write_on

Match = Literal["line", "number"]

_LAYOUT = '{"context" or "question", "answer"}, with or without a "chain_of_thought"'
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_AFTER_WORK = "####"  # before the result in GSM8K's own answers


@dataclass(frozen=True)
class Problem:
    """A prompt and its answer.

    Attributes
    ----------
    prompt, answer : str
    match : {"line", "number"}
        What is compared: the first generated line, or the last generated number, whatever its commas, currency and
        trailing zeros.
    where : str
        Its origin, for error messages.
    """

    prompt: str
    answer: str
    match: Match = "line"
    where: str = "a problem"

    def solved_by(self, text: str) -> bool:
        """Whether what a model wrote is right.

        Examples
        --------
        >>> Problem("", "1,000", "number").solved_by("He has 5 boxes of 200, so $1000.00 in all.")
        True
        >>> Problem("", "abba").solved_by(" abba ")
        True
        """
        if self.match == "number":
            given, found = number_in(self.answer), number_in(text)
            return found is not None and found == given
        lines = text.strip().splitlines()
        return bool(lines) and lines[0].strip() == self.answer.strip()


@dataclass(frozen=True)
class Solved:
    """Generated answers to several problems.

    Attributes
    ----------
    written : tuple of tuple of Written
        By problem and try.
    solved : tuple of tuple of bool
        Whether each is right.
    """

    written: tuple[tuple[Written, ...], ...]
    solved: tuple[tuple[bool, ...], ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """For each problem, whether the first try is right."""
        return tuple(tries[0] for tries in self.solved)

    @property
    def shares(self) -> tuple[float, ...]:
        """For each problem, the share of its tries that are right."""
        return tuple(map(statistics.fmean, self.solved))

    @property
    def accuracy(self) -> float:
        """Share of tries that are right; with one try a problem, exact match."""
        return self.pass_at(1)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, by drawing the problems; NaN for one problem."""
        shares = self.shares
        return statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan

    def pass_at(self, k: int) -> float:
        """The chance that one of k tries is right, without bias: 1 − C(n−c, k)/C(n, k) of n tries with c right ones.

        Chen et al., arXiv 2107.03374.

        Raises
        ------
        StreamlineError
            If there are fewer tries.

        Examples
        --------
        >>> Solved(((),), ((True, False, False, False),)).pass_at(2)
        0.5
        """
        least = min(map(len, self.solved))
        if not 1 <= k <= least:
            raise StreamlineError(f"pass@{k} needs {k} tries a problem; there are {least}. Ask for more samples.")
        failed = [math.comb(len(tries) - sum(tries), k) / math.comb(len(tries), k) for tries in self.solved]
        return 1.0 - statistics.fmean(failed)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} of {len(self.solved)} problems solved"


def solve(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    new_tokens: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    chat: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    what: str = "problems",
) -> Solved:
    """Let a model generate an answer to each problem, once or several times; see `write_on` for the settings.

    Returns
    -------
    Solved
        In the order of the problems.
    """
    if not problems:
        raise StreamlineError("There is no problem to solve; give one at least.")
    written = write_on(
        model, tokenizer, [problem.prompt for problem in problems], new_tokens=new_tokens, samples=samples,
        temperature=temperature, top_p=top_p, stop=stop, chat=chat, batch_size=batch_size, seed=seed, what=what,
    )  # fmt: skip
    solved = [tuple(p.solved_by(text.text) for text in tries) for p, tries in zip(problems, written, strict=True)]
    return Solved(tuple(map(tuple, written)), tuple(solved))


def read_problems(path: str | Path, *, shots: int = 0, match: Match = "number") -> list[Problem]:
    """Read problems such as GSM8K's from a file of rows, see `read_rows`.

    Parameters
    ----------
    path : str or Path
        One problem a line: a ``question`` (or ``context``), an ``answer``, and perhaps a ``chain_of_thought``. An
        answer may hold the way to it before ``####``, as GSM8K's own do.
    shots : int
        So many of the first ones are shown, solved, before each other one, and are not asked.
    match : {"line", "number"}
        See `Problem`.

    Returns
    -------
    list of Problem

    Raises
    ------
    StreamlineError
        If the file cannot be read, a line is no problem, or too few are left to ask; the text names the line.
    """
    found = [_problem(row, f"{path}, row {number}", match) for number, row in enumerate(read_rows(path))]
    if not 0 <= shots < len(found):
        raise StreamlineError(f"shots={shots} leaves nothing to ask of the {len(found)} problems in {path}.")
    shown = "".join(f"{problem.prompt} {work}\n\n" for problem, work in found[:shots])
    return [replace(problem, prompt=shown + problem.prompt) for problem, _ in found[shots:]]


def chance_of_guessing(problems: Sequence[Problem]) -> float:
    """Return the accuracy of one constant answer: the commonest one, as often as it is right of the others.

    Of n problems of which c have that answer, (c - 1)/(n - 1): where each has its own, nothing is guessed.

    Examples
    --------
    >>> chance_of_guessing([Problem(f"How many in {row}?", str(len(row))) for row in ("ab", "cd", "efg", "hi", "j")])
    0.5
    """
    if not problems:
        raise StreamlineError("There is no problem whose answer could be guessed; give one at least.")
    answers = Counter(number_in(p.answer) if p.match == "number" else p.answer.strip() for p in problems)
    return (max(answers.values()) - 1) / max(len(problems) - 1, 1)


def number_in(text: str) -> float | None:
    """Return the last number in a text; None without one.

    Examples
    --------
    >>> number_in("First 12, then $1,250.50.")
    1250.5
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace("\u2212", "-").replace(",", "").replace("$", "")) if found else None


def _problem(given: dict[str, Any], where: str, match: Match) -> tuple[Problem, str]:
    """Return a problem and its worked solution, as an example shows it."""
    question, answer = given.get("question", given.get("context")), given.get("answer")
    work = given.get("chain_of_thought", "")
    if not (isinstance(question, str) and isinstance(answer, (str, int, float)) and isinstance(work, str)):
        raise StreamlineError(f"{where} holds the keys {', '.join(given) or 'none'}; expected {_LAYOUT}.")
    before, _, result = str(answer).rpartition(_AFTER_WORK)
    work, result = (work or before).strip(), result.strip()
    if match == "number" and number_in(result) is None:
        raise StreamlineError(f"{where} has the answer {result!r}, in which there is no number. Give match='line'.")
    shown = f"{work} The answer is {result}." if work else f"{result}"
    return Problem(f"Question: {question}\nAnswer:", result, match, where), shown
