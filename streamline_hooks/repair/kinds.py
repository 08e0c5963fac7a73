"""The kinds that can be fitted: what stands in a window's place, started at a closed-form solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.closed_form import ClosedForm
from streamline_hooks.replacements import LinearReplacement


@dataclass(frozen=True)
class Kind:
    """One kind of replacement.

    Attributes
    ----------
    start : callable
        Makes the module from a closed-form solution, or None for plain removal.
    unfitted : callable
        Makes one of the same size for a width, before anything is fitted, for what is counted and timed.
    slots : int
        The blocks of its own that it takes.
    """

    start: Callable[[ClosedForm], nn.Module | None]
    unfitted: Callable[[int], nn.Module | None]
    slots: int = 0


KINDS = {
    "none": Kind(lambda solution: None, lambda features: None),
    "linear": Kind(lambda solution: LinearReplacement.from_map(solution.map), LinearReplacement),
}


def kind_named(name: str) -> Kind:
    """The kind of a name.

    Raises
    ------
    StreamlineError
        If there is none; the text lists the known ones.
    """
    if name not in KINDS:
        raise StreamlineError(f"The kind of replacement {name!r} is unknown. Known: {', '.join(KINDS)}.")
    return KINDS[name]
