"""Problems that a model solves by generation, from files or synthetic: exact match and pass@k."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from streamline_hooks.core import StreamlineError, validate_arguments
from streamline_hooks.evaluation.samples import GeneratedText, TextGenerationConfig, generate_texts
from streamline_hooks.evaluation.task_files import read_rows

Match = Literal["line", "number"]

_LAYOUT = '{"context" or "question", "answer"}, with or without a "chain_of_thought"'
_NUMBER = re.compile(r"(?<![\w.])[-\u2212\u2013]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_EXPONENT = re.compile(r"\d[eE][-+]?\d")  # of which `_NUMBER` reads the first digits
_ANSWER_MARK = "####"  # precedes the result in the answers of GSM8K

_WORDS = (
    *("apple", "river", "stone", "cloud", "table", "green", "seven", "light", "paper", "horse", "music", "window"),
    *("garden", "silver", "winter", "bridge", "candle", "forest", "island", "letter", "market", "needle", "orange"),
    *("pencil", "rocket", "saddle", "tunnel", "valley", "yellow", "basket", "copper", "dinner"),
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_MAX_REPEATED = 200  # consecutive draws of known problems before giving an error
ANSWER_STOP = ("\n",)
"""Stop strings of an answer that is one line."""

ProblemMaker = Callable[[Random], tuple[str, str]]


@dataclass(frozen=True)
class Problem:
    """Prompt with its reference answer.

    Attributes
    ----------
    prompt, answer : str
        The prompt and the reference answer.
    match : {"line", "number"}
        With "line", the first generated line is compared. With "number", the last generated number is compared,
        ignoring commas, currency signs and trailing zeros.
    where : str
        Origin, for error messages.

    Examples
    --------
    >>> Problem("2 + 3 =", "5").solved_by(" 5")
    True
    """

    prompt: str
    answer: str
    match: Match = "line"
    where: str = "a problem"

    def solved_by(self, text: str) -> bool:
        """Whether a generated text contains the answer.

        Examples
        --------
        >>> Problem("", "1,000", "number").solved_by("He has 5 boxes of 200, so $1000.00 in all.")
        True
        >>> Problem("", "abba").solved_by(" abba ")
        True
        """
        if self.match == "number":
            expected, generated = last_number(self.answer), last_number(text)
            return generated is not None and generated == expected
        lines = text.strip().splitlines()
        return bool(lines) and lines[0].strip() == self.answer.strip()


@dataclass(frozen=True)
class ProblemResults:
    """Generated answers to problems, and whether they are correct; returned by `solve_problems`.

    Attributes
    ----------
    texts : tuple of tuple of GeneratedText
        Generated texts by problem and attempt.
    solved : tuple of tuple of bool
        Whether each text is correct.

    Examples
    --------
    >>> ProblemResults(((), ()), ((True,), (False,))).accuracy
    0.5
    """

    texts: tuple[tuple[GeneratedText, ...], ...]
    solved: tuple[tuple[bool, ...], ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """By problem, whether the first attempt is correct."""
        return tuple(tries[0] for tries in self.solved)

    @property
    def fractions_correct(self) -> tuple[float, ...]:
        """By problem, the fraction of correct attempts."""
        return tuple(map(statistics.fmean, self.solved))

    @property
    def accuracy(self) -> float:
        """Mean fraction of correct attempts; with one attempt per problem, exact match."""
        return self.pass_at(1)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy over the problems; NaN for one problem."""
        fractions = self.fractions_correct
        return statistics.stdev(fractions) / math.sqrt(len(fractions)) if len(fractions) > 1 else math.nan

    def pass_at(self, k: int) -> float:
        """Return pass@k: an unbiased estimate of the probability that at least one of k attempts is right.

        With c correct attempts of n it is 1 − C(n−c, k)/C(n, k) (Chen et al., arXiv 2107.03374).

        Examples
        --------
        >>> ProblemResults(((),), ((True, False, False, False),)).pass_at(2)
        0.5
        """
        least = min(map(len, self.solved))
        if not 1 <= k <= least:
            raise StreamlineError(
                f"pass@{k} requires {k} attempts per problem, but there are {least}. Expected k from 1 to {least}. "
                "Increase samples."
            )
        failed = [math.comb(len(tries) - sum(tries), k) / math.comb(len(tries), k) for tries in self.solved]
        return 1.0 - statistics.fmean(failed)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%} of {len(self.solved)} problems solved"


