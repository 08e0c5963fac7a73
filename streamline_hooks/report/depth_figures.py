"""What the blocks do, by depth: how alike the states are, and how much each block changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamline_hooks.report.drawing import Drawing, Style, fitted
from streamline_hooks.report.values import gone, in_words, number, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = NDArray[np.float64]
_MAPS = {
    "cosine": ("Mean cosine", "mean cosine (1: the same direction)", "viridis"),
    "angular_distance": ("Mean angular distance", "mean angular distance (1: half a turn)", "viridis_r"),
}
_MARKS = {
    "attention": ("v", 1.035, "attention silenced"),
    "mlp": ("^", 1.09, "MLP silenced"),
}  # shape, height (of the axes)
_UNEVEN = 25  # times the median, from which on a linear axis would hide most bars


def similarity(compression: Mapping[str, Any]) -> Drawing | None:
    """The cosine and the angular distance of the states at every two places, with what was chosen drawn on them.

    Parameters
    ----------
    compression : mapping
        `CompressionResult.report`. Place k is where the state enters block k; the last is where it leaves the stack.

    Returns
    -------
    Drawing or None
        None where nothing was measured.
    """
    maps = {name: found for name in _MAPS if (found := _matrix(compression, name)) is not None}
    if not maps:
        return None
    windows, places = gone(compression), len(next(iter(maps.values())))
    left_out = _left_out(compression, places)

    def draw(style: Style) -> Figure:
        count = len(maps)
        figure = style.figure(326 * count + 40 if style.narrow else 500)
        grid = figure.subplots(*((count, 1) if style.narrow else (1, count)), squeeze=False)
        for axes, (name, matrix) in zip(grid.flat, maps.items(), strict=True):
            _heat_map(axes, name, matrix, windows, f" ({places - 1}: the end)" if left_out == 0 else "", style)
        if windows:
            figure.legend(
                handles=_keys_of_the_map(windows, style), loc="outside upper left", ncols=1 + (not style.narrow)
            )
        return figure

    inside = [f"{in_words([w])}: {number(_at(maps, w), 3)}" for w in windows if _at(maps, w) is not None]
    outlined = f" Outlined: the blocks that went ({in_words(windows)})." if windows else ""
    compared = f" The dot is the comparison of what enters with what leaves them; cosine {', '.join(inside)}."
    return Drawing(
        "similarity",
        "Similarity of the hidden states",
        f"Heat map of how alike the hidden states are at {places} places of the stack.{outlined}{_told(left_out)}",
        "Each cell compares the states at two places of the stack, averaged over tokens. Bright is alike, in both."
        + outlined
        + (compared if inside else "")
        + _told(left_out),
        draw,
    )


def influence(compression: Mapping[str, Any]) -> Drawing | None:
    """How much each block changes the state: 1 − the cosine of what enters and what leaves it.

    Block influence as in ShortGPT (Men et al., arXiv 2403.03853, eq. 1).

    Parameters
    ----------
    compression : mapping
        `CompressionResult.report`.

    Returns
    -------
    Drawing or None
        None where no cosine was measured.
    """
    cosine = _matrix(compression, "cosine")
    if cosine is None or len(cosine) < 2:
        return None
    values = 1.0 - np.diagonal(cosine, offset=1)
    removed = {k for start, stop in gone(compression) for k in range(start, stop)}
    silenced = silent(compression)
    known = values[np.isfinite(values)]
    uneven = bool(known.size and known.min() > 0 and known.max() > _UNEVEN * np.median(known))

    def draw(style: Style) -> Figure:
        figure = style.figure(300 if style.narrow else 340)
        axes = figure.subplots()
        colours, keys = style.palette, list[Any]()
        for name, colour, hatch in (("stays", colours.after, ""), ("removed", colours.gone, "////")):
            here = [k for k in range(len(values)) if (k in removed) == (name == "removed") and np.isfinite(values[k])]
            if here:
                keys.append(axes.bar(here, values[here], 0.8, color=colour, hatch=hatch, linewidth=0, label=name))
        for branch, (shape, height, said) in _MARKS.items():
            here = [k for k, which in silenced if which == branch]
            if here:
                keys += axes.plot(
                    here, [height] * len(here), shape, color=colours.gone, ms=5 if style.narrow else 6, clip_on=False,
                    transform=axes.get_xaxis_transform(), label=said,
                )  # fmt: skip
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.set_yscale("log" if uneven else "linear")
        axes.set_xlabel("block (numbered as before)")
        axes.set_ylabel("1 − cosine" + (" (log scale)" if uneven else ""))
        _whole_numbers(axes, ("x",))
        axes.grid(axis="y")
        figure.legend(handles=keys, loc="outside upper left", ncols=2 if style.narrow else 4)
        return figure

    largest = int(np.nanargmax(values)) if known.size else None
    said = "" if largest is None else f" Block {largest} changes it most ({number(values[largest], 3)})."
    given_up = in_words(gone(compression), silenced)
    told = _told(_left_out(compression, len(cosine)))
    return None if largest is None else Drawing(
        "influence",
        "Block influence by depth",
        f"Bars of the influence of {len(values)} blocks.{said} Given up: {given_up}.{told}",
        "How much each block turns the state: 1 − the mean cosine of what enters and what leaves it (no unit)."
        + said
        + told,
        draw,
    )  # fmt: skip


def _matrix(compression: Mapping[str, Any], name: str) -> Matrix | None:
    """One of the similarity's matrices; None where it is missing or has no number."""
    said = (compression.get("similarity") or {}).get(name)
    if not said:
        return None
    matrix = np.array(said, dtype=np.float64)
    return np.where(np.isfinite(matrix), matrix, np.nan) if np.isfinite(matrix).any() else None


