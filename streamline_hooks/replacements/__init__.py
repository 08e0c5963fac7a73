"""What can stand in the place of removed blocks: one file a kind, and their registry."""

from streamline_hooks.replacements.block import InheritedBlocks, inherit, inherit_silenced, merge
from streamline_hooks.replacements.linear import LinearReplacement, NormedLinearReplacement
from streamline_hooks.replacements.mlp import FeedForwardReplacement, MLPReplacement, SwiGLUReplacement
from streamline_hooks.replacements.registry import (
    Replacement,
    build_replacement,
    register_module,
    replacement_config,
)

__all__ = [
    "FeedForwardReplacement",
    "InheritedBlocks",
    "LinearReplacement",
    "MLPReplacement",
    "NormedLinearReplacement",
    "Replacement",
    "SwiGLUReplacement",
    "build_replacement",
    "inherit",
    "inherit_silenced",
    "merge",
    "register_module",
    "replacement_config",
]
