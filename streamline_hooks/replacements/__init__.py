"""What can stand in the place of removed blocks: one file a kind, and their registry."""

from streamline_hooks.replacements.linear import LinearReplacement
from streamline_hooks.replacements.registry import (
    Replacement,
    build_replacement,
    register_replacement,
    replacement_config,
)

__all__ = ["LinearReplacement", "Replacement", "build_replacement", "register_replacement", "replacement_config"]
