"""From rows of `benchmarks.generation_scores` to numbers: what is retained, with intervals; no model is needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.bootstrap import Retained, TaskAnswers, retained

GROUP = "generation"
Row = Mapping[str, Any]


def greedy_answers(original: Row | Sequence[Row], rows: Sequence[Row]) -> list[TaskAnswers]:
    """The problems and last words, as the original and what was made of it answer them, beside what guessing reaches.

    Parameters
    ----------
    original : mapping, or sequence of mapping
        Its own row; or one for each of `rows`, where they were scored in different precisions.
    rows : sequence of mapping
        Of one model, or of one recipe with several seeds: each item then counts by the share of the seeds that get it
        right, and an interval is of drawing the items for all seeds at once.

    Raises
    ------
    StreamlineError
        If there is no row, or they were not asked the same.
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


def pass_answers(original: Row | Sequence[Row], rows: Sequence[Row], k: int) -> list[TaskAnswers]:
    """The same of pass@k: each problem counts by the chance that one of k tries is right.

    Raises
    ------
    StreamlineError
        See `greedy_answers`; or if there are fewer tries than k, or another k was asked for when they were scored.
    """
    originals = _same_questions(original, rows)
    given = rows[0]["pass_at"]
    chances = {c: pass_of(c, given["samples"], k) for c in range(given["samples"] + 1)}
    by_guessing = rows[0]["guessed"]["pass"]
    if str(k) not in by_guessing:
        raise StreamlineError(f"These rows were scored for pass@{', '.join(by_guessing)}, and not for {k}.")
    return [
        _answers(
            sort,
            *([[chances[c] for c in row["pass_at"]["right"][sort]] for row in several] for several in pair),
            chance=by_guessing[str(k)][sort],
            sets=rows[0]["sets"],
        )
        for sort in given["right"]
        for pair in [(originals, rows)]
    ]


def retained_greedy(original: Row | Sequence[Row], rows: Sequence[Row], **settings: Any) -> Retained:
    """What is retained of `greedy_answers`; see `retained` for the settings."""
    return retained(greedy_answers(original, rows), **settings)[GROUP]


def retained_pass(original: Row | Sequence[Row], rows: Sequence[Row], k: int, **settings: Any) -> Retained:
    """What is retained of `pass_answers`."""
    return retained(pass_answers(original, rows, k), **settings)[GROUP]


def pass_of(right: int, samples: int, k: int) -> float:
    """The chance that one of k tries at a problem is right, without bias, of so many right ones among the samples."""
    if not 1 <= k <= samples:
        raise StreamlineError(f"pass@{k} needs {k} tries a problem; there are {samples}. Ask for more samples.")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def summary(
    original: Row | Sequence[Row], rows: Sequence[Row], ks: Sequence[int] = (1, 5, 20), **settings: Any
) -> dict[str, Any]:
    """All numbers of one model, or of one recipe with several seeds, as JSON values.

    Lengths, shares and repetition are means over the seeds.
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
) -> TaskAnswers:
    """Of the original's scores, for each seed, and those of what was made of it.

    Above what guessing reaches; and what stands behind the same solved problems is drawn together, of so many sets of
    them that take turns.
    """
    clusters = [k % sets for k in range(len(first[0]))] if sets else []
    return TaskAnswers(name, mean_of(first), mean_of(others), chance, GROUP, clusters)


def mean_of(scores: Sequence[Sequence[float]]) -> list[float]:
    """Of each item, over several rows.

    Examples
    --------
    >>> mean_of([[1.0, 0.0], [1.0, 1.0]])
    [1.0, 0.5]
    """
    return [statistics.fmean(item) for item in zip(*scores, strict=True)]


def _values(found: Retained) -> dict[str, Any]:
    return {
        "ratio": asdict(found.ratio),
        "above_chance": None if found.above_chance is None else asdict(found.above_chance),
        "tasks": {name: asdict(one) for name, one in found.tasks.items()},
        "left_out": dict(found.left_out),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _same_questions(original: Row | Sequence[Row], rows: Sequence[Row]) -> Sequence[Row]:
    """The original's row for each of the others."""
    if not rows:
        raise StreamlineError("There is no row of a changed model; give one at least.")
    originals = [original] * len(rows) if isinstance(original, Mapping) else original
    for own, row in zip(originals, rows, strict=True):
        if row["key"] != own["key"]:
            raise StreamlineError(
                f"The original's row was made with the key {own['key']}, another with {row['key']}: they were not "
                "asked the same. Score them again."
            )
    return originals
