"""Format JSON values as text for the report; missing, NaN and infinite values become a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from streamline_hooks.selection import Selection

DASH, MINUS = "–", "−"
SPACE = "\u00a0"  # prevents a line break between a number and its unit


def finite(value: Any) -> float | None:
    """Return a finite number as float, or None for any other value.

    Examples
    --------
    >>> finite(2), finite(float("nan")), finite(None), finite("2")
    (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ratio(value: Any, to: Any) -> float | None:
    """Return the quotient, or None if a number is missing or the divisor is 0."""
    above, below = finite(value), finite(to)
    return finite(above / below) if above is not None and below else None


def number(value: Any, digits: int = 2) -> str:
    """Format a number; `digits` are the decimals of numbers below 100, larger numbers have fewer.

    Examples
    --------
    >>> number(11.554), number(2029), number(5e8), number(0.00031), number(-0.5), number(float("inf"))
    ('11.55', '2,029', '5.0e+08', '3.1e−04', '−0.50', '–')
    """
    size = abs(finite(value) or 0.0)
    if size >= 1e6 or 0 < size < 0.5 * 10**-digits:
        return _formatted(value, ".1e")
    digits = 0 if size >= 999.95 else min(digits, 1) if size >= 99.995 else digits
    return _formatted(value, f",.{digits}f")


def count(value: Any) -> str:
    """Format an integer, such as ``41,000``."""
    return _formatted(value, ",.0f")


def percent(value: Any, digits: int = 1) -> str:
    """Format a fraction in percent without the sign: ``0.7313`` as ``73.1``."""
    known = finite(value)
    return _formatted(None if known is None else 100 * known, f".{digits}f")


def _formatted(value: Any, form: str) -> str:
    known = finite(value)
    return DASH if known is None else format(known, form).replace("-", MINUS)


def times(factor: Any) -> str:
    """Format a factor, such as ``× 1.52``."""
    return DASH if finite(factor) is None else f"×{SPACE}{number(factor)}"


def change(before: Any, after: Any) -> str:
    """Format a relative change: from 134.5 to 106.5 as ``−20.8 %``."""
    share = ratio(after, before)
    return DASH if share is None else f"{100 * (share - 1):+.1f}{SPACE}%".replace("-", MINUS)


def interval(estimate: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Format a fraction with its interval in percent.

    Examples
    --------
    >>> interval({"value": 0.89, "low": 0.86, "high": 0.92}), interval({"value": 1}), interval(None)
    ('89.0 (86.0 to 92.0)', '100.0', '–')
    """
    low, value, high = ((estimate or {}).get(name) for name in ("low", "value", "high"))
    known = finite(low) is not None and finite(high) is not None
    return percent(value, digits) + (f" ({percent(low, digits)} to {percent(high, digits)})" if known else "")


def millions(value: Any) -> str:
    """Format a number in millions: 134,515,008 as ``134.5``."""
    return number(ratio(value, 1e6), 1)


def blocks_text(windows: Sequence[Sequence[int]], zeroed: Sequence[Sequence[Any]] = ()) -> str:
    """Format half-open windows and (block, branch) pairs.

    Examples
    --------
    >>> blocks_text([[2, 10], [14, 15]], [[20, "attention"]])
    '2–9, 14, attention of 20'
    """
    if not windows and not zeroed:
        return "none"
    selection = Selection(tuple(range(*window) for window in windows), tuple((k, branch) for k, branch in zeroed))
    return str(selection).replace("-", DASH)


def removed_windows(compression: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the removed half-open windows in the original's numbering."""
    chosen, plan = _chosen_and_plan(compression)
    if "windows" in chosen and not compression.get("rounds"):
        return [(int(start), int(stop)) for start, stop in chosen["windows"]]
    removed = plan.get("removed") or ()
    return [(w.start, w.stop) for w in Selection.of_blocks(removed).windows] if removed else []


def branches_of_report(compression: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the zeroed (block, branch) pairs in the original's numbering."""
    chosen, plan = _chosen_and_plan(compression)
    return [(int(block), str(branch)) for block, branch in chosen.get("silenced", plan.get("silenced") or ())]


def _chosen_and_plan(compression: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return next(iter(compression.get("candidates") or ()), {}), compression.get("plan") or {}
