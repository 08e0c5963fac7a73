"""Fitting what stands in the place of removed blocks."""

from streamline_hooks.repair.closed_form import ClosedForm, solve
from streamline_hooks.repair.kinds import KINDS, Kind, kind_named

__all__ = ["KINDS", "ClosedForm", "Kind", "kind_named", "solve"]
