"""What is drawn, where: no text may leave the figure, or cover another text or a mark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from streamline_hooks.report.drawing import Drawing, Style

LEAST_POINTS = 8.0  # 10.7 CSS pixels, at the width that it is drawn for


@contextmanager
def drawn(drawing: Drawing, style: Style) -> Iterator[Any]:
    """The figure of a drawing, in its style."""
    with style.active():
        yield drawing.draw(style)


def faults(figure: Any) -> list[str]:
    """What is wrong with where things are, in words."""
    texts = _texts_that_are_drawn(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    found = [f"{t.get_text()!r} is too small" for t in texts if t.get_fontsize() < LEAST_POINTS]
    outside = figure.bbox.padded(1)
    for name, box in boxes:
        if not (outside.contains(box.x0, box.y0) and outside.contains(box.x1, box.y1)):
            found.append(f"{name!r} leaves the figure")
    for k, (name, box) in enumerate(boxes):
        for other, its in boxes[k + 1 :]:
            if _inner(box).overlaps(_inner(its)):
                found.append(f"{name!r} and {other!r} overlap")
        found += [f"{name!r} covers {what}" for what, its in _marks(figure) if _inner(box).overlaps(its)]
    return found


def _inner(box: Bbox) -> Bbox:
    """A text's box without the room that its font leaves."""
    return box.padded(-1.0)


def _texts_that_are_drawn(figure: Any) -> list[Text]:
    """A tick beyond its axis has a label that is never drawn; so look at what is."""
    found: list[Text] = []
    draw = Text.draw

    def watched(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append(self)
        draw(self, renderer, *args, **kwargs)

    Text.draw = watched  # type: ignore[method-assign]
    try:
        FigureCanvasAgg(figure).draw()
    finally:
        Text.draw = draw  # type: ignore[method-assign]
    return list({id(text): text for text in found}.values())


def _marks(figure: Any) -> Iterator[tuple[str, Bbox]]:
    scale = figure.dpi / 72
    for axes in figure.axes:
        for line in axes.lines:
            if isinstance(line, Line2D) and line.get_marker() not in ("None", None, ""):
                half = 0.4 * line.get_markersize() * scale
                for x, y in line.get_transform().transform(line.get_xydata()):
                    yield "a mark", Bbox.from_extents(x - half, y - half, x + half, y + half)
        for patch in axes.patches:
            if isinstance(patch, Rectangle) and patch.get_fill():
                yield "a bar", patch.get_window_extent().padded(-1)
