"""From rows of `benchmarks.generation_scores` to numbers: what is retained, with intervals; no model is needed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation.retained import Retained, TaskAnswers, retained

GROUP = "generation"
Row = Mapping[str, Any]


def retained_greedy(original: Row, rows: Sequence[Row], **settings: Any) -> Retained:
    """What is retained of the problems and last words that the original gets right; see `retained` for the settings.

    Parameters
    ----------
    original : mapping
        Its own row.
    rows : sequence of mapping
        Of one model, or of one recipe with several seeds: each item then counts by the share of the seeds that get it
        right, and an interval is of drawing the items for all seeds at once.

    Raises
    ------
    StreamlineError
        If there is no row, or they were not asked the same.
    """
    _same_questions(original, rows)
    tasks = [(sort, [row["probes"][sort] for row in (original, *rows)]) for sort in original["probes"]]
    tasks.append(("last_words", [row["last_words"]["right"] for row in (original, *rows)]))
    return _retained([(name, [list(map(float, right)) for right in several]) for name, several in tasks], settings)


def retained_pass(original: Row, rows: Sequence[Row], k: int, **settings: Any) -> Retained:
    """The same of pass@k: each problem counts by the chance that one of k tries is right.

    Raises
    ------
    StreamlineError
        See `retained_greedy`; or if there are fewer tries than k.
    """
    _same_questions(original, rows)
    samples = original["pass_at"]["samples"]
    return _retained(
        [
            (sort, [[pass_of(c, samples, k) for c in row["pass_at"]["right"][sort]] for row in (original, *rows)])
            for sort in original["pass_at"]["right"]
        ],
        settings,
    )


def pass_of(right: int, samples: int, k: int) -> float:
    """The chance that one of k tries at a problem is right, without bias, of so many right ones among the samples."""
    if not 1 <= k <= samples:
        raise StreamlineError(f"pass@{k} needs {k} tries a problem; there are {samples}. Ask for more samples.")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def summary(original: Row, rows: Sequence[Row], ks: Sequence[int] = (1, 5, 20), **settings: Any) -> dict[str, Any]:
    """All numbers of one model, or of one recipe with several seeds, as JSON values.

    Lengths, shares and repetition are means over the seeds.
    """
    greedy = _values(retained_greedy(original, rows, **settings))
    kinds = {
        kind: {
            name: _mean([row["match"][kind][name] for row in rows])
            for name in ("length", "share", "repetition", "original_repetition")
        }
        for kind in original["match"]
    }
    return {
        "seeds": len(rows),
        "greedy": greedy,
        "pass_at": {str(k): _values(retained_pass(original, rows, k, **settings)) for k in ks},
        "last_words_perplexity": _mean([row["last_words"]["perplexity"] for row in rows]),
        "match": kinds,
    }


def _retained(tasks: Sequence[tuple[str, Sequence[Sequence[float]]]], settings: Mapping[str, Any]) -> Retained:
    """Of each task the original's scores, and then those of each seed."""
    answers = []
    for name, (first, *others) in tasks:
        mean = [statistics.fmean(item) for item in zip(*others, strict=True)]
        answers.append(TaskAnswers(name, first, mean, group=GROUP))
    return retained(answers, **settings)[GROUP]


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


def _same_questions(original: Row, rows: Sequence[Row]) -> None:
    if not rows:
        raise StreamlineError("There is no row of a changed model; give one at least.")
    if others := sorted({row["key"] for row in rows} - {original["key"]}):
        raise StreamlineError(
            f"The original's row was made with the key {original['key']}, others with {', '.join(others)}: they were "
            "not asked the same. Score them again."
        )
