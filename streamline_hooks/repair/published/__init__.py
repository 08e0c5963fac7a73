"""Recipes as they were published, each under its name, so that they can be compared."""

from streamline_hooks.repair.published.ghosted import fit_ghosted
from streamline_hooks.repair.published.linear_patch import fit_linear_patch
from streamline_hooks.repair.published.replace_me import fit_replace_me

__all__ = ["fit_ghosted", "fit_linear_patch", "fit_replace_me"]
