"""Results of an evaluation: as an object, as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.agreement import Agreement, stability
from streamline_hooks.evaluation.bootstrap import Difference, Retained, TaskAnswers, compared, retained
from streamline_hooks.evaluation.problems import Solved
from streamline_hooks.evaluation.sliding import TextPerplexity
from streamline_hooks.evaluation.speed import SpeedReport
from streamline_hooks.evaluation.tasks import TaskResult
from streamline_hooks.evaluation.writing import Matched, WritingScores, Written

QUANTILES = (0.5, 0.9, 0.99)
_PACKAGES = ("streamline_hooks", "lm_eval", "transformers")


@dataclass
class Scores:
    """Results of one model; a part that was not evaluated is empty.

    Attributes
    ----------
    parameters, bytes : int
        Of the weights.
    text : dict of str to TextPerplexity
        By domain.
    tasks : dict of str to TaskResult
    problems : dict of str to Solved
    written : tuple of Written
        After each prompt.
    seconds : dict of str to float
        By part, when it was measured.
    """

    parameters: int
    bytes: int
    text: dict[str, TextPerplexity] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    problems: dict[str, Solved] = field(default_factory=dict)
    written: tuple[Written, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Results of a model, and of its original.

    Attributes
    ----------
    name : str
    scores : Scores
    reference_name : str
        Empty without an original.
    original : Scores or None
    agreement : dict of str to Agreement
        By domain of the text.
    speed : SpeedReport or None
    chance : dict of str to float
        Accuracy of guessing, by task of problems.
    """

    name: str
    scores: Scores
    reference_name: str = ""
    original: Scores | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    speed: SpeedReport | None = None
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def mean_perplexity_ratio(self) -> float | None:
        """The mean over the domains of the perplexity divided by the original's."""
        if self.original is None or not self.scores.text:
            return None
        return statistics.fmean(mine.value / self.original.text[name].value for name, mine in self.scores.text.items())

    @property
    def matched(self) -> Matched | None:
        """Agreement of the generated texts with those of the original."""
        if self.original is None or not self.scores.written:
            return None
        return Matched.of(self.scores.written, self.original.written)

    @property
    def stability(self) -> dict[str, dict[str, float]]:
        """Stability of each multiple-choice task, see `stability`, and the share of items that it weighs."""
        found = {}
        for name, mine in self.scores.tasks.items() if self.original is not None else ():
            theirs = self.original.tasks[name]  # type: ignore[union-attr]
            if theirs.loglikelihoods and mine.scores and theirs.scores:
                same = [a == b for a, b in zip(mine.scores, theirs.scores, strict=True)]
                value = stability(theirs.loglikelihoods, theirs.tokens, same)
                found[name] = {"value": value, "share": sum(same) / len(same)}
        return found

    @property
    def retained(self) -> dict[str, Retained]:
        """Relative accuracy by group; without a group in which the original is never right."""
        answers = self._answers()
        return retained(answers) if answers else {}

    def more_than(self, other: Evaluation) -> dict[str, Difference]:
        """Compute how much more this model retains than another of the same original and suite; see `compared`.

        Raises
        ------
        StreamlineError
            If one has no original, or their tasks or originals differ.
        """
        if self.original is None or other.original is None:
            raise StreamlineError(
                "One of the two evaluations has no original. Expected two with a common one. Evaluate again, and give "
                "it as `reference`."
            )
        sides = self._answers(), other._answers()
        return compared(*sides) if any(sides) else {}

    def _answers(self) -> list[TaskAnswers]:
        """Return the per-item scores of both models, of the groups in which the original is ever right."""
        if self.original is None:
            return []
        tasks = [
            TaskAnswers(
                name,
                self.original.tasks[name].scores,
                mine.scores,
                mine.chance,
                "generation" if mine.generates else "classification",
            )
            for name, mine in self.scores.tasks.items()
            if mine.metric
        ]
        for name, solved in self.scores.problems.items():
            theirs = self.original.problems[name].shares
            tasks.append(TaskAnswers(name, theirs, solved.shares, self.chance[name], "generation"))
        groups = {task.group for task in tasks if any(task.original)}
        return [task for task in tasks if task.group in groups]

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
            found["stability"] = self.stability
        if self.scores.tasks:
            found["packages"] = {**{name: version(name) for name in _PACKAGES}, "torch": torch.__version__}
        if self.retained:
            found["retained"] = {group: _retained(one) for group, one in self.retained.items()}
        if self.speed is not None:
            found["speed"] = self.speed.to_dict()
        return found

    def table(self) -> str:
        """The result for a terminal."""
        mine, theirs = self._numbers(self.scores), {} if self.original is None else self._numbers(self.original)
        rows = []
        for label, (value, unit) in mine.items():
            other = theirs.get(label, (None,))[0]
            rows.append((label, _number(value, unit), _number(other, unit), _difference(value, other, unit)))
        more: list[tuple[str, object]] = [(f"retained, {group}", one) for group, one in self.retained.items()]
        if self.agreement:
            more.append(("agreement", sum(self.agreement.values(), Agreement())))
        if self.matched is not None:
            more.append(("written", self.matched))
        parts = [table(rows, ("", self.name, self.reference_name, "")), *([table(more)] if more else [])]
        return "\n".join([*parts, *([] if self.speed is None else ["", self.speed.table()])])

    def _section(self, scores: Scores) -> dict[str, Any]:
        found: dict[str, Any] = {"parameters": scores.parameters, "bytes": scores.bytes}
        if scores.text:
            found["perplexity"] = {name: _text(one) for name, one in scores.text.items()}
        if accuracy := self._accuracies(scores):
            found["accuracy"] = accuracy
        if scores.tasks:
            found["tasks"] = _tasks(scores)
        if scores.written:
            one = WritingScores(scores.written)
            found["writing"] = {"repetition": _json(one.repetition), "length": one.length, "ended": one.ended}
        return found | {"seconds": scores.seconds}

    def _accuracies(self, scores: Scores) -> dict[str, dict[str, Any]]:
        found = {
            name: _accuracy(task, task.chance, len(task.scores), task.metric)
            for name, task in scores.tasks.items()
            if task.metric
        }
        for name, solved in scores.problems.items():
            found[name] = _accuracy(solved, self.chance[name], len(solved.solved), "exact match")
            if (tries := min(map(len, solved.solved))) > 1:
                found[name][f"pass@{tries}"] = solved.pass_at(tries)
        return found

    def _numbers(self, scores: Scores) -> dict[str, tuple[float, str]]:
        """Return the numbers of the table and their units, by label."""
        found: dict[str, tuple[float, str]] = {"parameters": (scores.parameters, "count")}
        found |= {f"perplexity, {name}": (text.value, "ratio") for name, text in scores.text.items()}
        for name, row in self._accuracies(scores).items():
            found[f"{name} ({row['metric']})"] = row["value"], "share"
        for task, result in scores.tasks.items():
            for name, metrics in result.metrics.items():
                for metric, (value, _) in metrics.items():
                    if (name, metric) != (task, result.metric):
                        found[f"{name} ({metric})"] = value, "number"
        if scores.written:
            found["repetition"] = WritingScores(scores.written).repetition, "share"
        return found


