"""Draw the figures of the report with Matplotlib, once per width, with colors from the CSS of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from streamline_hooks.pipeline.report_formatting import blocks_text, branches_of_report, finite, number, removed_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTHS = {"wide": 1000, "narrow": 350}  # CSS pixels; a phone has 390
# In the page, each color becomes the CSS variable of its name, which has another value in the dark scheme.
COLORS = {
    "ink": "#1c1f23", "muted": "#5c636b", "line": "#dcddd8", "surface": "#fefefe", "after": "#0064a4",
    "before": "#767d85", "removed": "#c24e00",
}  # fmt: skip
_LOG_FROM = 12  # ratio of the largest to the smallest value above which an axis is logarithmic
# Settings that are not part of a style.
_PROCESS_SETTINGS = ("backend", "backend_fallback", "interactive", "timezone", "toolbar")


@dataclass(frozen=True)
class Plot:
    """A figure: ``draw(figure, narrow)`` draws it; ``height`` is in CSS pixels for the wide and narrow form."""

    name: str
    title: str
    alt: str
    caption: str
    draw: Callable[[Figure, bool], None]
    height: tuple[int, int]

    def figure(self, narrow: bool = False) -> Figure:
        """Draw the figure; call inside `style`."""
        from matplotlib.figure import Figure

        size = (WIDTHS["narrow" if narrow else "wide"] / 96, self.height[narrow] / 96)
        figure = Figure(figsize=size, layout="constrained")
        self.draw(figure, narrow)
        return figure

    def svg(self, width: str) -> str:
        """Return the figure as a deterministic ``<svg>`` element.

        All ids are unique in the page, and colors are CSS variables.
        """
        file = io.StringIO()
        with style():
            none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure(width == "narrow").savefig(file, format="svg", metadata=none)
        text = re.sub(r"<!--.*?-->\s*", "", file.getvalue(), flags=re.DOTALL)  # comments repeat every label
        unique = f"{self.name}-{width}"
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{unique}-", text)
        text = re.sub(r' (font-family|xmlns(:xlink)?|version)="[^"]*"', "", text)
        for name, color in COLORS.items():
            text = text.replace(color, f"var(--{name})")
        opening = re.search(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", text)
        assert opening is not None
        head = (
            f'<svg viewBox="{opening[1]}" class="{width}" role="img" aria-labelledby="{unique}-title {unique}-desc">'
            f'<title id="{unique}-title">{escape(self.title)}</title><desc id="{unique}-desc">{escape(self.alt)}</desc>'
        )
        return head + text[opening.end() :].rstrip()


@contextmanager
def style() -> Iterator[None]:
    """Set the Matplotlib style of the page, and restore the user's settings at the end."""
    import matplotlib

    ink, muted, surface = (COLORS[name] for name in ("ink", "muted", "surface"))
    settings: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if k not in _PROCESS_SETTINGS} | {
        "svg.fonttype": "path", "svg.hashsalt": "streamline_hooks", "font.size": 9.0, "axes.titlesize": 10.0,
        "axes.titlelocation": "left", "axes.labelsize": 9.0, "xtick.labelsize": 9.0, "ytick.labelsize": 9.0,
        "legend.fontsize": 9.0, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
        "savefig.facecolor": "none", "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": muted,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "xtick.color": muted,
        "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink, "grid.color": COLORS["line"],
        "hatch.color": surface,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def plot_label(text: object, length: int = 40) -> str:
    r"""Return untrusted text as one line of at most `length` characters, with math escaped.

    Examples
    --------
    >>> plot_label("a\n $x$"), plot_label("a long name", 8)
    ('a \\$x\\$', 'a lo…ame')
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if len(line) > length:
        line = f"{line[: length // 2]}…{line[length // 2 + 1 - length :]}"
    return line.replace("$", r"\$")


def similarity(compression: Mapping[str, Any]) -> Plot | None:
    """Draw the mean cosine similarity of the hidden states at every two boundaries, with the removed windows.

    Boundary k is the input of block k; the last boundary is the output of the stack.
    """
    cosine = _matrix(compression)
    if cosine is None:
        return None
    windows = removed_windows(compression)
    inside = ", ".join(f"{blocks_text([w])}: {number(cosine[w], 3)}" for w in windows)
    outlined = f" The removed blocks are outlined; cosine across them {inside}." if windows else ""

    def draw(figure: Figure, narrow: bool) -> None:
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        axes = figure.subplots()
        image = axes.imshow(cosine, cmap="viridis", interpolation="none", aspect="auto")
        bar = figure.colorbar(image, ax=axes, label="mean cosine", location="bottom" if narrow else "right", aspect=30)
        bar.outline.set_visible(False)
        for start, stop in windows:
            side = stop - start + 1
            axes.add_patch(
                Rectangle(
                    (start - 0.5, start - 0.5), side, side, fill=False, edgecolor="#ffffff", linewidth=1.6,
                    path_effects=[withStroke(linewidth=3.2, foreground="#000000")], gid=f"window-{start}-{stop}",
                )
            )  # fmt: skip
        axes.set(xlabel="state entering block", ylabel="state entering block")
        axes.locator_params(integer=True)
        axes.spines[:].set_visible(False)

    return Plot(
        "similarity", "Similarity of the hidden states",
        f"Heat map of the mean cosine of the hidden states at {len(cosine)} boundaries of the stack.{outlined}",
        f"Each cell compares the states at two boundaries, averaged over tokens.{outlined}{_unmeasured(compression)}",
        draw, (480, 420),
    )  # fmt: skip


def influence(compression: Mapping[str, Any]) -> Plot | None:
    """Draw the block influence of ShortGPT (arXiv 2403.03853, eq. 1): 1 − the cosine of a block's input and output."""
    cosine = _matrix(compression)
    values = np.array([]) if cosine is None else 1.0 - np.diagonal(cosine, offset=1)
    if not np.isfinite(values).any():
        return None
    removed = {k for window in removed_windows(compression) for k in range(*window)}
    known = values[np.isfinite(values)]
    log = bool(known.min() > 0 and known.max() > 25 * np.median(known))  # one bar would hide the others

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for name, color, hatch in (("stays", "after", ""), ("removed", "removed", "////")):
            blocks = [k for k, value in enumerate(values) if (k in removed) == bool(hatch) and np.isfinite(value)]
            if blocks:
                axes.bar(blocks, values[blocks], 0.8, color=COLORS[color], hatch=hatch, linewidth=0, label=name)
        axes.set(xlabel="block (original numbering)", ylabel="1 − cosine", yscale="log" if log else "linear")
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    largest = int(np.nanargmax(values))
    most = f"Block {largest} changes it most ({number(values[largest], 3)})."
    removed_text = blocks_text(removed_windows(compression), branches_of_report(compression))
    return Plot(
        "influence", "Block influence by depth",
        f"Bars of the influence of {len(values)} blocks. {most} Removed or zeroed: {removed_text}.",
        f"How much each block rotates the state: 1 − the mean cosine of its input and output. {most}"
        + _unmeasured(compression),
        draw, (340, 300),
    )  # fmt: skip


def training(compression: Mapping[str, Any], measure: str) -> Plot | None:
    """Draw the validation distance to the original and the training loss against the number of tokens."""
    run = compression.get("training") or {}
    history = [row for row in run.get("history") or () if finite(row.get("tokens")) is not None]
    curves = {
        name: [(row["tokens"], row[name]) for row in history if finite(row.get(name)) is not None]
        for name in ("distance", "loss")
    }
    curves = {name: points for name, points in curves.items() if points}
    if "distance" not in curves:
        return None
    best: Mapping[str, Any] = next((row for row in history if row["step"] == run.get("best_step")), {})
    titles = {"distance": ("Distance to the original, validation", measure), "loss": ("Training loss", "loss")}

    def draw(figure: Figure, narrow: bool) -> None:
        from matplotlib.ticker import EngFormatter

        for axes, (name, points) in zip(_panels(figure, len(curves), narrow), curves.items(), strict=True):
            tokens, values = np.array(points, dtype=float).T
            color = COLORS["after" if name == "distance" else "before"]
            axes.plot(tokens, values, "o-", color=color, ms=3.5, lw=1.4, gid=f"training-{name}")
            if name == "distance" and finite(best.get("distance")) is not None:
                axes.plot(
                    best["tokens"], best["distance"], "o", mfc="none", color=COLORS["removed"], ms=10,
                    label=f"best: {number(best['distance'], 4)} at step {best['step']:,}",
                )  # fmt: skip
                axes.legend(loc="upper right")
            axes.set(title=titles[name][0], ylabel=titles[name][1], xlabel=f"{run.get('unit', 'token')}s")
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.grid(axis="y")

    ends = f"from {number(run.get('distance_before'), 4)} to {number(run.get('distance'), 4)}"
    return Plot(
        "training", "Training", f"Curve of {measure} over {len(history)} validations, {ends}.",
        f"{measure} between the model and the original on the validation part: {ends} (for the best weights).",
        draw, (340, 270 * len(curves)),
    )  # fmt: skip


@dataclass(frozen=True)
class PlotRow:
    """A row of `row_plot`: (value, low, high) of the original and of the model; low and high may be None."""

    name: str
    before: tuple[float, float | None, float | None] | None
    after: tuple[float, float | None, float | None] | None
    chance: float | None = None


def row_plot(name: str, title: str, entries: Sequence[PlotRow], unit: str, caption: str) -> Plot | None:
    """Draw a row per name with a diamond for the original, a dot for the model, and whiskers for intervals."""
    shown = [row for row in entries if row.after is not None]
    if not shown:
        return None
    values = [v for row in shown for mark in (row.before, row.after) for v in mark or () if v is not None]
    values += [row.chance for row in shown if row.chance is not None]
    log = min(values) > 0 and max(values) > _LOG_FROM * min(values)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.set_xscale("log" if log else "linear")
        handles: dict[str, Any] = {}
        for y, row in enumerate(shown):
            chance = None if row.chance is None else (row.chance, None, None)
            for kind, mark, shape, color, shift in (
                ("original", row.before, "D", "before", -0.12),
                ("this model", row.after, "o", "after", 0.12),
                ("chance", chance, "|", "muted", 0.0),
            ):
                if mark is None:
                    continue
                value, low, high = mark
                if low is not None and high is not None:
                    axes.plot([low, high], [y + shift] * 2, "|-", color=COLORS[color], ms=5)
                (line,) = axes.plot(
                    value, y + shift, shape, color=COLORS[color], ms=14 if shape == "|" else 6,
                    mfc=COLORS["after" if shape == "o" else "surface"], gid=f"{kind.replace(' ', '-')}-{y}",
                )  # fmt: skip
                handles.setdefault(kind, line)
        axes.set_yticks(range(len(shown)), [plot_label(row.name, 18 if narrow else 48) for row in shown])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel(unit + (", log scale" if log else ""))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        if log:
            _plain_log_ticks(axes.xaxis)
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=1 if narrow else 3)

    descriptions = [
        f"{row.name} {number(row.after[0])}" + (f" (original {number(row.before[0])})" if row.before else "")
        for row in shown
        if row.after
    ]
    height = 100 + 34 * len(shown)
    return Plot(name, title, f"{title}: {'; '.join(descriptions)}.", caption, draw, (height, height + 30))


