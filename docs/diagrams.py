"""Draw the diagrams of docs/concepts.md: python docs/diagrams.py."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / "images"
STAYS, REMOVED, NEW, LINE = "#dbe7f5", "#f3d9d6", "#d8efd9", "#33475b"


class Drawing:
    """Boxes, arrows and words in one SVG picture."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            f'font-family="sans-serif" font-size="13"><title>{escape(title)}</title>'
            f'<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        ]

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        words: str,
        fill: str = STAYS,
        dashed: bool = False,
    ) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{LINE}"{dash}/>'
        )
        lines = words.split("\n")
        for number, line in enumerate(lines):
            self.words(
                x + w / 2, y + h / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2), line
            )

    def words(
        self, x: float, y: float, text: str, anchor: str = "middle", color: str = LINE
    ) -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<path d="M{x1},{y1} L{x2},{y2}" stroke="{LINE}" fill="none" marker-end="url(#tip)"/>'
        )

    def bracket(self, x1: float, x2: float, y: float, text: str) -> None:
        self.parts.append(
            f'<path d="M{x1},{y - 6} V{y} H{x2} V{y - 6}" stroke="{LINE}" fill="none"/>'
        )
        self.words((x1 + x2) / 2, y + 16, text)

    def save(self, name: str) -> None:
        (FOLDER / f"{name}.svg").write_text("".join(self.parts) + "</svg>\n")


def row(
    drawing: Drawing,
    words: list[tuple[str, str]],
    y: float = 40,
    x: float = 20,
    w: float = 74,
) -> list[float]:
    """Draw boxes from left to right with arrows between them, and return their left edges."""
    edges = [x + k * (w + 22) for k in range(len(words))]
    for k, (text, fill) in enumerate(words):
        drawing.box(edges[k], y, w, 44, text, fill, dashed=fill == REMOVED)
        if k:
            drawing.arrow(edges[k] - 22, y + 22, edges[k] - 2, y + 22)
    return edges


def stack() -> None:
    drawing = Drawing(
        700, 130, "A stack of blocks between the embeddings and the final norm"
    )
    blocks = [
        ("embed", "#eeeeee"),
        *((f"block {k}", STAYS) for k in range(5)),
        ("norm,\nLM head", "#eeeeee"),
    ]
    edges = row(drawing, blocks)
    drawing.bracket(edges[1], edges[5] + 74, 100, "stack: model.layers, 5 blocks")
    drawing.save("stack")


def window() -> None:
    drawing = Drawing(
        700,
        150,
        "Boundaries are numbered from 0 to L, a window is a half-open range of blocks",
    )
    blocks = [(f"block {k}", REMOVED if k in (2, 3) else STAYS) for k in range(6)]
    edges = row(drawing, blocks, x=50)
    for k in range(7):
        drawing.words(50 + k * 96 - 11, 28, str(k))
    drawing.bracket(
        edges[2],
        edges[3] + 74,
        100,
        "window range(2, 4): from boundary 2 to boundary 4",
    )
    drawing.save("window")


def profile() -> None:
    drawing = Drawing(
        520, 306, "A profile compares the hidden states at every two boundaries"
    )
    size, length = 34, 6
    for a in range(length + 1):
        drawing.words(86, 57 + a * size, str(a))
        drawing.words(117 + a * size, 30, str(a))
        for b in range(length + 1):
            shade = 255 - int(150 * max(0.0, 1 - abs(a - b) / 5))
            drawing.parts.append(
                f'<rect x="{100 + b * size}" y="{36 + a * size}" width="{size - 2}" height="{size - 2}" '
                f'fill="rgb({shade},{shade},240)"/>'
            )
    drawing.parts.append(f'<rect x="{100 + 4 * size}" y="{36 + 2 * size}" width="{size - 2}" height="{size - 2}" '
                         f'fill="none" stroke="#b3261e" stroke-width="2"/>')  # fmt: skip
    drawing.words(350, 126, "row 2, column 4:", anchor="start", color="#b3261e")
    drawing.words(350, 144, "window range(2, 4)", anchor="start", color="#b3261e")
    drawing.words(219, 294, "mean cosine of the states at two boundaries")
    drawing.save("profile")


