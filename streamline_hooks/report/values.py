"""How values that come from JSON are said: numbers, shares, sizes, blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamline_hooks.selection import Selection

DASH = "–"
SPACE = "\u00a0"  # between a number and its unit or sign: no line ends there
MINUS = "−"
STEPS = {1e9: "billion", 1e6: "million", 1e3: "thousand", 1.0: ""}
SHORT = {"billion": "G", "million": "M", "thousand": "k", "": ""}


def finite(value: Any) -> float | None:
    """A value as a number; None where it is none, NaN or infinite.

    Examples
    --------
    >>> finite(2), finite(float("nan")), finite(None), finite("2")
    (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def measure_of(compression: Mapping[str, Any]) -> str:
    """What a compression's answers were compared with the original's by, with its unit.

    Examples
    --------
    >>> measure_of({"measure": "1 - cosine"})
    '1 - cosine'
    """
    return str(compression.get("measure") or "KL (nats a token)")


def ratio(value: Any, to: Any) -> float | None:
    """One number by another; None where one is missing, or the divisor is 0."""
    above, below = finite(value), finite(to)
    return finite(above / below) if above is not None and below else None


def number(value: Any, digits: int = 2) -> str:
    """A number in as many characters as a reader needs; a dash where there is none.

    Parameters
    ----------
    value : object
    digits : int
        After the point, for values below 100.

    Examples
    --------
    >>> number(11.554), number(2029), number(5e8), number(0.00031), number(-0.5), number(float("inf"))
    ('11.55', '2,029', '5.0e+08', '3.1e−04', '−0.50', '–')
    """
    known = finite(value)
    if known is None:
        return DASH
    size = abs(known)
    if size >= 1e6 or 0 < size < 0.5 * 10**-digits:
        said = f"{known:.1e}"
    elif size >= 999.95:
        said = f"{known:,.0f}"
    else:
        said = f"{known:.{min(digits, 1) if size >= 99.995 else digits}f}"
    return said.replace("-", MINUS)


def whole(value: Any) -> str:
    """A count; a dash where there is none.

    Examples
    --------
    >>> whole(41000), whole(None)
    ('41,000', '–')
    """
    known = finite(value)
    return DASH if known is None else f"{known:,.0f}".replace("-", MINUS)


def percent(value: Any, digits: int = 1) -> str:
    """A share without its sign, which stands in the head of the column; a dash where there is none.

    Examples
    --------
    >>> percent(0.7313), percent(None)
    ('73.1', '–')
    """
    known = finite(value)
    return DASH if known is None else f"{100 * known:.{digits}f}".replace("-", MINUS)


def times(factor: Any, digits: int = 2) -> str:
    """A factor; a dash where there is none.

    Examples
    --------
    >>> times(1.525).replace(SPACE, " "), times(None)
    ('× 1.52', '–')
    """
    return DASH if finite(factor) is None else f"×{SPACE}{number(factor, digits)}"


def change(before: Any, after: Any) -> str:
    """What became of a number, as a signed share of it; a dash where one is missing.

    Examples
    --------
    >>> change(134.5, 106.5).replace(SPACE, " "), change(0, 1)
    ('−20.8 %', '–')
    """
    share = ratio(after, before)
    return DASH if share is None else f"{100 * (share - 1):+.1f}{SPACE}%".replace("-", MINUS)


@dataclass(frozen=True)
class Scale:
    """What the numbers of a column are counted in.

    Attributes
    ----------
    factor : float
        Numbers are divided by it.
    word : str
        ``billion``, ``million``, ``thousand`` or nothing.
    """

    factor: float
    word: str

    @classmethod
    def of(cls, values: Iterable[Any]) -> Scale:
        """The largest in which the largest number is 1 or more.

        Examples
        --------
        >>> Scale.of([134_515_008, None, 3]), Scale.of([])
        (Scale(factor=1000000.0, word='million'), Scale(factor=1.0, word=''))
        """
        largest = max((abs(known) for known in map(finite, values) if known is not None), default=0.0)
        return next((cls(factor, word) for factor, word in STEPS.items() if largest >= factor), cls(1.0, ""))

    @property
    def short(self) -> str:
        """G, M, k or nothing."""
        return SHORT[self.word]

    def say(self, value: Any, digits: int = 1) -> str:
        """A number so counted, without the word."""
        known = finite(value)
        return DASH if known is None else f"{known / self.factor:,.{digits if self.word else 0}f}"


def in_words(windows: Sequence[Sequence[int]], silenced: Sequence[Sequence[Any]] = ()) -> str:
    """The blocks that go and the branches that are silent.

    Parameters
    ----------
    windows : sequence of (start, stop)
        Half-open.
    silenced : sequence of (block, branch)

    Examples
    --------
    >>> in_words([[2, 10], [14, 15]], [[20, "attention"]])
    '2–9, 14, attention of 20'
    """
    if not windows and not silenced:
        return "none"
    named = Selection(tuple(range(*window) for window in windows), tuple((k, branch) for k, branch in silenced))
    return str(named).replace("-", DASH)


def gone(compression: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The windows of blocks that went, half-open, in the numbering before; of several rounds, before the first."""
    chosen = _chosen(compression)
    if "windows" in chosen and not compression.get("rounds"):
        return [(int(start), int(stop)) for start, stop in chosen["windows"]]
    removed = (compression.get("plan") or {}).get("removed") or ()
    return [(w.start, w.stop) for w in Selection.of_blocks(removed).windows] if removed else []


def silent(compression: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The branches that were silenced, in the numbering before."""
    chosen = _chosen(compression)
    found = chosen["silenced"] if "silenced" in chosen else (compression.get("plan") or {}).get("silenced") or ()
    return [(int(block), str(branch)) for block, branch in found]


def _chosen(compression: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first candidate, which is the one that was carried out."""
    first: Mapping[str, Any] = next(iter(compression.get("candidates") or ()), {})
    return first