def front(sweep: Mapping[str, Any]) -> Plot | None:
    """Draw the loss of the points of a sweep against size and, if measured, time.

    The loss is the perplexity ratio, or the distance for models without a perplexity, see `sweep_loss`. Points on the
    front are labeled with their row in the table.
    """
    loss, label, of_original = sweep_loss(sweep)
    points = [(k, p) for k, p in enumerate(sweep.get("points") or (), 1) if finite(p.get(loss)) is not None]
    panels = {
        by: known
        for by, key in FRONTS.items()
        if (known := [(k, p, p[key[0]]) for k, p in points if finite(p.get(key[0])) is not None])
    }
    if not panels:
        return None
    kinds = list(dict.fromkeys(str(p.get("kind")) for _, p in points))
    shapes = dict(zip(kinds, "osD^vPX", strict=False))  # all other kinds are stars
    ratios = [p[loss] for _, p in points]
    lowest, highest = min(of_original, *ratios), max(of_original, *ratios)
    log = lowest > 0 and highest > _LOG_FROM * lowest

    def draw(figure: Figure, narrow: bool) -> None:
        handles: dict[str, Any] = {}
        for axes, (by, known) in zip(_panels(figure, len(panels), narrow), panels.items(), strict=True):
            best = sorted((x, p[loss], k) for k, p, x in known if by in (p.get("front") or ()))
            axes.plot([x for x, *_ in best], [y for _, y, _ in best], color=COLORS["after"], lw=1.2, gid=f"front-{by}")
            handles["original"] = axes.plot(1.0, of_original, "+", color=COLORS["ink"], ms=9)[0]
            for k, p, x in known:
                kind, on = str(p.get("kind")), by in (p.get("front") or ())
                axes.plot(
                    x, p[loss], shapes.get(kind, "*"), color=COLORS["after" if on else "before"],
                    mfc=None if on else COLORS["surface"], ms=6, gid=f"point-{by}-{k}",
                )  # fmt: skip
                key = kind if kind in shapes else "other kinds"
                handles[key] = axes.plot([], [], shapes.get(kind, "*"), color=COLORS["after"])[0]
            for x, y, k in best:
                axes.annotate(str(k), (x, y), (5, 4), textcoords="offset points")
            axes.set(title=FRONTS[by][1], xlabel=FRONTS[by][2], ylabel=label)
            axes.set_yscale("log" if log else "linear")
            axes.margins(0.12)
            axes.grid()
            if log:
                _plain_log_ticks(axes.yaxis)
        keys = [plot_label(kind, 24) for kind in handles]
        figure.legend(list(handles.values()), keys, loc="outside upper left", ncols=2 if narrow else 5)

    best = [f"{p.get('name')} ({number(p[loss])})" for _, p in points if p.get("front")]
    return Plot(
        "front", "Quality against size and speed",
        f"{label[0].upper()}{label[1:]} of {len(points)} compressions by size and time. On a front: "
        f"{', '.join(best) or 'none'}.",
        f"The original is at 1, {of_original:g}. Lower is better, left is smaller or faster. Filled marks are on the "
        "front: no other point is better in both. Their numbers are those of the rows in the table.",
        draw, (420, 300 * len(panels) + 40),
    )  # fmt: skip


