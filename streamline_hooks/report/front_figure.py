"""Quality against size and against measured speed, for several compressions of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from streamline_hooks.report.drawing import Drawing, Style, fitted
from streamline_hooks.report.values import finite, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_QUALITY = "perplexity_ratio"
_ORIGINAL = (1.0, 1.0)  # size or time, and perplexity
_PANELS = {  # what the front is by, what it is set against, title, and unit
    "size": ("parameters_ratio", "Size", "parameters kept (factor)"),
    "prefill": ("prefill_ratio", "First token", "time to it (factor)"),
    "decode": ("decode_ratio", "Further tokens", "time of each (factor)"),
}
_SHAPES = "osD^vPX"
_OTHER = ("other kinds", "*")
# Of a name beside its point, in points.
_PLACES = ((7, 5), (-7, -11), (7, -11), (-7, 5), (0, 9), (0, -16), (12, 0), (-12, 0))
_MARK = 4.5  # half of a mark, in points
_UNEVEN = 12  # times the smallest value, from which on an axis is logarithmic

Point = Mapping[str, Any]


def sweep_front(sweep: Mapping[str, Any]) -> Drawing | None:
    """The perplexity ratio against the share of parameters, and against time where it was measured.

    Parameters
    ----------
    sweep : mapping
        `Sweep.report`.

    Returns
    -------
    Drawing or None
        None where no point has a quality and a size.
    """
    points = list(sweep.get("points") or ())
    known = {by: found for by, (against, *_) in _PANELS.items() if (found := _known(points, against))}
    if not known:
        return None
    fronts = {by: _front(found, by) for by, found in known.items()}

    def draw(style: Style) -> Figure:
        count = len(known)
        figure = style.figure((300 * count if style.narrow else 420) + 40)
        grid = figure.subplots(*((count, 1) if style.narrow else (1, count)), squeeze=False, sharey=not style.narrow)
        keys: dict[str, Any] = {}
        for axes, by in zip(grid.flat, known, strict=True):
            keys |= _panel(axes, points, by, style)
        for axes in grid.flat if style.narrow else grid.flat[:1]:
            axes.set_ylabel("perplexity ratio" + (", log scale" if axes.get_yscale() == "log" else ""))
        figure.legend(keys.values(), keys.keys(), loc="outside upper left", ncols=2 if style.narrow else 5)
        figure.draw_without_rendering()
        for axes, by in zip(grid.flat, known, strict=True):
            _name(axes, known[by], fronts[by], _PANELS[by][0], _MARK * figure.dpi / 72)
        return figure

    told = ", ".join(f"{p.get('name')} ({number(p[_QUALITY])})" for p in next(iter(fronts.values())))
    return Drawing(
        "front",
        "Quality against size and speed",
        f"Points of {len(points)} compressions: perplexity ratio by size and time. On the front: {told or 'none'}.",
        "The original is at 1, 1. Down is better, left is smaller or faster. The line joins what no other beats in "
        "both; full marks are on it.",
        draw,
    )


def _known(points: Sequence[Point], against: str) -> list[Point]:
    """The points that have a quality and what it is set against."""
    return [p for p in points if finite(p.get(against)) is not None and finite(p.get(_QUALITY)) is not None]


def _front(points: Sequence[Point], by: str) -> list[Point]:
    """Those that are on a front, cheapest first."""
    against = _PANELS[by][0]
    return sorted((p for p in points if by in (p.get("front") or ())), key=lambda p: (p[against], p[_QUALITY]))


def _corners(best: Sequence[Point], known: Sequence[Point], against: str) -> list[tuple[float, float]]:
    """Return what the line joins: the points on the front, if any, and the original unless a known point beats it."""
    if not best:
        return []
    values = [(p[against], p[_QUALITY]) for p in known]
    beaten = any(value != _ORIGINAL and value[0] <= 1 and value[1] <= 1 for value in values)
    corners = [(p[against], p[_QUALITY]) for p in best]
    return sorted([*corners, *([] if beaten else [_ORIGINAL])])


def _panel(axes: Axes, points: Sequence[Point], by: str, style: Style) -> dict[str, Any]:
    """Draw one panel; give back its keys."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    against, title, unit = _PANELS[by]
    colours, known = style.palette, _known(points, against)
    best = _front(known, by)
    corners = _corners(best, known, against)
    axes.plot([x for x, _ in corners], [y for _, y in corners], color=colours.after, lw=1.2, zorder=1.5)
    axes.plot(*_ORIGINAL, "+", color=colours.ink, ms=9, mew=1.6)
    keys = {"original": Line2D([], [], linestyle="", marker="+", color=colours.ink, ms=8, mew=1.6)}
    shapes = _shapes(points)
    for kind, shape in shapes.items():
        keys[fitted(kind, 110)] = Line2D([], [], linestyle="", marker=shape, color=colours.after, ms=6)
    for point in known:
        on, shape = point in best, shapes.get(str(point.get("kind")), _OTHER[1])
        axes.plot(
            point[against], point[_QUALITY], shape, color=colours.after if on else colours.before,
            mfc=colours.after if on else colours.surface, ms=6, mew=1.3, zorder=3 if on else 2,
        )  # fmt: skip
    values = [1.0, *(p[_QUALITY] for p in points if finite(p.get(_QUALITY)) is not None)]
    if min(values) > 0 and max(values) > _UNEVEN * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.margins(0.14)
    axes.grid()
    return keys


def _shapes(points: Sequence[Point]) -> dict[str, str]:
    """A shape a kind, and one for all kinds for which there is none left."""
    kinds = list(dict.fromkeys(str(point.get("kind")) for point in points))
    return dict(zip(kinds, _SHAPES, strict=False)) | (dict([_OTHER]) if len(kinds) > len(_SHAPES) else {})


def _name(axes: Axes, known: Sequence[Point], best: Sequence[Point], against: str, mark: float) -> None:
    """Write the names of the front's points where they cover no point, line or name; else leave them out."""
    inside = axes.get_window_extent()
    dots = axes.transData.transform([_ORIGINAL, *((p[against], p[_QUALITY]) for p in known)])
    corners = axes.transData.transform(_corners(best, known, against) or [_ORIGINAL])
    line = [here + (there - here) * k / 60 for here, there in pairwise(corners) for k in range(60)]
    placed: list[Any] = []
    for point in best:
        said = fitted(point.get("name"), 120)
        for right, up in _PLACES:
            name: Annotation = axes.annotate(
                said, (point[against], point[_QUALITY]), (right, up),
                textcoords="offset points", ha="left" if right > 0 else "right" if right < 0 else "center",
            )  # fmt: skip
            name.set_in_layout(False)
            box = name.get_window_extent()
            marks = box.padded(mark)
            free = not any(marks.contains(x, y) for x, y in dots) and not any(box.contains(x, y) for x, y in line)
            free = free and not any(box.overlaps(other) for other in placed)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                placed.append(box)
                break
            name.remove()
