"""Results of an evaluation, as objects, JSON and tables."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from streamline_hooks.core import StreamlineError, table
from streamline_hooks.evaluation.agreement import Agreement, stability
from streamline_hooks.evaluation.batch_scores import BatchScores
from streamline_hooks.evaluation.bootstrap import (
    PairedScores,
    RelativeAccuracy,
    RelativeAccuracyDifference,
    paired_bootstrap,
    relative_accuracy,
)
from streamline_hooks.evaluation.embeddings import EmbeddingSimilarity
from streamline_hooks.evaluation.lm_eval_tasks import TaskResult
from streamline_hooks.evaluation.samples import GeneratedText, GenerationAgreement, GenerationStatistics
from streamline_hooks.evaluation.sliding_perplexity import TextPerplexity
from streamline_hooks.evaluation.speed import SpeedReport
from streamline_hooks.evaluation.synthetic_tasks import ProblemResults

_GROUPS = {False: "classification", True: "generation"}
_TOKENS = "labeled tokens"
_QUANTILES = (0.5, 0.9, 0.99)
_PACKAGES = ("streamline_hooks", "lm_eval", "transformers")


@dataclass
class Scores:
    """Results of one model on a suite. Parts that were not evaluated are empty.

    Attributes
    ----------
    parameters, bytes : int
        Number of parameters, and their bytes.
    text : dict of str to TextPerplexity
        Perplexity by domain.
    batches : dict of str to BatchScores
        Scores by name of the batches.
    tasks : dict of str to TaskResult
        Results of lm-eval tasks by name.
    problems : dict of str to ProblemResults
        Results of problems by name.
    generated : tuple of GeneratedText
        The generation for each prompt.
    seconds : dict of str to float
        Seconds that each part took.

    Examples
    --------
    >>> Scores(parameters=10, bytes=40, text={"prose": TextPerplexity(nll=0.0, tokens=3)}).perplexities
    {'prose': 1.0}
    """

    parameters: int
    bytes: int
    text: dict[str, TextPerplexity] = field(default_factory=dict)
    batches: dict[str, BatchScores] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    problems: dict[str, ProblemResults] = field(default_factory=dict)
    generated: tuple[GeneratedText, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def perplexities(self) -> dict[str, float]:
        """Perplexity by domain of the text, and by name of the batches of causal language models."""
        of_batches = {name: scores.perplexity for name, scores in self.batches.items() if scores.predicted}
        return {name: text.value for name, text in self.text.items()} | of_batches


@dataclass
class Evaluation:
    """Results of a model and its original on a suite; returned by `evaluate`.

    Attributes
    ----------
    name : str
        Name of the model.
    scores : Scores
        Results of the model.
    reference_name : str
        Name of the original; empty without an original.
    original : Scores or None
        Results of the original.
    agreement : dict of str to Agreement
        Agreement by domain of the text, and by name of the batches of models with output distributions.
    similarity : dict of str to EmbeddingSimilarity
        Similarity by name of the batches of embedding models.
    speed : SpeedReport or None
        Times of both models.
    chance : dict of str to float
        Accuracy of guessing, by name of the problems.

    Examples
    --------
    >>> text = {"prose": TextPerplexity(nll=0.0, tokens=3)}
    >>> print(Evaluation("model", Scores(parameters=2_000_000, bytes=8_000_000, text=text)).table().splitlines()[-1])
    perplexity, prose  1.00
    """

    name: str
    scores: Scores
    reference_name: str = ""
    original: Scores | None = None
    agreement: dict[str, Agreement] = field(default_factory=dict)
    similarity: dict[str, EmbeddingSimilarity] = field(default_factory=dict)
    speed: SpeedReport | None = None
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def mean_perplexity_ratio(self) -> float | None:
        """Mean over `Scores.perplexities` of the ratio to the original's perplexity; None without an original."""
        perplexities = self.scores.perplexities
        if self.original is None or not perplexities:
            return None
        originals = self.original.perplexities
        return statistics.fmean(value / originals[name] for name, value in perplexities.items())

    @property
    def matched(self) -> GenerationAgreement | None:
        """Agreement of the generations with those of the original."""
        if self.original is None or not self.scores.generated:
            return None
        return GenerationAgreement.of(self.scores.generated, self.original.generated)

    @property
    def stability(self) -> dict[str, dict[str, float]]:
        """By multiple-choice task, the stability (see `stability`), and the fraction of items with equal scores."""
        by_task = {}
        for name, original in ({} if self.original is None else self.original.tasks).items():
            result = self.scores.tasks[name]
            if original.loglikelihoods and result.scores and original.scores:
                same = [a == b for a, b in zip(result.scores, original.scores, strict=True)]
                value = stability(original.loglikelihoods, original.tokens, same)
                by_task[name] = {"value": value, "share": sum(same) / len(same)}
        return by_task

    @property
    def retained(self) -> dict[str, RelativeAccuracy]:
        """Relative accuracy by group, for groups in which the original scores above 0."""
        answers = self._answers()
        return relative_accuracy(answers) if answers else {}

    def accuracy_difference(self, other: Evaluation) -> dict[str, RelativeAccuracyDifference]:
        """Compare the relative accuracy with that of another model with the same original (see `paired_bootstrap`)."""
        if self.original is None or other.original is None:
            raise StreamlineError(
                "One of the two evaluations has no original. Expected the same original in both. Evaluate again with "
                "the original as `reference`."
            )
        sides = self._answers(), other._answers()
        return paired_bootstrap(*sides) if any(sides) else {}

    def _answers(self) -> list[PairedScores]:
        """Return the scores of both models by item, for groups in which the original scores above 0."""
        if self.original is None:
            return []
        tasks = [
            PairedScores(name, self.original.tasks[name].scores, task.scores, task.chance, _GROUPS[task.generates])
            for name, task in self.scores.tasks.items()
            if task.metric
        ]
        tasks += [
            PairedScores(
                name,
                self.original.problems[name].fractions_correct,
                solved.fractions_correct,
                self.chance[name],
                _GROUPS[True],
            )
            for name, solved in self.scores.problems.items()
        ]
        tasks += [
            PairedScores(
                name,
                self.original.batches[name].correct,
                batch.correct,
                batch.chance,
                _TOKENS if batch.rows else _GROUPS[False],
                batch.rows,
            )
            for name, batch in self.scores.batches.items()
            if batch.correct
        ]
        groups = {task.group for task in tasks if any(task.original)}
        return [task for task in tasks if task.group in groups]

    def report(self) -> dict[str, Any]:
        """Return everything as JSON values; `streamline_hooks.pipeline.write_report` renders them as a page."""
        report = {"model": self.name, "reference": self.reference_name or None, **self._section(self.scores)}
        if self.original is not None:
            report["original"] = self._section(self.original)
            report["mean_perplexity_ratio"] = self.mean_perplexity_ratio
        if self.scores.generated:
            references = [None] * len(self.scores.generated) if self.original is None else self.original.generated
            report["samples"] = [
                {"prompt": text.prompt, "text": text.text, "reference": None if other is None else other.text}
                for text, other in zip(self.scores.generated, references, strict=True)
            ]
        if self.agreement:
            total, matched = sum(self.agreement.values(), Agreement()), self.matched
            report["agreement"] = {
                "kl": total.kl,
                **({} if total.unit == "token" else {"unit": total.unit}),
                "top1": total.top1,
                "quantiles": {str(q): total.spread.quantile(q) for q in _QUANTILES},
                "kl_by_domain": {name: agreement.kl for name, agreement in self.agreement.items()},
                "match_length": None if matched is None else matched.length,
                "tokens": total.tokens,
            }
        if self.similarity:
            report["similarity"] = {name: asdict(similarity) for name, similarity in self.similarity.items()}
        if stable := self.stability:
            report["stability"] = stable
        if self.scores.tasks:
            report["packages"] = {**{name: version(name) for name in _PACKAGES}, "torch": torch.__version__}
        if groups := self.retained:
            report["retained"] = {group: _retained(accuracy) for group, accuracy in groups.items()}
        if self.speed is not None:
            report["speed"] = self.speed.to_dict()
        return _json(report)  # type: ignore[no-any-return]

    def table(self) -> str:
        """Return the result as a table for a terminal."""
        originals = {} if self.original is None else self._numbers(self.original)
        rows = []
        for label, (value, unit) in self._numbers(self.scores).items():
            other = originals.get(label, (None,))[0]
            rows.append((label, _number(value, unit), _number(other, unit), _difference(value, other, unit)))
        more: list[tuple[str, object]] = [(f"retained, {group}", accuracy) for group, accuracy in self.retained.items()]
        if self.agreement:
            more.append(("agreement", sum(self.agreement.values(), Agreement())))
        more += [(f"embeddings, {name}", similarity) for name, similarity in self.similarity.items()]
        if self.matched is not None:
            more.append(("generation", self.matched))
        parts = [table(rows, ("", self.name, self.reference_name, "")), *([table(more)] if more else [])]
        return "\n".join([*parts, *([] if self.speed is None else ["", self.speed.table()])])

    def _section(self, scores: Scores) -> dict[str, Any]:
        section: dict[str, Any] = {"parameters": scores.parameters, "bytes": scores.bytes}
        of_batches = {name: batch for name, batch in scores.batches.items() if batch.predicted}
        if scores.text or of_batches:
            section["perplexity"] = {name: _text(text) for name, text in scores.text.items()} | {
                name: {"value": batch.perplexity, "bits_per_byte": None, "tokens": batch.predicted}
                for name, batch in of_batches.items()
            }
        if accuracy := self._accuracies(scores):
            section["accuracy"] = accuracy
        if scores.tasks:
            section["tasks"] = {
                name: {
                    "metrics": {m: {"value": value, "standard_error": error} for m, (value, error) in metrics.items()},
                    "items": task.items.get(name),
                    "few_shot": task.few_shot.get(name),
                    "version": task.versions.get(name),
                }
                for task in scores.tasks.values()
                for name, metrics in task.metrics.items()
            }
        if scores.generated:
            texts = GenerationStatistics(scores.generated)
            section["writing"] = {"repetition": texts.repetition, "length": texts.length, "ended": texts.ended}
        return section | {"seconds": scores.seconds}

    def _accuracies(self, scores: Scores) -> dict[str, dict[str, Any]]:
        accuracies = {
            name: _accuracy(task, task.chance, len(task.scores), task.metric)
            for name, task in scores.tasks.items()
            if task.metric
        }
        for name, batch in scores.batches.items():
            if batch.correct:
                accuracies[name] = _accuracy(batch, batch.chance, len(batch.correct), "accuracy")
        for name, solved in scores.problems.items():
            accuracies[name] = _accuracy(solved, self.chance[name], len(solved.solved), "exact match")
            if (tries := min(map(len, solved.solved))) > 1:
                accuracies[name][f"pass@{tries}"] = solved.pass_at(tries)
        return accuracies

    def _numbers(self, scores: Scores) -> dict[str, tuple[float, str]]:
        """Return the values of the table and their units, by label."""
        numbers: dict[str, tuple[float, str]] = {"parameters": (scores.parameters, "count")}
        numbers |= {f"perplexity, {name}": (value, "ratio") for name, value in scores.perplexities.items()}
        for name, row in self._accuracies(scores).items():
            numbers[f"{name} ({row['metric']})"] = row["value"], "share"
        for task, result in scores.tasks.items():
            for name, metrics in result.metrics.items():
                for metric, (value, _) in metrics.items():
                    if (name, metric) != (task, result.metric):
                        numbers[f"{name} ({metric})"] = value, "number"
        if scores.generated:
            numbers["repetition"] = GenerationStatistics(scores.generated).repetition, "share"
        return numbers


def _accuracy(
    result: TaskResult | ProblemResults | BatchScores, chance: float, items: int, metric: str
) -> dict[str, Any]:
    error = result.standard_error
    return {"value": result.accuracy, "standard_error": error, "chance": chance, "items": items, "metric": metric}


def _text(text: TextPerplexity) -> dict[str, Any]:
    bits = None if text.unpredicted or not text.bytes else text.bits_per_byte
    return {"value": text.value, "bits_per_byte": bits, "tokens": text.tokens}


def _retained(accuracy: RelativeAccuracy) -> dict[str, Any]:
    ratio, above = (
        None if e is None else {"value": e.value, "low": e.low, "high": e.high}
        for e in (accuracy.ratio, accuracy.above_chance)
    )
    return {"ratio": ratio, "above_chance": above, "left_out": dict(accuracy.left_out)}


def _json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not support, by None at any depth."""
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
