"""What stands in a window's place, from the window's moments: made, kept in a file, and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.repair import Repair, ReplacementConfig, StandIn, solve
from streamline_hooks.repair.fitting import holds_map
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.statistics.storage import read_file, write_file
from streamline_hooks.surgery.placement import move_beside


def require_map_kind(stack: BlockStack, kind: ReplacementConfig, window: range) -> None:
    """Raise unless a kind starts at the least-squares map of a window's moments, or is nothing at all.

    Raises
    ------
    UnsupportedSurgery
        The text names the kind.
    """
    with torch.device("meta"):
        simple = not kind.slots and kind.fit is None and kind.is_solved and holds_map(kind.make(stack, window))
    if not simple:
        raise UnsupportedSurgery(
            f"The kind {kind.name!r} does not start at the least-squares map of the states before and after a window, "
            "and nothing else is fitted block by block. Take none, linear, mlp or swiglu (without linear=false), or "
            "load the model into memory."
        )


def solve_window(
    stack: BlockStack, kind: ReplacementConfig, window: range, fit: WindowMoments, held_out: WindowMoments
) -> Repair:
    """Make what stands in a window's place and start it, as `fit_windows` does.

    Parameters
    ----------
    stack : BlockStack
    kind : ReplacementConfig
        One that `require_map_kind` lets pass.
    window : range
    fit, held_out : WindowMoments
        To fit on, and to choose the ridge by.
    """
    stand_in = _built(stack, kind, window)
    solution = solve(fit, held_out, rank=getattr(stand_in, "rank", None), diagonal=getattr(stand_in, "diagonal", False))
    if not isinstance(stand_in, nn.Module):
        return Repair(window, stand_in, solution.removal_error, solution.removal_error, solution.ridge)
    stand_in.start_at(solution.map)  # type: ignore[operator]
    return Repair(window, stand_in, solution.removal_error, solution.held_out_error, solution.ridge)


def packed(repair: Repair, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of what stands in a window's place, and the numbers beside it as JSON values."""
    stand_in = repair.stand_in
    weights = stand_in.state_dict() if isinstance(stand_in, nn.Module) else {}
    numbers = {name: getattr(repair, name) for name in ("removal_error", "repaired_error", "ridge")}
    return {prefix + name: value.cpu() for name, value in weights.items()}, numbers


def unpacked(
    stack: BlockStack,
    kind: ReplacementConfig,
    window: range,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    prefix: str = "",
) -> Repair:
    """What `packed` took apart."""
    stand_in = _built(stack, kind, window)
    if isinstance(stand_in, nn.Module):
        stand_in.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
    return Repair(window, stand_in, numbers["removal_error"], numbers["repaired_error"], numbers["ridge"])


def save_repair(repair: Repair, file: Path) -> None:
    """Write what stands in a window's place to a file, which is there whole or not at all."""
    write_file(file, *packed(repair))


def load_repair(stack: BlockStack, kind: ReplacementConfig, window: range, file: Path) -> Repair:
    """Read what `save_repair` wrote.

    Raises
    ------
    StreamlineError
        If the file is gone or damaged.
    """
    return unpacked(stack, kind, window, *read_file(file, "what stands in a window's place"))


def _built(stack: BlockStack, kind: ReplacementConfig, window: range) -> StandIn:
    stand_in = kind.build(stack, window)
    if isinstance(stand_in, nn.Module):
        move_beside(stand_in, stack[window.start])
    return stand_in
