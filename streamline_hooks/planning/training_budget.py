"""How much text a compression that is trained can take in a given time, by arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from streamline_hooks.errors import StreamlineError
from streamline_hooks.pipeline.config import CompressionConfig
from streamline_hooks.planning.duration import in_words
from streamline_hooks.repair import DistillationConfig
from streamline_hooks.repair.training_pace import TrainingPace

_LEAST = 20_480  # tokens: with fewer steps a training is hardly one
_FITTING = (8_192, 40_960)  # tokens that the window is chosen and its map fitted on: a fifth, within these
_VALIDATION = (2_048, 4_096)  # a tenth
_TEST = (4_096, 12_288)  # a fifth
_EPOCHS, _PARTS = 4, 20  # what is seen more often teaches little more; in parts of an epoch
_VALIDATIONS = (2, 8)
_STEPS_A_LOOK = 4  # tokens trained on, for each token that a validation looks at
_MOST = 2**40
_RESULT = 0.25  # share of the measuring, at most, that comes after the training: of the result, one of six
_GRACE = 0.1  # share of the budget by which all may be late before the training is ended


@dataclass(frozen=True)
class Sizes:
    """How many tokens are for what.

    Attributes
    ----------
    calibration : int
        Trained on.
    fitting : int
        Of these, what the window is chosen on, and what stands in its place is fitted on.
    validation, test : int
    epochs : float
    validations : int
        As in `DistillationConfig`.
    """

    calibration: int
    fitting: int
    validation: int
    test: int
    epochs: float = 1
    validations: int = 2

    @property
    def trained(self) -> int:
        """Tokens of all steps."""
        return round(self.calibration * self.epochs)

    @property
    def dealt(self) -> int:
        """Tokens of text that are needed."""
        return self.calibration + self.validation + self.test


@dataclass(frozen=True)
class Paces:
    """What each stage of a compression takes here, in seconds, or in seconds a token.

    Attributes
    ----------
    plan, prepare : float
        Seconds that finding all this out took, and that what comes before the first pass takes.
    encode : float
        Seconds a token of the text that is dealt out, once for the plan and once in the end.
    rank, fit, judge, score : float
        Seconds a token of the profile, of the shortlist's moments, of judging it, and of measuring the perplexities.
    search, solve : float
        Seconds that a criterion takes which runs the model for each window, and the shortlist's least squares.
    training : TrainingPace
    compare, save : float
        Seconds that writing and timing side by side takes, and that surgery and the folder take.
    others : tuple of TrainingPace
        The training as it is not done, in products of another precision.
    keep : float
        Seconds that writing the file takes once which an interrupted training goes on from.
    """

    plan: float
    prepare: float
    encode: float
    rank: float
    fit: float
    judge: float
    score: float
    search: float
    solve: float
    training: TrainingPace
    compare: float
    save: float
    others: tuple[TrainingPace, ...] = ()
    keep: float = 0.0

    def steps_and_validations(self, sizes: Sizes) -> float:
        """Seconds of a training from its first step on, with what is kept of it meanwhile."""
        steps = self.training.steps_and_validations(
            sizes.calibration, sizes.validation, epochs=sizes.epochs, validations=sizes.validations
        )
        return steps + self.keep * (steps / (60 * DistillationConfig().checkpoint_minutes))

    def stages(self, sizes: Sizes) -> dict[str, float]:
        """Seconds by stage, named as in `CompressionResult.seconds`, after those of the planning itself."""
        first = self.training.once(sizes.calibration, sizes.validation)
        return {
            "plan": self.plan + self.encode * sizes.dealt,
            "prepare": self.prepare + self.encode * sizes.dealt,
            "rank": self.rank * sizes.fitting + self.search,
            "verify": self.fit * sizes.fitting + self.solve + self.judge * sizes.validation,
            "measure": self.score * sizes.test,
            "train": first + self.steps_and_validations(sizes) + self.keep,  # at its end too
            "compare": self.compare,
            "save": self.save,
        }


@dataclass(frozen=True)
class Given:
    """What is not for the budget to say.

    Attributes
    ----------
    sequence_length, batch_size : int
    validation, test : int or None
        Tokens that were asked for.
    keep : tuple of int
        Blocks that must stay.
    shortlist : int
        Selections that are fitted and judged.
    """

    sequence_length: int = 512
    batch_size: int = 1
    validation: int | None = None
    test: int | None = None
    keep: tuple[int, ...] = ()
    shortlist: int = 8

    def sizes(self, sequences: int, epochs: float = 1) -> Sizes:
        """What a number of sequences to train on comes to.

        Examples
        --------
        >>> Given().sizes(400)
        Sizes(calibration=204800, fitting=40960, validation=4096, test=12288, epochs=1, validations=8)
        """
        length = self.sequence_length
        tokens = sequences * length

        def share(part: int, bounds: tuple[int, int], asked: int | None = None) -> int:
            wanted = min(max(tokens // part, bounds[0]), bounds[1]) if asked is None else asked
            return max(1, wanted // length) * length

        validation = share(10, _VALIDATION, self.validation)
        looks = int(tokens * epochs / (_STEPS_A_LOOK * validation))
        return Sizes(
            tokens,
            min(tokens, max(2 * length, share(5, _FITTING))),  # what is fitted needs another sequence to choose by
            validation,
            share(5, _TEST, self.test),
            epochs,
            min(max(looks, _VALIDATIONS[0]), _VALIDATIONS[1]),
        )


@dataclass(frozen=True)
class BudgetPlan:
    """A compression that takes about as long as it may.

    Attributes
    ----------
    budget : float
        Seconds that were allowed.
    sizes : Sizes
    paces : Paces
    asked : CompressionConfig
        What was to be planned for.
    given : Given
    """

    budget: float
    sizes: Sizes
    paces: Paces
    asked: CompressionConfig
    given: Given

    @property
    def stages(self) -> dict[str, float]:
        """Seconds planned for each stage."""
        return self.paces.stages(self.sizes)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())

    @property
    def train_until(self) -> float:
        """Seconds of `compress` after which the training ends, so that all is late by a tenth of the budget at most."""
        stages, paces = self.stages, self.paces
        last = paces.training.validation * self.sizes.validation + paces.keep
        behind = last + stages["compare"] + _RESULT * stages["measure"] + stages["save"]
        return (1 + _GRACE) * self.budget - stages["plan"] - behind

    @property
    def config(self) -> CompressionConfig:
        """What `compress` is to be given."""
        asked, sizes = self.asked, self.sizes
        assert asked.distillation is not None
        data = replace(
            asked.data,
            calibration_tokens=sizes.calibration,
            fitting_tokens=sizes.fitting,
            validation_tokens=sizes.validation,
            test_tokens=sizes.test,
        )
        return replace(
            asked,
            search=replace(asked.search, keep=self.given.keep),
            data=data,
            distillation=replace(asked.distillation, epochs=sizes.epochs, validations=sizes.validations),
            hardware=replace(asked.hardware, autocast=self.paces.training.autocast),
            train_until=self.train_until,
        )

    def lines(self) -> list[str]:
        """The plan for a terminal."""
        sizes, pace = self.sizes, self.paces.training
        often = "once" if sizes.epochs == 1 else f"{sizes.epochs:g} times"
        speeds = [f"{1e3 * one.step:.2f} ms a token in {_precision(one)}" for one in (pace, *self.paces.others)]
        stages = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in self.stages.items())
        said = [
            f"budget     {in_words(self.budget)}: {self.asked.repair}, trained on {sizes.calibration:,} tokens "
            f"{often}; chosen and fitted on {sizes.fitting:,} of them, judged on {sizes.validation:,}, scored on "
            f"{sizes.test:,}",
            f"products   of the training in {_precision(pace)} (a step takes {', '.join(speeds)})",
            f"planned    {stages}; in all {in_words(self.seconds)}",
        ]
        if self.seconds < self.budget * (1 - _GRACE):
            said.append(
                f"text       suffices for {in_words(self.seconds)}, seen {sizes.epochs:g} times, so that it will end "
                "earlier; give more text (--calibration) for the rest"
            )
        return said

    def taken(self, seconds: Mapping[str, float]) -> str:
        """How long it took, for a terminal; from `CompressionResult.seconds`, beside which is the planning itself."""
        planned = self.stages
        took = {"plan": planned["plan"], **seconds}
        each = ", ".join(f"{name} {in_words(took.get(name, 0.0))} ({in_words(planned[name])})" for name in planned)
        share = sum(took.values()) / self.budget
        return f"taken      {in_words(sum(took.values()))}, {share:.0%} of the budget; for each (as planned): {each}"


def plan_in(
    budget: float, paces: Paces, asked: CompressionConfig, given: Given, available: int | None = None
) -> BudgetPlan:
    """Find the most text that can be trained on in a given time.

    Parameters
    ----------
    budget : float
        Seconds.
    paces : Paces
    asked : CompressionConfig
        With a distillation.
    given : Given
    available : int, optional
        Tokens there are to train on, beside those to validate and to test on; by default more than are needed. What is
        less is all taken, and seen up to four times.

    Raises
    ------
    StreamlineError
        If the least that is worth doing takes longer; the text says how long.

    Examples
    --------
    >>> from streamline_hooks import CompressionConfig
    >>> paces = Paces(
    ...     10.0, 1.0, 1e-6, 1e-3, 1e-3, 5e-3, 5e-3, 0.0, 2.0, TrainingPace(1e-3, 2e-3, 4e-3, 2e-3), 10.0, 3.0
    ... )
    >>> plan = plan_in(600.0, paces, CompressionConfig.preset("best"), Given())
    >>> plan.sizes.calibration, round(plan.seconds)
    (81408, 596)
    """
    length = given.sequence_length
    there = _MOST if available is None else max(1, available // length)
    least = min(math.ceil(_LEAST / length), there)

    def planned(sequences: int, epochs: float = 1) -> BudgetPlan:
        return BudgetPlan(budget, given.sizes(sequences, epochs), paces, asked, given)

    needed = planned(least)
    if needed.seconds > budget:
        sizes = needed.sizes
        minutes = math.ceil(needed.seconds / 60)
        raise StreamlineError(
            f"A budget of {in_words(budget)} does not suffice on this machine: training on {sizes.calibration:,} "
            f"tokens, choosing on {sizes.fitting:,} of them, judging on {sizes.validation:,} and scoring on "
            f"{sizes.test:,} others takes about {in_words(needed.seconds)}. Give {minutes}m or more, "
            f"{'a smaller shortlist, ' * (given.shortlist > 1)}or a machine with more cores or a GPU."
        )

    def most(low: int, high: int, made: Callable[[int], BudgetPlan]) -> BudgetPlan:
        """With the highest number that fits, of those from the lowest on, which does."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if made(middle).seconds <= budget else (low, middle)
        return made(low)

    if planned(there).seconds > budget:
        return most(least, there, planned)
    return most(_PARTS, _EPOCHS * _PARTS + 1, lambda parts: planned(there, parts / _PARTS))


def _precision(pace: TrainingPace) -> str:
    return pace.autocast or "the weights' precision"