def solve_problems(
    model: Any, tokenizer: Any, problems: Sequence[Problem], config: TextGenerationConfig | None = None, *,
    desc: str = "problems",
) -> ProblemResults:  # fmt: skip
    """Generate answers to problems, and compare them with the reference answers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with ``generate``.
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer of the model.
    problems : sequence of Problem
        The problems.
    config : TextGenerationConfig, optional
        Number of attempts, tokens and sampling settings. By default one greedy attempt of at most 256 tokens.
    desc : str
        Label of the progress bar.

    Returns
    -------
    ProblemResults

    Raises
    ------
    StreamlineError
        If there is no problem, or the model cannot generate.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model, tiny_tokenizer
    >>> problems = [Problem("2 + 3 =", "5"), Problem("4 + 4 =", "8")]
    >>> solve_problems(tiny_model("llama"), tiny_tokenizer(), problems, TextGenerationConfig(new_tokens=4)).accuracy
    0.0
    """
    if not problems:
        raise StreamlineError("solve_problems: problems is empty. Expected at least one Problem. Pass problems.")
    prompts = [problem.prompt for problem in problems]
    texts = generate_texts(model, tokenizer, prompts, config or TextGenerationConfig(new_tokens=256), desc=desc)
    solved = [tuple(p.solved_by(text.text) for text in tries) for p, tries in zip(problems, texts, strict=True)]
    return ProblemResults(tuple(map(tuple, texts)), tuple(solved))


def read_problems(path: str | Path, *, shots: int = 0, match: Match = "number") -> list[Problem]:
    """Read problems, such as those of GSM8K, from a JSONL file (see `read_rows`).

    Parameters
    ----------
    path : str or Path
        The file, with one problem per line: ``question`` (or ``context``), ``answer``, and optionally
        ``chain_of_thought``. As in GSM8K, the answer may contain the solution before ``####``.
    shots : int
        Number of few-shot examples. The first problems of the file are the examples in all prompts.
    match : {"line", "number"}
        See `Problem`.

    Returns
    -------
    list of Problem
        All problems except the examples.

    Raises
    ------
    StreamlineError
        If the file cannot be read, a row is not a problem, or no problem is left.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
    ...     _ = file.write('{"question": "What is 2 + 3?", "answer": "2 + 3 = 5 #### 5"}')
    ...     file.flush()
    ...     read_problems(file.name)[0].answer
    '5'
    """
    problems = [_problem(row, f"{path}, row {number}", match) for number, row in enumerate(read_rows(path))]
    if not 0 <= shots < len(problems):
        raise StreamlineError(
            f"shots={shots} is out of range for the {len(problems)} problems in {path}. Expected 0 to "
            f"{len(problems) - 1}. Decrease shots."
        )
    examples = "".join(f"{problem.prompt} {work}\n\n" for problem, work in problems[:shots])
    return [replace(problem, prompt=examples + problem.prompt) for problem, _ in problems[shots:]]


