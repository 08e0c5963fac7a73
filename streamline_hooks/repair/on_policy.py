"""Train a repair on what it writes itself: when, on texts of what length, and by which divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from math import floor, inf
from typing import Any

from streamline_hooks.arguments import check_fields, checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.options import read_options

_ENOUGH = 32  # texts of one length, before a longer one is thought of
_WHOLE = 0.8  # the share of them that must not have been cut
_CLOSER = 0.95  # of the first divergence at a length: what is no more than noise of 32 texts is no improvement


@dataclass(frozen=True)
class OnPolicy:
    """Some steps are made on the repaired model's own continuations of the calibration text.

    A model that is trained on others' text alone does not see what becomes of its own errors. Here it writes, and the
    original says at each place what it would have said there. Texts are short at first, since a damaged model soon
    writes what nobody can learn from, and are doubled as it improves: when hardly any has to be cut, and what is said
    at their places has come closer to the original (ShortOPD, arXiv 2607.13124; a horizon that grows: arXiv
    2605.31490; distillation on a student's own text: GKD, arXiv 2306.13649).

    Attributes
    ----------
    objective : Objective
        ``kl``, ``reverse_kl`` or both: what is compared at the places that the model has written. Its own text is not
        learned as a text (``lm``).
    share : float
        Of the steps that are made so, evenly; the others are made on the calibration text.
    begin : float
        The share of all steps before the first of these.
    prompt : int
        Tokens of the calibration text that are written on, fewer where a text has fewer. A sequence gives as many
        prompts as it has room for prompts and texts.
    shortest, longest : int
        New tokens of a text, at first and at the most. They double when, of 32 texts or more of one length, at least
        80 % were not cut, and the objective is 5 % below what it was for the first 32 of this length.
    temperature, top_p : float
        Of the sampling.

    Raises
    ------
    StreamlineError
        If a number is out of range, or the objective compares something else.

    Examples
    --------
    >>> settings = OnPolicy.parse("reverse_kl:share=0.25,longest=64")
    >>> settings.longest, [step for step in range(12) if settings.is_due(step, 12)]
    (64, [3, 7, 11])
    >>> print(settings.objective)
    reverse_kl
    """

    objective: Objective = field(default_factory=Objective)
    share: float = 0.5
    begin: float = 0.0
    prompt: int = 32
    shortest: int = 16
    longest: int = 128
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        said = {name.rpartition("*")[2] for name in str(self.objective).split(" + ")}
        if not said <= {"kl", "reverse_kl"}:
            raise StreamlineError(
                f"On the model's own text the objective {self.objective} cannot be; expected kl, reverse_kl or a sum "
                "of both, such as '0.5*kl + 0.5*reverse_kl'."
            )
        if not (0 < self.share <= 1 and 0 <= self.begin < 1 and 0 < self.temperature < inf and 0 < self.top_p <= 1):
            raise StreamlineError(
                f"Got share={self.share}, begin={self.begin}, temperature={self.temperature}, top_p={self.top_p}; "
                "expected 0 < share <= 1, 0 <= begin < 1, a temperature above 0, and 0 < top_p <= 1."
            )
        if not (self.prompt >= 1 and 1 <= self.shortest <= self.longest):
            raise StreamlineError(
                f"Got prompt={self.prompt}, shortest={self.shortest}, longest={self.longest} tokens; expected a prompt "
                "of 1 or more, and 1 <= shortest <= longest."
            )

    @classmethod
    @checked()
    def parse(cls, text: str) -> OnPolicy:
        """Read ``"kl"``, ``"reverse_kl:share=0.5"`` or ``"0.5*kl + 0.5*reverse_kl:begin=0.5,longest=256"``.

        Raises
        ------
        StreamlineError
            If it cannot be read.
        """
        numbers: dict[str, type] = {"share": float, "begin": float, "temperature": float, "top_p": float}
        numbers |= {"prompt": int, "shortest": int, "longest": int}
        given = read_options(text, numbers, "on-policy training", "reverse_kl:share=0.5,longest=128")
        return cls(objective=Objective.parse(text.partition(":")[0]), **given)

    @property
    def lengths(self) -> list[int]:
        """Those that texts may have one after the other."""
        doubled = takewhile(lambda length: length < self.longest, (self.shortest * 2**k for k in count()))
        return [*doubled, self.longest]

    @property
    def sampling(self) -> dict[str, float]:
        """What a model is told of how to sample."""
        return {"temperature": self.temperature, "top_p": self.top_p}

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a step, of so many, is made on the model's own text."""
        since = step - floor(self.begin * steps)
        return since >= 0 and floor((since + 1) * self.share) > floor(since * self.share)


@dataclass
class TextLength:
    """How long the texts are at present.

    Attributes
    ----------
    settings : OnPolicy
    length : int
        New tokens.
    texts, whole, answers : int
        Of this length, since it was last looked at: texts that were written, those that were not cut, and places that
        were compared.
    loss : float
        Summed over these places.
    first : float
        The mean of the first of this length; None where that is not known yet.

    Examples
    --------
    >>> length = TextLength(OnPolicy(shortest=16, longest=40), 16)
    >>> for whole, loss in ((32, 1.0), (32, 0.97), (20, 0.9), (30, 0.9), (32, 2.0), (32, 1.9)):
    ...     length.note(32, whole, loss, 512)
    ...     print(length.length)
    16
    16
    16
    32
    32
    40
    """

    settings: OnPolicy
    length: int
    texts: int = 0
    whole: int = 0
    answers: int = 0
    loss: float = 0.0
    first: float | None = None

    @property
    def so_far(self) -> tuple[Any, ...]:
        """All but the settings, as JSON values."""
        return self.length, self.texts, self.whole, self.answers, self.loss, self.first

    @classmethod
    def of(cls, settings: OnPolicy, so_far: Sequence[Any]) -> TextLength:
        """Where it was."""
        return cls(settings, *so_far)

    def note(self, texts: int, whole: int, loss: float, answers: int) -> None:
        """Count what was written, and go on to longer texts where these have improved and most of them were whole."""
        self.texts, self.whole = self.texts + texts, self.whole + whole
        self.loss, self.answers = self.loss + loss * answers, self.answers + answers
        if self.texts < _ENOUGH or not self.answers:
            return
        mean = self.loss / self.answers
        if self.first is None:
            self.first = mean
        elif mean <= _CLOSER * self.first and self.whole >= _WHOLE * self.texts:
            self.length, self.first = min(2 * self.length, self.settings.longest), None
        self.texts, self.whole, self.answers, self.loss = 0, 0, 0, 0.0
