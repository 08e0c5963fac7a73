"""Read the short forms in which options are given on the command line."""

from __future__ import annotations

from typing import Any

from streamline_hooks.errors import StreamlineError
from streamline_hooks.selection.target import Target

_TARGETS = {name.replace("_", "-"): name for name in ("blocks", "parameters", "latency", "decode_latency")}


def parse_target(text: str) -> Target:
    """Read a target.

    Parameters
    ----------
    text : str
        ``8``, ``0.25``, ``25%``, ``parameters:0.25``, ``latency:0.8`` or ``decode-latency:0.8``.

    Raises
    ------
    StreamlineError
        If it is none of these, or out of range.
    """
    before, colon, after = text.strip().rpartition(":")
    unit, number = (before.strip() if colon else "blocks"), after.strip()
    try:
        name = _TARGETS[unit]
        amount: int | float
        if number.endswith("%"):
            amount = float(number[:-1]) / 100
        else:
            amount = int(number) if number.lstrip("+-").isdigit() else float(number)
    except (KeyError, ValueError):
        raise StreamlineError(
            f"The target {text!r} is unknown. Expected a number of blocks (8), a fraction of them (0.25 or 25%), "
            "parameters:0.25 to remove that fraction of the model's parameters, or latency:0.8 or decode-latency:0.8 "
            "for at most that fraction of its time to the first, or to each further, token. Give one of these."
        ) from None
    given: dict[str, Any] = {name: amount}
    return Target.of(amount) if name == "blocks" else Target(**given)
