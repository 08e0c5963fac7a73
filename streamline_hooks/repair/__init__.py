"""Fitting what stands in the place of removed blocks."""

from streamline_hooks.repair.closed_form import ClosedForm, solve
from streamline_hooks.repair.fit import fit, require_kind

__all__ = ["ClosedForm", "fit", "require_kind", "solve"]
