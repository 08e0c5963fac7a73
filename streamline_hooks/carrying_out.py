"""Apply a selection, or the best of a list that can be applied."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.repair import ReplacementConfig, Trained, place
from streamline_hooks.repair.branch_linear import replace_branches
from streamline_hooks.selection import VerifiedSelection
from streamline_hooks.surgery import LayerSurgeon


def first_that_can_go(
    model: nn.Module, judged: list[VerifiedSelection], stack: str, say: Callable[[str], None]
) -> VerifiedSelection:
    """The best selection that the surgeon carries out; only there is it held against the same blocks bypassed."""
    refusal: UnsupportedSurgery | None = None
    for one in judged:
        if not (one.refused or math.isfinite(one.distance)):
            continue
        try:
            with LayerSurgeon(model, stack) as surgeon:
                carry_out(surgeon, one)
                return one
        except UnsupportedSurgery as error:
            refusal = refusal or error
            say(f"{one} is passed over: {error}")
    assert refusal is not None
    raise refusal


def puts_in(selection: VerifiedSelection) -> bool:
    """Whether anything stands in the place of what goes."""
    return bool(selection.maps) or any(repair.stand_in is not None for repair in selection.repairs)


def how_repaired(selection: VerifiedSelection, kind: ReplacementConfig, trained: Trained | None = None) -> str:
    """How what stands in a selection's place came about, in words; empty where nothing does, and nothing was learnt."""
    if trained is not None and trained.best_step:
        return "trained"
    if not puts_in(selection):
        return ""
    return "in closed form" if kind.is_solved or kind.fit is not None else "as it is"


def carry_out(surgeon: LayerSurgeon, selection: VerifiedSelection) -> None:
    """Take a selection's windows and branches away, and put what was fitted for them in their place."""
    if selection.refused:
        raise UnsupportedSurgery(selection.refused)
    replace_branches(surgeon, selection.maps)  # before anything else stands beside these blocks
    for repair in selection.repairs:
        place(surgeon, repair.window, repair.stand_in)
    for k, branch in selection.silenced:
        surgeon.silence(k, branch)  # does nothing where a map stands in its place already
