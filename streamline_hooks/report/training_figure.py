"""How a training went: the distance to the original on what it was validated on, and what was minimised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_hooks.report.drawing import Drawing, Style
from streamline_hooks.report.values import Scale, finite, measure_of, number, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training(compression: Mapping[str, Any]) -> Drawing | None:
    """The distance to the original at each validation and the mean loss since the one before, by tokens trained on.

    Parameters
    ----------
    compression : mapping
        `CompressionResult.report`.

    Returns
    -------
    Drawing or None
        None where nothing was trained.
    """
    said = compression.get("training") or {}
    history = said.get("history") or []
    curves = {
        name: [(float(row["tokens"]), value) for row in history if (value := finite(row.get(name))) is not None]
        for name in ("distance", "loss")
    }
    curves = {name: points for name, points in curves.items() if points}
    if "distance" not in curves:
        return None
    best = next((row for row in history if row["step"] == said.get("best_step")), None)
    measure = measure_of(compression)
    titles = {
        "distance": ("Distance to the original, validation", measure),
        "loss": ("Training loss since the last validation", "loss (as minimised)"),
    }
    unit = said.get("unit", "token")
    tokens = Scale.of(row["tokens"] for row in history)

    def draw(style: Style) -> Figure:
        count = len(curves)
        figure = style.figure((250 * count if style.narrow else 330) + 20)
        grid = figure.subplots(*((count, 1) if style.narrow else (1, count)), squeeze=False)
        for axes, (name, points) in zip(grid.flat, curves.items(), strict=True):
            title, measured = titles[name]
            colour = style.palette.after if name == "distance" else style.palette.before
            places, values = zip(*points, strict=True)
            axes.plot([place / tokens.factor for place in places], values, "o-", color=colour, ms=3.5, lw=1.4)
            if name == "distance" and best is not None and finite(best.get("distance")) is not None:
                axes.plot(
                    best["tokens"] / tokens.factor, best["distance"], "o", mfc="none", color=style.palette.gone, ms=10,
                    mew=1.5, label=f"best: {number(best['distance'], 4)} at step {whole(best['step'])}",
                )  # fmt: skip
                axes.legend(loc="upper right")
            axes.set_title(title)
            axes.set_xlabel(f"{unit}s trained on{f' ({tokens.word}s)' if tokens.word else ''}")
            axes.set_ylabel(measured)
            axes.grid(axis="y")
        return figure

    before, after = said.get("distance_before"), said.get("distance")
    return Drawing(
        "training",
        "Training",
        f"Curve of {measure} over {len(history)} validations, from {number(before, 4)} to {number(after, 4)}.",
        f"Before the first step {measure}, to the original on the validation part, was {number(before, 4)}, and is "
        f"{number(after, 4)} with the weights that were kept.",
        draw,
    )
