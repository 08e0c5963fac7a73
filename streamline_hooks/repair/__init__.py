"""Fitting what stands in the place of removed blocks."""

from streamline_hooks.repair.closed_form import ClosedForm, solve
from streamline_hooks.repair.fitting import fit_windows
from streamline_hooks.repair.kinds import Kind, kind_named, known_kinds, register_kind
from streamline_hooks.repair.repaired import Repair
from streamline_hooks.repair.size import StandInSize, size_of
from streamline_hooks.repair.stand_in import StandIn, place

__all__ = [
    "ClosedForm",
    "Kind",
    "Repair",
    "StandIn",
    "StandInSize",
    "fit_windows",
    "kind_named",
    "known_kinds",
    "place",
    "register_kind",
    "size_of",
    "solve",
]
