"""Which blocks to give up."""

from streamline_hooks.selection.search import ScoredWindow, ranked
from streamline_hooks.selection.target import blocks_to_remove, protected_blocks, windows

__all__ = ["ScoredWindow", "blocks_to_remove", "protected_blocks", "ranked", "windows"]