def _left_out(compression: Mapping[str, Any], places: int) -> int | None:
    """How many of the last blocks the pass did not run, since they were to stay; None where the plan is missing."""
    length = (compression.get("plan") or {}).get("old_length")
    return None if length is None else int(length) + 1 - places


def _told(left_out: int | None) -> str:
    if not left_out:
        return ""
    which, were = ("block", "was") if left_out == 1 else (f"{left_out} blocks", "were")
    return f" The last {which} {were} to stay and {were} not measured."


def _at(maps: Mapping[str, Matrix], window: Sequence[int]) -> float | None:
    """The cosine over a window."""
    return float(maps["cosine"][window[0], window[1]]) if "cosine" in maps else None


def _heat_map(
    axes: Axes, name: str, matrix: Matrix, windows: Sequence[tuple[int, int]], end: str, style: Style
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    title, unit, colours = _MAPS[name]
    scale = colormaps[colours].with_extremes(bad=style.palette.line)
    image = axes.imshow(matrix, cmap=scale, interpolation="none", origin="upper", aspect="auto")
    colour_bar = axes.figure.colorbar(image, ax=axes, label=unit, fraction=0.05, pad=0.02, aspect=30)
    colour_bar.outline.set_visible(False)  # type: ignore[operator]
    edge = [withStroke(linewidth=3.2, foreground="#000000")]
    for start, stop in windows:
        outline = Rectangle(
            (start - 0.5, start - 0.5), stop - start + 1, stop - start + 1, fill=False, edgecolor="#ffffff",
            linewidth=1.6, path_effects=edge, gid=f"window-{name}-{start}-{stop}",
        )  # fmt: skip
        axes.add_patch(outline)
        axes.plot(stop, start, "o", color="#ffffff", ms=4, mec="#000000", mew=0.8)
    axes.set_title(title)
    axes.set_xlabel(f"state entering block{end}")
    axes.set_ylabel("state entering block")
    _whole_numbers(axes, ("x", "y"))
    axes.spines[:].set_visible(False)


def _keys_of_the_map(windows: Sequence[tuple[int, int]], style: Style) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points = 250 if style.narrow else 500
    said = f"removed: {in_words(windows)}"
    if fitted(said, points).endswith("…"):
        said = f"removed: {sum(stop - start for start, stop in windows)} blocks in {len(windows)} windows"
    ink = style.palette.ink
    dot = Line2D(
        [],
        [],
        linestyle="",
        marker="o",
        color=style.palette.surface,
        ms=4,
        mec=ink,
        label="what enters with what leaves",
    )
    return [Patch(facecolor="none", edgecolor=ink, linewidth=1.4, label=said), dot]


def _whole_numbers(axes: Axes, which: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in which:
        getattr(axes, f"{name}axis").set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
