"""Train a repair on what it writes itself: when, on texts of what length, and by which divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile
from math import floor
from typing import Any, ClassVar

from streamline_hooks.core.config import Bound, Config, FrozenDict
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.losses import LOSSES
from streamline_hooks.repair.objective import Objective

_ENOUGH = 32  # texts of one length, before a longer one is thought of
_WHOLE = 0.8  # the share of them that must not have been cut
_CLOSER = 0.95  # of the first divergence at a length: what is no more than noise of 32 texts is no improvement


@dataclass(frozen=True)
class OnPolicyConfig(Config):
    """Describe which steps train on text that the student generates, and on how long texts.

    A model that is trained on other text alone never sees the result of its own errors. In these steps the student
    continues prompts from the calibration text, and the teacher's logits at each generated position are the target.
    Texts are short at first, since a damaged model soon generates text that nothing can be learned from, and become
    longer as it improves (ShortOPD, arXiv 2607.13124; a growing horizon: arXiv 2605.31490; distillation on a student's
    own text: GKD, arXiv 2306.13649).

    Attributes
    ----------
    loss : mapping of str to float
        Weights of the losses at the generated positions; losses on logits, such as ``kl`` and ``reverse_kl``. The
        default is ``{"kl": 1.0}``. Generated text is no target itself, so ``lm`` is refused.
    share : float
        Fraction of the steps that are on-policy, evenly spaced, above 0 and at most 1; default 0.5. The other steps
        keep the student close to the teacher on the calibration text.
    begin : float
        Fraction of all steps before the first on-policy one, below 1; default 0. A student that starts badly damaged
        is better trained on the calibration text first.
    prompt : int
        Tokens of calibration text in a prompt, at most; default 32. A sequence yields as many prompts as it has room
        for prompts with their texts.
    shortest, longest : int
        Generated tokens of a text, at first and at most; defaults 16 and 128. The length doubles when, of at least 32
        texts of one length, 80 % were not cut, and the loss is 5 % below that of the first 32 of this length.
    temperature : float
        Temperature of the sampling, above 0; default 1.0, the student's own distribution.
    top_p : float
        Probability mass that is sampled from, above 0 and at most 1; default 1.0, all tokens.

    Raises
    ------
    StreamlineError
        If a value is invalid.

    Examples
    --------
    >>> config = OnPolicyConfig({"reverse_kl": 1.0}, share=0.25, longest=64)
    >>> [step for step in range(12) if config.is_due(step, 12)]
    [3, 7, 11]
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "share": "(0, 1]",
        "begin": "[0, 1)",
        "prompt": 1,
        "shortest": 1,
        "temperature": "(0, inf)",
        "top_p": "(0, 1]",
    }

    loss: Mapping[str, float] = field(default_factory=lambda: {"kl": 1.0})
    share: float = 0.5
    begin: float = 0.0
    prompt: int = 32
    shortest: int = 16
    longest: int = 128
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loss", FrozenDict(Objective(self.loss).weights))
        for name in self.loss:
            if LOSSES[name].compares != "logits":
                raise StreamlineError(
                    f"OnPolicyConfig: the loss {name!r} compares {LOSSES[name].compares}. Expected losses on logits, "
                    "such as kl and reverse_kl. Leave it out."
                )
        if self.longest < self.shortest:
            raise StreamlineError(
                f"OnPolicyConfig: longest={self.longest} is less than shortest={self.shortest}. Expected 1 <= shortest "
                "<= longest. Change one."
            )

    @cached_property
    def objective(self) -> Objective:
        """The losses as one function."""
        return Objective(self.loss)

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
    settings : OnPolicyConfig
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
    >>> length = TextLength(OnPolicyConfig(shortest=16, longest=40), 16)
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

    settings: OnPolicyConfig
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
    def of(cls, settings: OnPolicyConfig, so_far: Sequence[Any]) -> TextLength:
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
