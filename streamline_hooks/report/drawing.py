"""How figures are drawn: light or dark, wide or narrow, as SVG or PNG; matplotlib's own state stays as it is."""

from __future__ import annotations

import base64
import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.report.palette import DARK, LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 1040, 358  # CSS pixels; the narrow one is what a phone of 390 has between its margins
BREAK = 960  # CSS pixels of the window below which the narrow one is shown
_POINTS = 0.75  # a CSS pixel
_EXTRA = (
    'Figures are drawn by matplotlib, which is not installed. Install it with pip install "streamline_hooks[report]".'
)
# What belongs to the process and not to a figure.
_OF_THE_PROCESS = ("backend", "backend_fallback", "interactive", "timezone", "toolbar")


@dataclass(frozen=True)
class Style:
    """What a figure is drawn for.

    Attributes
    ----------
    palette : Palette
    narrow : bool
        For a phone.
    """

    palette: Palette = LIGHT
    narrow: bool = False

    def figure(self, height: float) -> Figure:
        """Make an empty figure of the style's width.

        Parameters
        ----------
        height : float
            In CSS pixels.
        """
        from matplotlib.figure import Figure

        width = NARROW if self.narrow else WIDE
        return Figure(figsize=(width * _POINTS / 72, height * _POINTS / 72), layout="constrained")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make matplotlib draw in this style, whatever its own settings are, and give those back at the end.

        Raises
        ------
        StreamlineError
            If matplotlib is not installed.
        """
        try:
            import matplotlib
        except ImportError as error:
            raise StreamlineError(_EXTRA) from error
        settings: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if k not in _OF_THE_PROCESS}
        settings |= self._settings()
        with matplotlib.rc_context(settings):
            yield

    def _settings(self) -> dict[str, Any]:
        colours, size = self.palette, 8.0 if self.narrow else 9.0
        return {
            "svg.fonttype": "path",
            "svg.hashsalt": "streamline_hooks",
            "font.size": size,
            "axes.titlesize": size + 1,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": size,
            "xtick.labelsize": size,
            "ytick.labelsize": size,
            "legend.fontsize": size,
            "legend.frameon": False,
            "legend.handlelength": 1.5,
            "figure.facecolor": colours.surface,
            "axes.facecolor": colours.surface,
            "savefig.facecolor": colours.surface,
            "text.color": colours.ink,
            "axes.labelcolor": colours.ink,
            "axes.edgecolor": colours.muted,
            "xtick.color": colours.muted,
            "ytick.color": colours.muted,
            "xtick.labelcolor": colours.ink,
            "ytick.labelcolor": colours.ink,
            "grid.color": colours.line,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.unicode_minus": True,
            "hatch.linewidth": 0.8,
            "hatch.color": colours.surface,
        }


STYLES = {
    "light-wide": Style(LIGHT, narrow=False),
    "light-narrow": Style(LIGHT, narrow=True),
    "dark-wide": Style(DARK, narrow=False),
    "dark-narrow": Style(DARK, narrow=True),
}
FILE = "light-wide"  # the style of what is written to files of its own, and of a reader that knows no other


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in any style.

    Attributes
    ----------
    name : str
        Of its files, without an ending.
    title : str
    alt : str
        What it shows, for who cannot see it.
    caption : str
        How to read it.
    draw : callable
        Makes the figure, given a style that is active.
    """

    name: str
    title: str
    alt: str
    caption: str
    draw: Callable[[Style], Figure]

    @cached_property
    def svgs(self) -> dict[str, bytes]:
        """As SVG, by the name of the style: the same bytes every time."""
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        return {name: self.render(style, "svg", metadata=none) for name, style in STYLES.items()}

    @property
    def svg(self) -> bytes:
        """For a file: light and wide."""
        return self.svgs[FILE]

    @property
    def png(self) -> bytes:
        """For a file: light and wide, two of its pixels a CSS pixel."""
        return self.render(STYLES[FILE], "png", metadata={"Software": None}, dpi=2 * 72 / _POINTS)

    def html(self) -> str:
        """Draw it in every style, as a ``<figure>`` that holds its pictures and shows the one that fits."""
        sources = []
        for name, style in STYLES.items():
            shape = f"(max-width: {BREAK - 1}px)" if style.narrow else f"(min-width: {BREAK}px)"
            scheme = f"(prefers-color-scheme: {name.split('-')[0]})"
            data = base64.b64encode(self.svgs[name]).decode()
            sources.append((f"{shape} and {scheme}", f"data:image/svg+xml;base64,{data}"))
        fallback = sources.pop(list(STYLES).index(FILE))[1]
        lines = [f'<source media="{media}" srcset="{data}">' for media, data in sources]
        return "\n".join(
            [
                f'<figure id="figure-{self.name}">',
                "<picture>",
                *lines,
                f'<img src="{fallback}" alt="{escape(self.alt)}">',
                "</picture>",
                f"<figcaption><strong>{escape(self.title)}.</strong> {escape(self.caption)}</figcaption>",
                "</figure>",
            ]
        )

    def render(self, style: Style, kind: str, **options: Any) -> bytes:
        """Return the figure in a style as the bytes of a file."""
        file = io.BytesIO()
        with style.active():
            self.draw(style).savefig(file, format=kind, **options)
        return file.getvalue()


def fitted(text: Any, points: float) -> str:
    r"""Text from outside as matplotlib may draw it: one line that is not too wide, no formula, nothing unprintable.

    It is measured in the size of the style that is active.

    Parameters
    ----------
    text : object
    points : float
        What it may take, of 1/72 inch.

    Examples
    --------
    >>> with Style().active():
    ...     fitted("a\n $x$", 100), fitted("a long name", 50)
    ('a \\$x\\$', 'a long n…')
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    def fits(said: str) -> bool:
        return TextToPath().get_text_width_height_descent(said, FontProperties(), ismath=False)[0] <= points

    said = "".join(c if c.isprintable() else " " for c in str(text))
    said = re.sub(r"\s+", " ", said).strip()[:200]
    if not fits(said):
        shortened = [said[:length].rstrip() + "…" for length in range(len(said))]
        said = shortened[max(bisect_right(shortened, False, key=lambda short: not fits(short)) - 1, 0)]
    return said.replace("$", r"\$")
