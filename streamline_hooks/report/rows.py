"""Drawing a row for each name, with marks along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamline_hooks.report.drawing import Style, fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNEVEN = 12  # times the smallest value, from which on an axis is logarithmic
_APART = 0.13  # of a row, between two marks with whiskers
_PITCH = {True: 48, False: 36}  # CSS pixels a row, narrow or wide
_NAME, _NOTE = {True: 175, False: 210}, 66  # points that a name and a note may take


@dataclass(frozen=True)
class Mark:
    """A value, and how sure it is.

    Attributes
    ----------
    value : float
    low, high : float or None
        Ends of a whisker.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """What is drawn for one name.

    Attributes
    ----------
    name : str
    before, after : Mark or None
        Of the original and of what is compared with it.
    note : str
        Written behind the marks.
    chance : float or None
        What guessing gives.
    """

    name: str
    before: Mark | None = None
    after: Mark | None = None
    note: str = ""
    chance: float | None = None

    @property
    def values(self) -> list[float]:
        """All that must be on the axis."""
        marks = [mark for mark in (self.before, self.after) if mark is not None]
        found = [self.chance, *(v for mark in marks for v in (mark.value, mark.low, mark.high))]
        return [value for value in found if value is not None]


def rows_figure(style: Style, names: Sequence[str], notes: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """Make a figure with a row a name, from top to bottom.

    A wide one has the names at its left and the notes at its right; on a phone both stand above the row.

    Parameters
    ----------
    style : Style
    names, notes : sequence of str
    """
    figure = style.figure(76 + _PITCH[style.narrow] * len(names))
    axes = figure.subplots()
    axes.set_ylim(len(names) - 0.45, -0.75 if style.narrow else -0.55)
    said = [fitted(name, _NAME[style.narrow]) for name in names]
    if style.narrow:
        axes.set_yticks([])
        for y, name in enumerate(said):
            axes.text(0, y - 0.42, name, transform=axes.get_yaxis_transform(), va="center", weight="bold")
    else:
        axes.set_yticks(range(len(names)), said)
        axes.tick_params(axis="y", length=0)
    for y, note in enumerate(fitted(note, _NOTE) for note in notes):
        place, height, side = (1.0, y - 0.42, "right") if style.narrow else (1.01, y, "left")
        axes.text(place, height, note, transform=axes.get_yaxis_transform(), va="center", ha=side)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure, axes


def marks_figure(
    style: Style, rows: Sequence[Row], unit: str, *, before: str = "original", after: str = "this model"
) -> Figure:
    """Draw what was before and what is after of each row.

    Parameters
    ----------
    style : Style
    rows : sequence of Row
    unit : str
        Of the axis.
    before, after : str
        What the key calls the marks.
    """
    figure, axes = rows_figure(style, [row.name for row in rows], [row.note for row in rows])
    values = [value for row in rows for value in row.values]
    uneven = min(values) > 0 and max(values) > _UNEVEN * min(values)
    axes.set_xscale("log" if uneven else "linear")
    axes.set_xlabel(unit + (", log scale" if uneven else ""))
    _limits(axes, values, uneven)
    whiskers = any(mark and mark.low is not None for row in rows for mark in (row.before, row.after))
    apart = _APART if any(row.before and row.before.low is not None for row in rows) else 0.0
    keys: dict[str, Any] = {}
    for y, row in enumerate(rows):
        if row.before and row.after and not whiskers:
            axes.plot([row.before.value, row.after.value], [y, y], color=style.palette.muted, lw=1.2, zorder=1.5)
        if row.chance is not None:
            chance = axes.plot(row.chance, y, "|", color=style.palette.muted, ms=14, mew=1.5)
            keys.setdefault("chance", chance[0])
        if row.before:
            keys.setdefault(before, _mark(axes, row.before, y - apart, "D", style.palette.before, style))
        if row.after:
            keys.setdefault(after, _mark(axes, row.after, y + apart, "o", style.palette.after, style))
    if len(keys) > 1:
        order = [name for name in (before, after, "chance") if name in keys]
        figure.legend([keys[name] for name in order], order, loc="outside upper left", ncols=3, columnspacing=1.2)
    return figure


def _mark(axes: Axes, mark: Mark, y: float, shape: str, colour: str, style: Style) -> Any:
    """A mark with its whisker: full for what is after, hollow for what was before."""
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.low, mark.high], [y, y], "|-", color=colour, lw=1.4, ms=5, mew=1.2, zorder=2)
    fill = colour if shape == "o" else style.palette.surface
    return axes.plot(mark.value, y, shape, color=colour, mfc=fill, ms=6, mew=1.4, linestyle="", zorder=3)[0]


def _limits(axes: Axes, values: Sequence[float], uneven: bool) -> None:
    """Some room at either end, and ticks that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = min(values), max(values)
    if uneven:
        room = (high / low) ** 0.06
        axes.set_xlim(low / room, high * room)
        few = high / low < 1e3
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=7))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.0e}")
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