def guessing_accuracy(problems: Sequence[Problem]) -> float:
    """Return the accuracy of always giving the most frequent answer.

    With c of n problems having this answer it is (c - 1)/(n - 1).

    Examples
    --------
    >>> guessing_accuracy([Problem(f"How many in {row}?", str(len(row))) for row in ("ab", "cd", "efg", "hi", "j")])
    0.5
    """
    if not problems:
        raise StreamlineError("guessing_accuracy: problems is empty. Expected at least one Problem. Pass problems.")
    answers = Counter(last_number(p.answer) if p.match == "number" else p.answer.strip() for p in problems)
    return (max(answers.values()) - 1) / max(len(problems) - 1, 1)


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None.

    Examples
    --------
    >>> last_number("First 12, then $1,250.50.")
    1250.5
    """
    numbers = _NUMBER.findall(text)
    return float(re.sub("[\u2212\u2013]", "-", numbers[-1]).replace(",", "").replace("$", "")) if numbers else None


def _problem(row: dict[str, Any], where: str, match: Match) -> tuple[Problem, str]:
    """Return the problem of a row, and its solution in the format of few-shot examples."""
    question, answer = row.get("question", row.get("context")), row.get("answer")
    work = row.get("chain_of_thought", "")
    if not (isinstance(question, str) and isinstance(answer, (str, int, float)) and isinstance(work, str)):
        raise StreamlineError(f"{where} has the keys {', '.join(row) or 'none'}. Expected {_LAYOUT}. Correct the file.")
    before, _, result = str(answer).rpartition(_ANSWER_MARK)
    work, result = (work or before).strip(), result.strip()
    if match == "number" and (len(_NUMBER.findall(result)) != 1 or _EXPONENT.search(result)):
        raise StreamlineError(
            f"{where} has the answer {result!r}, which is not one number, but only the last one is compared with "
            "match='number'. Expected a number such as 1,250.5. Write it so, or set match='line'."
        )
    solution = f"{work} The answer is {result}." if work else f"{result}"
    return Problem(f"Question: {question}\nAnswer:", result, match, where), solution


@validate_arguments(count=1, shots=0)
def synthetic_problems(count: int = 50, *, seed: int = 0, shots: int = 4) -> dict[str, list[Problem]]:
    """Generate distinct synthetic problems of each sort, which a base model can solve without fine-tuning.

    Parameters
    ----------
    count : int
        Number of problems per sort. A smaller count returns the first problems of a larger count.
    seed : int
        Seed of the problems.
    shots : int
        Number of few-shot examples, the same in all prompts of a sort.

    Returns
    -------
    dict of str to list of Problem
        By sort: ``arithmetic`` (sums and differences of numbers below 100), ``brackets`` (close open brackets),
        ``copying`` (repeat a row of words), ``counting`` (count a word in a row). Each answer is one line (see
        `ANSWER_STOP`).

    Raises
    ------
    StreamlineError
        If a sort has fewer distinct problems than requested.

    Examples
    --------
    >>> problems = synthetic_problems(2, shots=1)
    >>> sorted(problems), len(problems["brackets"])
    (['arithmetic', 'brackets', 'copying', 'counting'], 2)
    """
    return {name: make_problems(name, make, count, seed, shots) for name, make in PROBLEM_MAKERS.items()}


def make_problems(name: str, make: ProblemMaker, count: int, seed: int, shots: int) -> list[Problem]:
    """Generate problems of one sort (see `synthetic_problems`); `make` draws a question and its answer."""
    random, seen, repeated = Random(f"{seed} {name}"), dict[str, str](), 0
    while len(seen) < shots + count:
        question, answer = make(random)
        repeated = repeated + 1 if question in seen else 0
        seen[question] = answer
        if repeated > _MAX_REPEATED:
            raise StreamlineError(
                f"The sort {name} has fewer than {shots + count} different problems. Expected a smaller count + shots. "
                "Decrease count."
            )
    pairs = list(seen.items())
    examples = "".join(f"{question} {answer}\n" for question, answer in pairs[:shots])
    numbered = enumerate(pairs[shots:], start=1)
    return [Problem(examples + question, answer, where=f"{name}, number {k}") for k, (question, answer) in numbered]


def arithmetic(least: int, below: int) -> ProblemMaker:
    """Return a maker of sums and differences of numbers from `least` to `below` − 1."""

    def make(random: Random) -> tuple[str, str]:
        a, b = random.randrange(least, below), random.randrange(least, below)
        if random.random() < 0.5:
            return f"{a} + {b} =", str(a + b)
        return f"{max(a, b)} - {min(a, b)} =", str(abs(a - b))

    return make


def brackets(least: int, most: int, kinds: int) -> ProblemMaker:
    """Return a maker of rows of `least` to `most` brackets, of `kinds` kinds, to be closed."""
    opening = list(_PAIRS)[:kinds]

    def make(random: Random) -> tuple[str, str]:
        opened: list[str] = []
        text = ""
        for _ in range(random.randrange(least, most + 1)):
            if opened and random.random() < 0.4:
                text += _PAIRS[opened.pop()]
            else:
                opened.append(random.choice(opening))
                text += opened[-1]
        if not opened:
            opened.append(random.choice(opening))
            text += opened[-1]
        return f"Open: {' '.join(text)} Close:", " ".join(_PAIRS[bracket] for bracket in reversed(opened))

    return make


def copying(least: int, most: int) -> ProblemMaker:
    """Return a maker of rows of `least` to `most` words, to be repeated."""

    def make(random: Random) -> tuple[str, str]:
        words = " ".join(random.sample(_WORDS, random.randrange(least, most + 1)))
        return f"Say: {words} Again:", words

    return make


def counting(most: int, others: int) -> ProblemMaker:
    """Return a maker of rows in which a word occurs up to `most` times among up to `others` other words."""

    def make(random: Random) -> tuple[str, str]:
        word, *distractors = random.sample(_WORDS, 3)
        times = random.randrange(1, most + 1)
        row = [word] * times + random.choices(distractors, k=random.randrange(1, others + 1))
        random.shuffle(row)
        return f"Row: {' '.join(row)} How many {word}:", str(times)

    return make


PROBLEM_MAKERS: dict[str, ProblemMaker] = {
    "arithmetic": arithmetic(2, 100),
    "brackets": brackets(4, 10, kinds=3),
    "copying": copying(3, 7),
    "counting": counting(5, others=4),
}
