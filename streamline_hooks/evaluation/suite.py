"""What a model is asked: text, questions, problems, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from streamline_hooks.arguments import check_fields
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.last_words import LastWord
from streamline_hooks.evaluation.problems import Problem
from streamline_hooks.evaluation.questions import Question
from streamline_hooks.evaluation.sliding import WindowSettings
from streamline_hooks.evaluation.texts import require_texts
from streamline_hooks.evaluation.writing import require_writable

PROMPTS = "prompts"
"""What the prompts are called where each part of a suite has a name."""


@dataclass(frozen=True)
class ChoiceTask:
    """Questions, and how they are counted.

    Attributes
    ----------
    questions : tuple of Question
    normalised : bool
        Count by likelihood a character, as is usual for choices of very different lengths.
    """

    questions: tuple[Question, ...]
    normalised: bool = False


@dataclass(frozen=True)
class ProblemTask:
    """Problems, and how they are put; see `write_on`.

    Attributes
    ----------
    problems : tuple of Problem
    new_tokens : int
    samples : int
    temperature : float
    stop : tuple of str
    chat : bool

    Raises
    ------
    StreamlineError
        If a setting is out of range.
    """

    problems: tuple[Problem, ...]
    new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    chat: bool = False

    def __post_init__(self) -> None:
        require_writable(self.new_tokens, self.samples, self.temperature)


@dataclass(frozen=True)
class Suite:
    """Everything that a model is asked. Two models are compared by the same suite, and share its tokenizer.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    text : mapping of str to sequence of str
        By domain, documents to predict.
    choices : mapping of str to ChoiceTask
        By task.
    last_words : mapping of str to sequence of LastWord
        By task, texts whose last word is to be predicted.
    problems : mapping of str to ProblemTask
        By task.
    prompts : sequence of str
        To be written on, greedily: to look at, to compare with what the original writes, and for repetition.
    window, stride, first
        See `sliding_perplexity`.
    add_bos : bool
        Begin each question and each text whose last word is asked for with the BOS token, which some models (Gemma) are
        poor without. Text begins with it by `first`, prompts and problems as the tokenizer has it.
    new_tokens : int
        After each prompt.
    timed : tuple of int, or None
        Tokens of a prompt (fewer where a model has not the positions), tokens after it, and rounds, for
        `measure_speed`; None where speed is not measured.

    Raises
    ------
    StreamlineError
        If there is nothing in it or in a part of it, two parts have one name, a setting is out of range, or one text is
        given where a list of them is expected.

    Examples
    --------
    >>> Suite(None, prompts=["Once"], timed=None).prompts
    ['Once']
    """

    tokenizer: Any
    text: Mapping[str, Sequence[str]] = field(default_factory=dict)
    choices: Mapping[str, ChoiceTask] = field(default_factory=dict)
    last_words: Mapping[str, Sequence[LastWord]] = field(default_factory=dict)
    problems: Mapping[str, ProblemTask] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    window: int | None = None
    stride: int | None = None
    first: Literal["bos", "eos"] | None = "bos"
    add_bos: bool = False
    new_tokens: int = 64
    timed: tuple[int, int, int] | None = (256, 16, 5)

    def __post_init__(self) -> None:
        check_fields(self)
        for documents in self.text.values():
            require_texts(documents)
        require_texts(self.prompts, "prompt")
        require_writable(self.new_tokens)
        WindowSettings(self.window, self.stride, first=self.first)  # it refuses what cannot be used
        if self.timed is not None and (
            len(self.timed) != 3 or min(self.timed[0], self.timed[1] + 1, self.timed[2]) < 1
        ):
            raise StreamlineError(
                f"Got timed={self.timed}; expected tokens of a prompt, tokens after it, and rounds: 1 or more, 0 or "
                "more, and 1 or more. Give timed=None where speed is not to be measured."
            )
        asked = {name: task.questions for name, task in self.choices.items()}
        solved = {name: task.problems for name, task in self.problems.items()}
        every = [*self.text.items(), *asked.items(), *self.last_words.items(), *solved.items()]
        names = [name for name, _ in every] + [PROMPTS] * bool(self.prompts)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StreamlineError(f"Two domains or tasks are named {', '.join(twice)}; give each its own name.")
        empty = [name for name, content in every if not content]
        if empty:
            raise StreamlineError(
                f"There is nothing in {', '.join(empty)}; give a document or an item, or leave it out."
            )
        if not (names or self.timed):
            raise StreamlineError("The suite is empty; give text, choices, last_words, problems, prompts or timed.")
