"""A compressed model in a folder: written whole, read safely, with a card that says what it is."""

from streamline_hooks.checkpoint.card import model_card
from streamline_hooks.checkpoint.difference import BlockMatch, compare_blocks
from streamline_hooks.checkpoint.reading import load, read_history, read_plans
from streamline_hooks.checkpoint.writing import require_free, save

__all__ = ["BlockMatch", "compare_blocks", "load", "model_card", "read_history", "read_plans", "require_free", "save"]