def _accuracy(result: TaskResult | Solved, chance: float, items: int, metric: str) -> dict[str, Any]:
    error = _json(result.standard_error)
    return {"value": result.accuracy, "standard_error": error, "chance": chance, "items": items, "metric": metric}


def _tasks(scores: Scores) -> dict[str, Any]:
    """Return lm-eval's own results, by task, group and subtask."""
    return {
        name: {
            "metrics": {m: {"value": _json(v), "standard_error": e} for m, (v, e) in metrics.items()},
            "items": task.items.get(name),
            "few_shot": task.few_shot.get(name),
            "version": task.versions.get(name),
        }
        for task in scores.tasks.values()
        for name, metrics in task.metrics.items()
    }


def _text(text: TextPerplexity) -> dict[str, Any]:
    bits = None if text.unpredicted or not text.bytes else text.bits_per_byte
    return {"value": _json(text.value), "bits_per_byte": bits, "tokens": text.tokens}


def _retained(one: Retained) -> dict[str, Any]:
    estimates = {"ratio": one.ratio, "above_chance": one.above_chance}
    return {
        name: None if e is None else {"value": e.value, "low": _json(e.low), "high": _json(e.high)}
        for name, e in estimates.items()
    } | {"left_out": dict(one.left_out)}


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return "" if value is None else "-"
    if unit == "count":
        return f"{value / 1e6:.1f} M"
    return format(value, {"ratio": ".2f", "share": ".1%", "number": ".4g"}[unit])


def _difference(value: float, other: float | None, unit: str) -> str:
    if other is None or not (math.isfinite(value) and math.isfinite(other)):
        return ""
    return f"{100 * (value - other):+.1f} points" if unit == "share" else f"x {value / other:.2f}"
