"""Compute retained accuracy with intervals from rows of `benchmarks.generation_scores`, without a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from streamline_hooks.core import StreamlineError
from streamline_hooks.evaluation import PairedScores, RelativeAccuracy, relative_accuracy

GROUP = "generation"
Row = Mapping[str, Any]


def greedy_answers(original: Row | Sequence[Row], rows: Sequence[Row]) -> list[PairedScores]:
    """Pair the greedy scores of the original and of a changed model on problems and last words.

    Parameters
    ----------
    original : mapping, or sequence of mapping
        The row of the original, or one for each of `rows` if they were scored in different precisions.
    rows : sequence of mapping
        Rows of one model, or of one recipe with several seeds. The score of an item is then the fraction of seeds that
        solve it, and intervals resample items for all seeds together.

    Raises
    ------
    StreamlineError
        If there is no row, or if the rows were scored on different items.
    """
    originals = _same_questions(original, rows)
    greedy: dict[str, Callable[[Row], str]] = {sort: lambda row, s=sort: row["probes"][s] for sort in rows[0]["probes"]}
    greedy["last_words"] = lambda row: row["last_words"]["right"]
    return [
        _answers(
            name,
            *([list(map(float, right(row))) for row in several] for several in (originals, rows)),
            chance=rows[0]["guessed"]["probes"].get(name, 0.0),
            sets=rows[0]["sets"] if name in rows[0]["probes"] else 0,
        )
        for name, right in greedy.items()
    ]


def pass_answers(original: Row | Sequence[Row], rows: Sequence[Row], k: int) -> list[PairedScores]:
    """Pair the pass@k scores of the original and of a changed model.

    Raises
    ------
    StreamlineError
        See `greedy_answers`; also if there are fewer samples than k, or if pass@k was not scored for this k.
    """
    originals = _same_questions(original, rows)
    sampled = rows[0]["pass_at"]
    chances = {c: pass_of(c, sampled["samples"], k) for c in range(sampled["samples"] + 1)}
    by_guessing = rows[0]["guessed"]["pass"]
    if str(k) not in by_guessing:
        raise StreamlineError(
            f"pass@{k} is not in these rows. Expected k of {', '.join(by_guessing)}. Score the rows again."
        )
    return [
        _answers(
            sort,
            *([[chances[c] for c in row["pass_at"]["right"][sort]] for row in several] for several in pair),
            chance=by_guessing[str(k)][sort],
            sets=rows[0]["sets"],
        )
        for sort in sampled["right"]
        for pair in [(originals, rows)]
    ]


def retained_greedy(original: Row | Sequence[Row], rows: Sequence[Row], **settings: Any) -> RelativeAccuracy:
    """Return the relative accuracy of `greedy_answers`; see `relative_accuracy` for the settings."""
    return relative_accuracy(greedy_answers(original, rows), **settings)[GROUP]


def retained_pass(original: Row | Sequence[Row], rows: Sequence[Row], k: int, **settings: Any) -> RelativeAccuracy:
    """Return the relative accuracy of `pass_answers`."""
    return relative_accuracy(pass_answers(original, rows, k), **settings)[GROUP]


def pass_of(right: int, samples: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from the number of correct samples."""
    if not 1 <= k <= samples:
        raise StreamlineError(f"pass@{k} needs {k} samples per problem. There are {samples}. Use more samples.")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def summary(
    original: Row | Sequence[Row], rows: Sequence[Row], ks: Sequence[int] = (1, 5, 20), **settings: Any
) -> dict[str, Any]:
    """Return all numbers of one model, or of one recipe with several seeds, as JSON values.

    Lengths, fractions and repetition are means over the seeds.
    """
    greedy = _values(retained_greedy(original, rows, **settings))
    kinds = {
        kind: {
            name: _mean([row["match"][kind][name] for row in rows])
            for name in ("length", "share", "repetition", "original_repetition")
        }
        for kind in rows[0]["match"]
    }
    return {
        "seeds": len(rows),
        "greedy": greedy,
        "pass_at": {str(k): _values(retained_pass(original, rows, k, **settings)) for k in ks},
        "last_words_perplexity": _mean([row["last_words"]["perplexity"] for row in rows]),
        "match": kinds,
    }


def _answers(
    name: str, first: Sequence[Sequence[float]], others: Sequence[Sequence[float]], chance: float, sets: int
) -> PairedScores:
    """Return the paired scores of one task, averaged over seeds.

    Problems with the same few-shot examples form a cluster; `sets` is the number of sets of examples, used in turn.
    """
    clusters = [k % sets for k in range(len(first[0]))] if sets else []
    return PairedScores(name, mean_of(first), mean_of(others), chance, GROUP, clusters)


def mean_of(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean score of each item over several rows.

    Examples
    --------
    >>> mean_of([[1.0, 0.0], [1.0, 1.0]])
    [1.0, 0.5]
    """
    return [statistics.fmean(item) for item in zip(*scores, strict=True)]


def _values(result: RelativeAccuracy) -> dict[str, Any]:
    return {
        "ratio": asdict(result.ratio),
        "above_chance": None if result.above_chance is None else asdict(result.above_chance),
        "tasks": {name: asdict(estimate) for name, estimate in result.tasks.items()},
        "left_out": dict(result.left_out),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _same_questions(original: Row | Sequence[Row], rows: Sequence[Row]) -> Sequence[Row]:
    """Return the row of the original for each of `rows`; raise if they were scored on different items."""
    if not rows:
        raise StreamlineError("rows is empty. Expected at least one row of a changed model.")
    originals = [original] * len(rows) if isinstance(original, Mapping) else original
    for own, row in zip(originals, rows, strict=True):
        if row["key"] != own["key"]:
            raise StreamlineError(
                f"The key of the original's row is {own['key']}, that of another row {row['key']}. Expected equal "
                "keys: the rows were scored on different items or settings. Score them again."
            )
    return originals