def sweep_loss(sweep: Mapping[str, Any]) -> tuple[str, str, float]:
    """Return the key and label of the loss of a sweep's points, and the loss of the original."""
    points = sweep.get("points") or ()
    measure = next((str(p["measure"]) for p in points if p.get("measure")), "")
    return ("distance", measure, 0.0) if measure else ("perplexity_ratio", "perplexity ratio", 1.0)


FRONTS = {  # front: key of a point, title, axis label
    "size": ("parameters_ratio", "Size", "parameters kept (ratio)"),
    "prefill": ("prefill_ratio", "First token", "time (ratio)"),
    "decode": ("decode_ratio", "Further tokens", "time of each (ratio)"),
}


def _matrix(compression: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    matrix = np.array((compression.get("similarity") or {}).get("cosine") or (), dtype=np.float64)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix if np.isfinite(matrix).any() else None


def _unmeasured(compression: Mapping[str, Any]) -> str:
    """Return a sentence about the protected last blocks, which were not measured."""
    length, matrix = (compression.get("plan") or {}).get("old_length"), _matrix(compression)
    left_out = 0 if length is None or matrix is None else length + 1 - len(matrix)
    return f" The last blocks ({left_out}) were protected and not measured." if left_out else ""


def _panels(figure: Figure, count: int, narrow: bool) -> list[Axes]:
    grid = figure.subplots(*((count, 1) if narrow else (1, count)), squeeze=False)
    return list(grid.flat)


def _plain_log_ticks(axis: Axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())
