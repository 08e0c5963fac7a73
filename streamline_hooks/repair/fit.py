"""From a closed-form solution to the module that stands in a window's place."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair.closed_form import ClosedForm
from streamline_hooks.replacements import LinearReplacement

_FITS: dict[str, Callable[[ClosedForm], nn.Module | None]] = {
    "none": lambda solution: None,
    "linear": lambda solution: LinearReplacement.from_map(solution.map),
}


def require_kind(kind: str) -> None:
    """Raise unless a kind of replacement can be fitted.

    Raises
    ------
    StreamlineError
        The text lists the known kinds.
    """
    if kind not in _FITS:
        raise StreamlineError(f"The kind of replacement {kind!r} is unknown. Known: {', '.join(_FITS)}.")


def fit(kind: str, solution: ClosedForm) -> nn.Module | None:
    """The replacement of a kind, started at a closed-form solution.

    Parameters
    ----------
    kind : {"none", "linear"}
    solution : ClosedForm

    Returns
    -------
    torch.nn.Module or None
        None for plain removal.
    """
    require_kind(kind)
    return _FITS[kind](solution)
