"""The colours of the page and of its figures, for light and for dark."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Palette:
    """Colours as ``#rrggbb``.

    The three that carry meaning are told apart with every common colour blindness (after Okabe and Ito's set), and
    never by colour alone: what is drawn in them differs in shape too.

    Attributes
    ----------
    page, surface : str
        Behind everything, and behind tables and figures.
    ink, muted, line : str
        Text, text that matters less, and rules.
    after : str
        The compressed model, and blocks that stay.
    before : str
        The original.
    gone : str
        What was removed.
    """

    page: str
    surface: str
    ink: str
    muted: str
    line: str
    after: str
    before: str
    gone: str

    def css(self) -> str:
        """As declarations of CSS variables."""
        return " ".join(f"--{name}: {colour};" for name, colour in asdict(self).items())


LIGHT = Palette(
    page="#f6f6f3",
    surface="#ffffff",
    ink="#1c1f23",
    muted="#5c636b",
    line="#dcddd8",
    after="#0064a4",
    before="#767d85",
    gone="#c24e00",
)
DARK = Palette(
    page="#14171a",
    surface="#1c2024",
    ink="#e8eaec",
    muted="#a0a8b0",
    line="#353b42",
    after="#5ab4f0",
    before="#99a1a9",
    gone="#f5924a",
)
