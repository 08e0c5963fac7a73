"""Whether a surgeon refuses a window for a reason that it names, or because it saw something wrong without one."""

from __future__ import annotations

from torch import nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.surgery import LayerSurgeon

_CATCH_ALLS = frozenset({"probe", "cache"})


def refusal(model: nn.Module, window: range, stack: str | None) -> tuple[UnsupportedSurgery | None, bool]:
    """What a probing surgeon says against giving up a window, and whether it knows why.

    A surgeon's probe sees that the shorter model is wrong. Surgery that is itself at fault looks the same to it, so a
    refusal counts only where the cause is known: found in advance, or by a diagnosis.

    Parameters
    ----------
    model : torch.nn.Module
        It is given back as it was.
    window : range
    stack : str or None
        Path of the stack, see `find_stack`.

    Returns
    -------
    error : UnsupportedSurgery or None
        None where the window can go.
    known : bool
        Whether the cause is a known one; False for what is called ``"probe"`` or ``"cache"``.
    """
    try:
        with LayerSurgeon(model, stack) as surgeon:
            surgeon.remove(window)
    except UnsupportedSurgery as error:
        return error, error.cause not in _CATCH_ALLS
    return None, False
