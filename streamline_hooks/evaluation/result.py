"""What an evaluation came to, for a page, a table and a program."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import Agreement
from streamline_hooks.evaluation.bootstrap import Difference, Retained, TaskAnswers, compared, retained
from streamline_hooks.evaluation.choices import ChoiceScores
from streamline_hooks.evaluation.last_words import LastWordScores
from streamline_hooks.evaluation.matched import Matched
from streamline_hooks.evaluation.problems import Solved, chance_of_guessing
from streamline_hooks.evaluation.questions import chance
from streamline_hooks.evaluation.sliding import TextPerplexity
from streamline_hooks.evaluation.speed import SpeedReport
from streamline_hooks.evaluation.stability import Stability, stability
from streamline_hooks.evaluation.suite import Suite
from streamline_hooks.evaluation.writing import WritingScores, Written

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Scores:
    """What one model reaches; a section that was not asked for is empty.

    Attributes
    ----------
    parameters, bytes : int
        Of the weights.
    text : dict of str to TextPerplexity
        By domain.
    choices : dict of str to ChoiceScores
    last_words : dict of str to LastWordScores
    problems : dict of str to Solved
    written : tuple of Written
        After each prompt.
    seconds : dict of str to float
        By section and task, when it was measured.
    """

    parameters: int
    bytes: int
    text: dict[str, TextPerplexity] = field(default_factory=dict)
    choices: dict[str, ChoiceScores] = field(default_factory=dict)
    last_words: dict[str, LastWordScores] = field(default_factory=dict)
    problems: dict[str, Solved] = field(default_factory=dict)
    written: tuple[Written, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What a model reaches, and what it retains of its original.

    Attributes
    ----------
    suite : Suite
        What was asked.
    name : str
    scores : Scores
    reference_name : str
        Empty without an original.
    original : Scores or None
    agreement : dict of str to Agreement
        By domain of the text.
    speed : SpeedReport or None
    """

    suite: Suite
    name: str
    scores: Scores
    reference_name: str = ""
    original: Scores | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    speed: SpeedReport | None = None

    @property
    def mean_perplexity_ratio(self) -> float | None:
        """The mean over the domains of the perplexity divided by the original's."""
        if self.original is None or not self.scores.text:
            return None
        return statistics.fmean(mine.value / self.original.text[name].value for name, mine in self.scores.text.items())

    @property
    def matched(self) -> Matched | None:
        """How far what is written goes along with what the original writes."""
        if self.original is None or not self.scores.written:
            return None
        return Matched.of(self.scores.written, self.original.written)

    @property
    def stability(self) -> dict[str, Stability]:
        """By task of choices, see `stability`."""
        if self.original is None:
            return {}
        tasks = self.suite.choices
        theirs = self.original.choices
        return {
            name: stability(mine, theirs[name], normalised=tasks[name].normalised)
            for name, mine in self.scores.choices.items()
        }

    @property
    def retained(self) -> dict[str, Retained]:
        """By group, ``classification`` and ``generation``; a group in which the original is never right is left out."""
        asked = self._asked()
        return retained(asked) if asked else {}

    def more_than(self, other: Evaluation) -> dict[str, Difference]:
        """How much more this model retains than another, by group as `retained`, see `compared`.

        Parameters
        ----------
        other : Evaluation
            Of the same suite, beside the same original.

        Raises
        ------
        StreamlineError
            If the two were not asked the same, if one has no original, or their originals answer differently.
        """
        if self.original is None or other.original is None:
            raise StreamlineError(
                "What a model retains more than another is told of two evaluations beside their common original, and "
                "one of these has none; give it as `reference`."
            )
        sides = self._asked(), other._asked()
        return compared(*sides) if any(sides) else {}

    def _asked(self) -> list[TaskAnswers]:
        """The answers beside the original's, in the groups in which it is ever right."""
        if self.original is None:
            return []
        pairs = zip(self._answers(self.scores), self._answers(self.original), strict=True)
        tasks = [TaskAnswers(name, theirs, mine, guess, group) for (name, group, mine, guess), (*_, theirs, _) in pairs]
        groups = {task.group: any(any(t.original) for t in tasks if t.group == task.group) for task in tasks}
        return [task for task in tasks if groups[task.group]]

    def report(self) -> dict[str, Any]:
        """Everything, as JSON values; see `streamline_hooks.report.write_report`, which makes a page of it."""
        found = {"model": self.name, "reference": self.reference_name or None, **self._section(self.scores)}
        if self.original is not None:
            found["original"] = self._section(self.original)
            mean = self.mean_perplexity_ratio
            found["mean_perplexity_ratio"] = None if mean is None else _json(mean)
        if self.scores.written:
            theirs = self.original.written if self.original is not None else [None] * len(self.scores.written)
            found["samples"] = [
                {"prompt": mine.prompt, "text": mine.text, "reference": None if other is None else other.text}
                for mine, other in zip(self.scores.written, theirs, strict=True)
            ]
        if self.agreement:
            whole = sum(self.agreement.values(), Agreement())
            found["agreement"] = {
                "kl": _json(whole.kl),
                "top1": whole.top1,
                "quantiles": {str(q): whole.spread.quantile(q) for q in QUANTILES},
                "kl_by_domain": {name: one.kl for name, one in self.agreement.items()},
                "match_length": None if self.matched is None else self.matched.length,
                "tokens": whole.tokens,
            }
        if self.stability:
            found["stability"] = {
                name: {"value": one.value, "share": one.share} for name, one in self.stability.items()
            }
        if self.retained:
            found["retained"] = {group: _retained(one) for group, one in self.retained.items()}
        if self.speed is not None:
            found["speed"] = self.speed.to_dict()
        return found

    def table(self) -> str:
        """The result for a terminal."""
        rows = [("", self.name, self.reference_name, "")]
        for label, mine, theirs, unit in self._rows():
            other = "" if theirs is None else _number(theirs, unit)
            rows.append((label, _number(mine, unit), other, _against(mine, theirs, unit)))
        more = [(f"retained, {group}", str(one)) for group, one in self.retained.items()]
        if self.agreement:
            more.append(("agreement", str(sum(self.agreement.values(), Agreement()))))
        if self.matched is not None:
            more.append(("written", str(self.matched)))
        first, *widths = (max(len(row[k]) for row in rows) for k in range(4))
        first = max([first, *(len(label) for label, _ in more)])
        lines = [
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
            for row in rows
        ]
        lines += [f"{label.ljust(first)}  {said}" for label, said in more]
        return "\n".join([*map(str.rstrip, lines), *([] if self.speed is None else ["", self.speed.table()])])

    def _section(self, scores: Scores) -> dict[str, Any]:
        found: dict[str, Any] = {"parameters": scores.parameters, "bytes": scores.bytes}
        if scores.text:
            found["perplexity"] = {name: _text(one) for name, one in scores.text.items()}
        accuracy = {name: row for name, row in self._accuracies(scores)}
        if accuracy:
            found["accuracy"] = accuracy
        if scores.written:
            one = WritingScores(scores.written)
            found["writing"] = {"repetition": _json(one.repetition), "length": one.length, "ended": one.ended}
        return found | {"seconds": scores.seconds}

    def _accuracies(self, scores: Scores) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, choices in scores.choices.items():
            normalised = self.suite.choices[name].normalised
            value, error = choices.accuracy, choices.standard_error
            each, each_error = choices.normalised_accuracy, choices.normalised_standard_error
            yield (
                name,
                {
                    "value": each if normalised else value,
                    "standard_error": _json(each_error if normalised else error),
                    "chance": chance(self.suite.choices[name].questions),
                    "items": len(choices.gold),
                    "metric": "accuracy, normalised" if normalised else "accuracy",
                    "raw": value,
                    "normalised": each,
                },
            )
        for name, ends in scores.last_words.items():
            yield name, _accuracy(ends.accuracy, ends.standard_error, 0.0, len(ends.right), "last word")
        for name, solved in scores.problems.items():
            guess = chance_of_guessing(self.suite.problems[name].problems)
            row = _accuracy(solved.accuracy, solved.standard_error, guess, len(solved.solved), "exact match")
            tries = min(map(len, solved.solved))
            yield name, row | ({f"pass@{tries}": solved.pass_at(tries)} if tries > 1 else {})

    def _answers(self, scores: Scores) -> Iterator[tuple[str, str, tuple[bool, ...] | tuple[float, ...], float]]:
        for name, choices in scores.choices.items():
            task = self.suite.choices[name]
            right = choices.right_normalised if task.normalised else choices.right
            yield name, "classification", right, chance(task.questions)
        for name, ends in scores.last_words.items():
            yield name, "generation", ends.right, 0.0
        for name, solved in scores.problems.items():
            yield name, "generation", solved.shares, chance_of_guessing(self.suite.problems[name].problems)

    def _rows(self) -> Iterator[tuple[str, float, float | None, str]]:
        """Label, the model's number, the original's, and what sort of number it is."""
        other = self.original
        yield "parameters", self.scores.parameters, None if other is None else other.parameters, "count"
        for name, text in self.scores.text.items():
            theirs = None if other is None else other.text[name]
            yield f"perplexity, {name}", text.value, None if theirs is None else theirs.value, "ratio"
        mine = dict(self._accuracies(self.scores))
        originals: Mapping[str, Any] = {} if other is None else dict(self._accuracies(other))
        for name, row in mine.items():
            yield f"{name} ({row['metric']})", row["value"], originals[name]["value"] if originals else None, "share"
        if self.scores.written:
            theirs_written = None if other is None else WritingScores(other.written).repetition
            yield "repetition", WritingScores(self.scores.written).repetition, theirs_written, "share"


def _accuracy(value: float, error: float, chance: float, items: int, metric: str) -> dict[str, Any]:
    return {"value": value, "standard_error": _json(error), "chance": chance, "items": items, "metric": metric}


def _text(text: TextPerplexity) -> dict[str, Any]:
    try:
        bits = text.bits_per_byte
    except StreamlineError:  # nothing before the first tokens, which are then not predicted
        bits = None
    return {"value": _json(text.value), "bits_per_byte": bits, "tokens": text.tokens}


def _retained(one: Retained) -> dict[str, Any]:
    estimates = {"ratio": one.ratio, "above_chance": one.above_chance}
    return {
        name: None if e is None else {"value": e.value, "low": _json(e.low), "high": _json(e.high)}
        for name, e in estimates.items()
    } | {"left_out": dict(one.left_out)}


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "-"
    return {"count": f"{value / 1e6:.1f} M", "ratio": f"{value:.2f}", "share": f"{value:.1%}"}[unit]


def _against(mine: float, theirs: float | None, unit: str) -> str:
    if theirs is None or not (math.isfinite(mine) and math.isfinite(theirs)):
        return ""
    return f"{100 * (mine - theirs):+.1f} points" if unit == "share" else f"x {mine / theirs:.2f}"
