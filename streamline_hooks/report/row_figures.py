"""Figures with a row for each name: candidates, perplexity, accuracy, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamline_hooks.report.drawing import Drawing, Style, fitted
from streamline_hooks.report.rows import Mark, Row, marks_figure, rows_figure
from streamline_hooks.report.values import finite, in_words, measure_of, number, percent, ratio, times
from streamline_hooks.result import LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 20  # candidates that are drawn


def candidates(compression: Mapping[str, Any]) -> Drawing | None:
    """The candidates' distance to the original, the chosen one first; None where none has one.

    Parameters
    ----------
    compression : mapping
        `CompressionResult.report`.
    """
    found = [
        (in_words(one.get("windows") or (), one.get("silenced") or ()), distance, k == 0)
        for k, one in enumerate(compression.get("candidates") or ())
        if (distance := finite(one.get("distance"))) is not None
    ]
    shown, measure = found[:_MOST], measure_of(compression)
    if not shown:
        return None

    def draw(style: Style) -> Figure:
        figure, axes = rows_figure(style, [name for name, _, _ in shown])
        largest = max(distance for _, distance, _ in shown)
        for y, (_, distance, chosen) in enumerate(shown):
            colour = style.palette.after if chosen else style.palette.before
            axes.barh(
                y, distance, 0.42 if style.narrow else 0.6, color=colour, hatch="" if chosen else "////", linewidth=0
            )
            said = f"{number(distance, 3)}, chosen" if chosen else number(distance, 3)
            axes.annotate(said, (distance, y), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, (1.35 if style.narrow else 1.12) * largest or 1.0)
        axes.set_xlabel(measure)
        return figure

    rest = f" The first {_MOST} of {len(found)}." if len(found) > _MOST else ""
    name, distance, _ = shown[0]
    return Drawing(
        "candidates",
        f"Candidates by {measure.partition(' (')[0]}",
        f"Bars of {measure} of {len(shown)} candidates. {name} has {number(distance, 3)}.",
        f"Each candidate repaired, and judged by {measure} between what it and the original say on the validation "
        f"part; lower is better.{rest}",
        draw,
    )


def steps(compression: Mapping[str, Any]) -> Drawing | None:
    """Perplexity after each step against the original's; None where one alone is known.

    Parameters
    ----------
    compression : mapping
        `CompressionResult.report`.
    """
    said = compression.get("perplexity") or {}
    original = finite(said.get("original"))
    known = {key: value for key in LABELS if key != "original" and (value := finite(said.get(key))) is not None}
    if original is None or not known:
        return None
    rows = [
        Row(LABELS[key], Mark(original), Mark(value), times(ratio(value, original))) for key, value in known.items()
    ]
    told = ", ".join(f"{LABELS[key]} {number(value)}" for key, value in known.items())
    return Drawing(
        "perplexity_by_step",
        "Perplexity by step",
        f"Perplexity of the original, {number(original)}, and of the compressed model: {told}.",
        "On text that nothing was chosen or fitted on; lower is better. × is the factor to the original.",
        lambda style: marks_figure(style, rows, "perplexity", after="after the step"),
    )


def perplexity(evaluation: Mapping[str, Any]) -> Drawing | None:
    """Perplexity by domain, before and after; None where none was measured.

    Parameters
    ----------
    evaluation : mapping
    """
    rows = [
        Row(
            name,
            None if before is None else Mark(before),
            Mark(after),
            times(ratio(after, before)) if before else number(after),
        )
        for name, before, after in _before_and_after(evaluation, "perplexity")
    ]
    if not rows:
        return None
    return Drawing(
        "perplexity",
        "Perplexity by domain",
        f"Perplexity on {len(rows)} domains: {_told(rows)}.",
        "On held-out text; lower is better."
        + (" × is the factor to the original." if any(r.before for r in rows) else ""),
        lambda style: marks_figure(style, rows, "perplexity"),
    )


def accuracy(evaluation: Mapping[str, Any]) -> Drawing | None:
    """Accuracy by task, before and after, with what guessing gives; None where none was measured.

    Parameters
    ----------
    evaluation : mapping
    """
    own, other = (_section(said, "accuracy") for said in (evaluation, evaluation.get("original") or {}))
    rows = []
    for name, _, _ in _before_and_after(evaluation, "accuracy"):
        chance = finite(own[name].get("chance"))
        rows.append(
            Row(
                name,
                _with_error(other.get(name)),
                _with_error(own[name]),
                f"{percent(own[name]['value'])} %",
                None if chance is None else 100 * chance,
            )
        )
    if not rows:
        return None
    return Drawing(
        "accuracy",
        "Accuracy by task",
        f"Accuracy in percent on {len(rows)} tasks: {_told(rows)}.",
        "Higher is better. Whiskers are one standard error; the upright stroke is what guessing gives.",
        lambda style: marks_figure(style, rows, "accuracy (%)"),
    )


def speed(evaluation: Mapping[str, Any]) -> Drawing | None:
    """Time to the first and to a further token against the first model's; None where one model alone was timed.

    Parameters
    ----------
    evaluation : mapping
    """
    ratios = (evaluation.get("speed") or {}).get("ratios") or {}
    first, *others = ratios or [""]
    phases = {"prefill": "first token", "decode": "further token"}
    rows = [
        Row(
            f"{name}, {said}" if len(others) > 1 else said.capitalize(),
            Mark(1.0),
            Mark(value, finite(spread.get("low")), finite(spread.get("high"))),
            times(value),
        )
        for name in others
        for phase, said in phases.items()
        if (value := finite((spread := ratios[name].get(phase) or {}).get("median"))) is not None
    ]
    if not rows:
        return None
    told = "; ".join(f"{row.name} {row.note}" for row in rows)
    return Drawing(
        "speed",
        f"Time compared with {first}",
        f"Time as a factor of that of {first}: {told}.",
        "The median of the ratios within a round; whiskers are their quartiles, which a load that comes and goes moves "
        "apart. Left of 1 is faster.",
        lambda style: marks_figure(
            style,
            rows,
            "time as a factor (no unit)",
            before=fitted(first, 90),
            after=fitted(others[0], 90) if len(others) == 1 else "the others",
        ),
    )


def _section(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = said.get(name) or {}
    return found


def _before_and_after(evaluation: Mapping[str, Any], section: str) -> list[tuple[str, float | None, float]]:
    """Names that have a value, that of the original, and theirs."""
    own, other = (_section(said, section) for said in (evaluation, evaluation.get("original") or {}))
    return [
        (name, finite((other.get(name) or {}).get("value")), value)
        for name, one in own.items()
        if (value := finite(one.get("value"))) is not None
    ]


def _with_error(said: Mapping[str, Any] | None) -> Mark | None:
    """An accuracy in percent, with a standard error to either side where there is one."""
    value = finite((said or {}).get("value"))
    if said is None or value is None:
        return None
    error = finite(said.get("standard_error"))
    low, high = (None, None) if error is None else (100 * (value - error), 100 * (value + error))
    return Mark(100 * value, low, high)


def _told(rows: Sequence[Row]) -> str:
    """Rows in words."""
    parts = []
    for row in rows:
        after = number(row.after.value) if row.after else ""
        parts.append(
            f"{row.name} {number(row.before.value)} before, {after} after" if row.before else f"{row.name} {after}"
        )
    return "; ".join(parts)