def repair() -> None:
    drawing = Drawing(
        680,
        180,
        "A repair maps the state that enters the window to the state that leaves it",
    )
    drawing.box(20, 30, 90, 44, "state h in\n(boundary 2)", "#eeeeee")
    drawing.box(180, 20, 90, 64, "blocks 2, 3", REMOVED, dashed=True)
    drawing.box(340, 30, 100, 44, "state h out\n(boundary 4)", "#eeeeee")
    drawing.arrow(110, 52, 178, 52)
    drawing.arrow(270, 52, 338, 52)
    drawing.box(180, 120, 90, 44, "h + hW", NEW)
    drawing.arrow(80, 76, 178, 140)
    drawing.arrow(270, 140, 360, 78)
    drawing.words(460, 48, "least squares: W minimizes", anchor="start")
    drawing.words(460, 66, "the error at boundary 4", anchor="start")
    drawing.save("repair")


def distillation() -> None:
    drawing = Drawing(640, 210, "The teacher's outputs train the replacement")
    drawing.box(20, 80, 76, 44, "blocks\n0, 1", STAYS)
    drawing.box(160, 30, 90, 44, "blocks 2, 3", REMOVED, dashed=True)
    drawing.box(160, 130, 90, 44, "replacement", NEW)
    drawing.arrow(96, 96, 158, 56)
    drawing.arrow(96, 108, 158, 148)
    for y in (30, 130):
        drawing.box(300, y, 90, 44, "blocks 4, 5", STAYS)
        drawing.arrow(250, y + 22, 298, y + 22)
        drawing.box(
            440,
            y,
            90,
            44,
            "teacher\nlogits" if y == 30 else "student\nlogits",
            "#eeeeee",
        )
        drawing.arrow(390, y + 22, 438, y + 22)
    drawing.words(560, 106, "KL", anchor="start")
    drawing.arrow(530, 56, 562, 92)
    drawing.arrow(530, 150, 562, 114)
    drawing.words(
        20,
        200,
        "Blocks 0 and 1 run once for both. Only the replacement (and healed blocks) learn.",
        anchor="start",
    )
    drawing.save("distillation")


def splice() -> None:
    drawing = Drawing(640, 170, "A splice is a submodule of the block after the window")
    row(drawing, [("block 0", STAYS), ("block 1", STAYS)], y=60)
    drawing.parts.append(f'<rect x="234" y="26" width="236" height="104" rx="6" fill="none" stroke="{LINE}" '
                         'stroke-dasharray="2 3"/>')  # fmt: skip
    drawing.words(352, 46, "new block 2 (old block 4)")
    drawing.box(252, 60, 84, 44, "splice\nh + hW", NEW)
    drawing.box(372, 60, 84, 44, "attention,\nMLP", STAYS)
    drawing.arrow(190, 82, 250, 82)
    drawing.arrow(336, 82, 370, 82)
    drawing.box(510, 60, 74, 44, "block 3", STAYS)
    drawing.arrow(456, 82, 508, 82)
    drawing.words(
        20,
        156,
        "A forward pre-hook runs the splice, so that it needs no block of its own.",
        anchor="start",
    )
    drawing.save("splice")


def cache_slot() -> None:
    drawing = Drawing(700, 220, "Every block keeps one slot of the key-value cache")
    drawing.words(20, 28, "before", anchor="start")
    row(
        drawing,
        [(f"block {k}", REMOVED if k in (2, 3) else STAYS) for k in range(6)],
        y=38,
        x=60,
    )
    for k in range(6):
        drawing.words(97 + k * 96, 100, f"slot {k}")
    drawing.words(20, 138, "after", anchor="start")
    edges = row(
        drawing,
        [
            ("block 0", STAYS),
            ("block 1", STAYS),
            ("block 2", STAYS),
            ("block 3", STAYS),
        ],
        y=148,
        x=60,
    )
    for k, edge in enumerate(edges):
        drawing.words(edge + 37, 210, f"slot {k}")
    drawing.words(470, 166, "old blocks 4 and 5 take", anchor="start")
    drawing.words(470, 184, "slots 2 and 3", anchor="start")
    drawing.save("cache_slot")


if __name__ == "__main__":
    for draw in (stack, window, profile, repair, distillation, splice, cache_slot):
        draw()
